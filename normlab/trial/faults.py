"""The twenty faults of the trial, each with where users met it and what a diagnosis is to say."""

from functools import partial

from normlab.trial import checkpoints, trainings
from normlab.trial.case import Fault

__all__ = ["FAULTS"]

FAULTS = (
    Fault(
        "momentum=0.001",
        "P2",
        "a decay of 0.999 for a hundred steps",
        ("momentum_too_small",),
        partial(checkpoints.with_momentum, momentum=0.001),
    ),
    Fault(
        "momentum=0.9",
        "P2",
        "another framework's decay given to torch as its momentum",
        ("momentum_reversed",),
        partial(checkpoints.with_momentum, momentum=0.9),
    ),
    Fault(
        "momentum=0.999",
        "P3",
        "the same with another framework's default",
        ("momentum_reversed",),
        partial(checkpoints.with_momentum, momentum=0.999),
    ),
    Fault(
        "momentum=0",
        "P4",
        "the statistics never move, though every step is counted",
        ("momentum_zero", "never_updated"),
        checkpoints.without_momentum,
        "both are true of it",
    ),
    Fault(
        "momentum=None",
        "P5",
        "a cumulative average over the whole training, its first steps included",
        ("stale_statistics", "momentum_too_small"),
        checkpoints.averaged_over_all,
        "both say that the statistics lag behind the weights",
    ),
    Fault(
        "update forgotten",
        "P63",
        "the training normalized with batches and never updated the statistics",
        ("never_updated",),
        checkpoints.never_updated,
    ),
    Fault(
        "other domain",
        "P10",
        "fogged images went through the model in training mode before it was saved",
        ("other_domain",),
        checkpoints.from_another_domain,
    ),
    Fault(
        "averaged weights",
        "P45",
        "SWA of three points with the buffers of the last",
        ("averaged_weights", "stale_statistics"),
        trainings.averaged_weights,
        "the weights are not those that the statistics were made with; one file does not tell why",
    ),
    Fault(
        "activation checkpointing",
        "P18",
        "the blocks run forward twice in every step and update twice",
        ("double_update",),
        trainings.recomputed,
    ),
    Fault(
        "frozen, yet updated",
        "P12",
        "a backbone with requires_grad=False is trained in train() mode on other images",
        ("frozen_but_updating",),
        trainings.frozen_backbone,
    ),
    Fault(
        "biased variance",
        "P1",
        "NBS 2 in a framework that keeps the biased variance",
        ("biased_variance", "train_test_gap"),
        trainings.biased_variance,
        "behind a norm with two elements a channel every pair is the same but for its sign, so "
        "that the biased variance is the precise one, and the cost is that of NBS 2",
    ),
    Fault(
        "ranks apart",
        "P29",
        "two ranks with shards of a sorted list, each with its own buffers",
        ("ranks_disagree",),
        trainings.ranks_apart,
    ),
    Fault(
        "eps lost",
        "P13",
        "trained with an eps of 1e-3, evaluated with 1e-5, with variances about as small",
        ("eps_mismatch",),
        trainings.eps_lost,
    ),
    Fault(
        "E[x^2] - E[x]^2",
        "P41",
        "precise statistics in float32 of raw measurements far from 0",
        ("negative_variance",),
        checkpoints.precise_of_few_digits,
    ),
    Fault(
        "tracking off",
        "P11",
        "track_running_stats switched off after the training",
        ("no_running_statistics",),
        checkpoints.tracking_off,
    ),
    Fault(
        "weight decay on norms",
        "P17",
        "one parameter group for everything",
        ("weight_decay_on_norm",),
        trainings.decayed_norms,
    ),
    Fault(
        "fused but kept",
        "P75",
        "norms folded into their convolutions and still applied",
        ("fused_layers",),
        checkpoints.fused_but_kept,
    ),
    Fault(
        "two domains",
        "P57, P62",
        "batches of images and of fogged ones in turn move one set of statistics",
        ("mixed_domains",),
        trainings.two_domains,
    ),
    Fault(
        "shared norms",
        "P42, P58",
        "one batch norm in two places of the network",
        ("used_twice",),
        trainings.shared_norms,
    ),
    Fault(
        "half precision",
        "P65",
        "a variance of raw measurements above 65504, saved in half precision",
        ("not_finite",),
        checkpoints.saved_in_half,
    ),
)
