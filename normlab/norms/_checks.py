"""What every layer refuses: arguments and inputs that no norm is defined for."""

from torch import Tensor

__all__ = ["check_common", "check_input", "check_nbs"]


def check_common(num_features: int, eps: float) -> None:
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, not {num_features}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, not {eps}")


def check_nbs(nbs: object, layer: str) -> None:
    """Refuse chunks of other than a whole number of samples from 2 on."""
    if nbs == 1 and not isinstance(nbs, bool):
        raise ValueError(f"nbs=1 is instance norm (norm=in); {layer} needs nbs >= 2")
    if isinstance(nbs, bool) or not isinstance(nbs, int) or nbs < 2:
        raise ValueError(f"nbs must be a whole number of at least 2, not {nbs!r}")


def check_input(x: Tensor, num_features: int, layer: str) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{layer} takes 2 to 5 dimensions (N, C, ...), not {tuple(x.shape)}")
    if x.size(1) != num_features:
        raise ValueError(f"{layer}({num_features}) got {x.size(1)} channels: {tuple(x.shape)}")
