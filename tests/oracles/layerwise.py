"""Layer-by-layer statistics (K3): appendix A.3 of Rethinking "Batch" in BatchNorm."""

import torch


class ByHand:
    """K3: each layer's statistics over all samples, taken with those before it frozen at theirs.

    `through(name, z, ...)` is the layer `name` on all of its input at once: its moments are kept,
    and z is normalized with them. What a layer used several times keeps is the mixture.
    """

    def __init__(self):
        self.found = {}

    def through(self, name, z, weight, bias, eps):
        """y = weight (z - mu) / sqrt(var_b + eps) + bias, z (N, C, H, W)."""
        assert z.dtype == torch.float64
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
        self.found.setdefault(name, []).append((mean, var))
        h = (z - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
        return h * weight[:, None, None] + bias[:, None, None]

    def statistics(self):
        """Mean and var_b of all uses of each layer, of one size each: E[z] and E[z^2] - E[z]^2."""
        result = {}
        for name, uses in self.found.items():
            mean = torch.stack([m for m, _ in uses]).mean(0)
            square = torch.stack([v + m**2 for m, v in uses]).mean(0)
            result[name] = mean, square - mean**2
        return result
