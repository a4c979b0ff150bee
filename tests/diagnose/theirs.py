"""A user's file for the command: the network of the tests, and its batches."""

from diagnose.networks import Net, train

__all__ = ["make_batches", "make_model"]


def make_model():
    return Net()


def make_batches():
    return train().batches
