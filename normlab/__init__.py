"""normlab: normalization experiments that end in a verdict."""

__version__ = "0.1.0"
