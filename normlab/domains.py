"""Names the domains of images: as they are, corrupted, at another scale, adversarial.

A domain is `none` (images as they are stored) or `<kind>-<level>`, such as `contrast-5`. Pixels x
are on a scale of 0 (black) to 1 (white); what leaves it is clipped. The numbers of contrast,
gaussian_noise, jpeg, brightness and blur are those of CIFAR-10-C (Hendrycks and Dietterich 2019);
the others are this project's.

=============== =========================================================== ======================
kind            what becomes of an image                                    level 1 to 5
=============== =========================================================== ======================
contrast        c (x - m) + m, m each channel's mean over the image         .75 .5 .4 .3 .15
gaussian_noise  x + c z, z standard normal, the same whenever it is asked   .04 .06 .08 .09 .10
jpeg            stored as a JPEG of quality c and read again                80 65 58 50 40
brightness      max(R, G, B) + c, hue and saturation kept (V of HSV)        .05 .1 .15 .2 .3
blur            Gaussian blur of c pixels, edges repeated                   .4 .6 .7 .8 1
tint            channel k times 1 - c (1 - f_k), f = (.3, 1, .6)            .2 .4 .6 .8 1
invert          c (1 - x): 1 inverts, less is darker, too                   1 .8 .65 .5 .35
scale           shrunk to 1/level about its centre, on its mean colour      2 3 4 (levels 2 to 4)
pgd             adversarial for the network as it is, at most c from x      1/255 to 8/255 (1 to 8)
=============== =========================================================== ======================

``normlab.data.corruptions`` makes all but the last, which needs the network and the labels:
``normlab.adversarial``.
"""

from dataclasses import dataclass

NONE = "none"
ADVERSARIAL = "pgd"

LEVELS: dict[str, dict[int, float]] = {
    "contrast": {1: 0.75, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.15},
    "gaussian_noise": {1: 0.04, 2: 0.06, 3: 0.08, 4: 0.09, 5: 0.10},
    "jpeg": {1: 80, 2: 65, 3: 58, 4: 50, 5: 40},
    "brightness": {1: 0.05, 2: 0.1, 3: 0.15, 4: 0.2, 5: 0.3},
    "blur": {1: 0.4, 2: 0.6, 3: 0.7, 4: 0.8, 5: 1.0},
    "tint": {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 5: 1.0},
    "invert": {1: 1.0, 2: 0.8, 3: 0.65, 4: 0.5, 5: 0.35},
    "scale": {2: 2, 3: 3, 4: 4},
    ADVERSARIAL: {level: level / 255 for level in range(1, 9)},
}
"""Kind -> level -> its number c."""


@dataclass(frozen=True)
class Domain:
    """One domain of images; without arguments, images as they are."""

    kind: str = NONE
    level: int = 0

    @classmethod
    def parse(cls, spec: str) -> "Domain":
        """Read ``none`` or ``<kind>-<level>``; ValueError, in one line, says what is allowed."""
        if spec == NONE:
            return cls()
        kind, _, level = str(spec).rpartition("-")
        if kind not in LEVELS or level not in map(str, LEVELS[kind]):
            known = ", ".join(f"{k}-{min(v)}..{max(v)}" for k, v in LEVELS.items())
            raise ValueError(f"no domain '{spec}' (domains: {NONE}, {known})")
        return cls(kind, int(level))

    @property
    def amount(self) -> float:
        """The number c of the table above. Raises KeyError for ``none``, which has none."""
        return LEVELS[self.kind][self.level]

    @property
    def adversarial(self) -> bool:
        """Whether its images are made against a network, and not from pixels alone."""
        return self.kind == ADVERSARIAL

    @property
    def corrupts(self) -> bool:
        """Whether its images are other pixels than those stored, for any network."""
        return self.kind not in (NONE, ADVERSARIAL)

    def __str__(self) -> str:
        return NONE if self.kind == NONE else f"{self.kind}-{self.level}"


CLEAN = Domain()
