"""The few numbers that a diagnosis decides by, and why they are what they are."""

SIGNIFICANT = 4.0
"""Standard errors over batches. A diagnosis makes some ten such comparisons, and a batch's losses
have heavy tails; by a normal law one model in a thousand would give an alarm at this."""

COSTLY_LOSS = 0.05
"""A loss that is higher by this share of it (and by SIGNIFICANT) is a cost. Evaluations of one
healthy network with statistics of other samples of the same data differ by a percent or two."""

COSTLY_ERROR = 0.01
"""One percentage point of error is a cost too, whatever it is of the loss."""

EXPLAINED = 0.8
"""Share of the distance between stored and precise statistics, over all layers and channels, that
a cause of one or two parameters has to account for. Two causes cannot both."""

DECAY = 0.9
"""Of the averages whose noise is nobody's fault: torch's default, with the shortest memory of the
common ones. It costs a network of a short training a percentage point or two of error."""

NOISY = 2.0
"""Times the noise of such an average that half the layers show before it is something else."""

MEMORY = (0.35, 2.5)
"""Squared error of the stored means in units of a batch mean's variance, of an average that holds
one or two batches: 1 for the last one alone, 1/2 for two, (1 - d) / (1 + d) of a decay d: 0.05 for
0.9. The batch that trained may have been half or twice the one in use."""

INITIAL = 0.01
"""What the initial 0 and 1 may weigh in an average: below, it moves a variance by less than the
batches scatter."""

ROUNDED = 1e-3
"""Distances (in standard deviations, squared) below which nothing is looked for: the effect on an
output is that of a variance which is off by a few percent."""

NEGLIGIBLE = 1e-2
"""A channel's variance in units of eps below which eps decides its output: dead."""

BIMODAL = 0.8
"""Variance along the first principal axis of the channels' means that a split in two explains:
2 / pi = 0.64 of a normal distribution at its best, 0.75 of a uniform one, near 1 of two domains."""

BATCHES = 8
"""Batches that it takes to say how far batches scatter."""

HELD_SAMPLES = 512
"""Samples that are kept, to be composed anew; the points of a curve are scored on half as many."""

APART = 3.0
"""Variance of the means of batches in units of what random batches of these samples have (1): at a
layer where it is more than that, batches are no random draws."""

FAR = 0.05
"""Mean distance over the layers that counts as a cost where no label tells what it costs, and the
loss below which a share of it is taken of this instead: networks that fit their data have a loss
near zero, of which everything is a large share."""

CONSTANT = 1e-6
"""Variance of batch means in units of a layer's variance below which they are constant but for
rounding: random batches of n samples have about 1 / n of it."""

FIRST = 10.0
"""Times the median of the layers behind it that the first layer is off by where the inputs are
others: those behind it normalize again. Weights that moved leave it at five times at most."""
