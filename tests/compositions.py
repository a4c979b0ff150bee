"""Composed configs: one takes a tenth of a second, and several tests ask for the same."""

from functools import cache
from typing import Any

from normlab import config

compose = config.compose  # whatever a test puts in its place


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """The config of these overrides; not to be changed."""
    return compose(list(overrides))
