"""Batch normalization (Ioffe & Szegedy 2015), to the bit that of torch.nn.BatchNorm1d/2d/3d."""

from normlab.norms.base import PopulationNorm

__all__ = ["BatchNorm"]


class BatchNorm(PopulationNorm):
    """Batch norm whose group is the whole forward batch (the micro-batch of one rank).

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and biased variance over samples and
    positions, per channel. In train() the running variance follows the *unbiased* variance, as in
    torch and cuDNN; detectron2's NaiveSyncBatchNorm and tensorpack's Sync and Ghost BN store the
    biased one. Accumulating k micro-batches per optimizer step moves the running statistics k
    times.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the variance.
        decay: share of the running statistics that stays at each update (torch's 1 - momentum).
        affine: learn a weight and a bias per channel.

    Outputs, gradients and buffers are bitwise those of torch's layer with momentum
    round(1 - decay, 12), its rounding included: on a CPU torch accumulates float32 statistics in
    double for NCHW but in float32 for channels_last and (N, C). Errors: see PopulationNorm.
    """
