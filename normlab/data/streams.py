"""Random streams: everything random is a function of (stream, seed, epoch, step) alone.

A run that is killed and resumed sees the same batches, evaluating never changes training, and no
global generator is read or written.
"""

from enum import IntEnum

import numpy as np

SPLIT_SEED = 0  # the held-apart validation images are the same for every run, seed and machine


class Stream(IntEnum):
    """Independent random streams. The numbers enter the seeds: never change or reuse one."""

    SPLIT = 0
    SUBSET = 1
    TRAIN_ORDER = 2
    TRAIN_AUGMENT = 3
    EVAL_ORDER = 4
    EVAL_AUGMENT = 5
    SYNTHETIC = 6
    CORRUPTION = 7
    HALVES = 8


def generator(stream: Stream, seed: int, *key: int) -> np.random.Generator:
    """A fresh generator for (stream, seed, key), e.g. key = (epoch, step).

    The key travels as SeedSequence's spawn key, because plain entropy lists collide: numpy treats
    [7] and [7, 0] alike.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: a seed is a whole number >= 0")
    sequence = np.random.SeedSequence(seed, spawn_key=(int(stream), *key))
    return np.random.Generator(np.random.PCG64(sequence))
