"""Group normalization (Wu & He 2018)."""

from normlab.norms._checks import check_whole
from normlab.norms.base import SampleNorm

__all__ = ["GroupNorm"]


class GroupNorm(SampleNorm):
    """Group norm: each sample's statistics over the positions and channels of a group of channels.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over (C/G, H,
    W) per sample and group of consecutive channels, weight and bias per channel. There is no
    population: no sample sees another, and testing is as training.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        groups: G, the number of groups (the paper: 32), or
        channels_per_group: C/G (the paper: 16); exactly one of the two.
        eps: added to the variance.
        affine: learn a weight and a bias per channel.

    Limits: one group is layer norm (`ln`), C groups are instance norm (`in`); some texts have the
    two the wrong way round.

    Errors: ValueError if both or neither of the two are given or C is not divisible: a count that
    does not fit is never replaced by one that does. In forward see SampleNorm.

    Source: Wu & He 2018, section 3.1. Peers: torch.nn.GroupNorm has the same state_dict, takes the
    number of groups first, refuses a single element per group for one sample only, and cancels in
    channels_last on a CPU where means are large; tensorpack's examples fix 32 groups.
    """

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        if (groups is None) == (channels_per_group is None):
            raise ValueError(
                "GroupNorm needs exactly one of groups and channels_per_group, "
                f"not groups={groups} and channels_per_group={channels_per_group}"
            )
        given = groups if channels_per_group is None else channels_per_group
        assert given is not None
        name = "groups" if channels_per_group is None else "channels_per_group"
        check_whole("num_features", num_features, 1)
        check_whole(name, given, 1)
        if num_features % given:
            raise ValueError(
                f"GroupNorm: {num_features} channels are not divisible by {name}={given}"
            )
        count = given if channels_per_group is None else num_features // given
        super().__init__(num_features, count, eps=eps, affine=affine)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.num_groups}"
