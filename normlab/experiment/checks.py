"""What an experiment's file may hold: small checks that refuse by file and key, in one line."""

import math
from collections.abc import Collection
from typing import Any, NoReturn


def refuse(where: str, why: str) -> NoReturn:
    raise ValueError(f"{where}: {why}")


def mapping(
    where: str, value: Any, keys: Collection[str] = (), optional: Collection[str] | None = ()
) -> dict[str, Any]:
    """A mapping with these keys and no further ones; without keys, or optional=None, with any."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        refuse(where, f"must be a mapping with names as keys, is {value!r:.60}")
    if missing := set(keys) - set(value):
        refuse(where, f"missing keys {sorted(missing)}")
    if keys and optional is not None and (unknown := set(value) - set(keys) - set(optional)):
        refuse(where, f"unknown keys {sorted(unknown)} (allowed: {', '.join([*keys, *optional])})")
    return value


def items(where: str, value: Any) -> list[Any]:
    return value if isinstance(value, list) else refuse(where, f"must be a list, is {value!r:.60}")


def text(where: str, value: Any) -> str:
    return value if isinstance(value, str) else refuse(where, f"must be text, is {value!r}")


def number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(where, f"must be a number, is {value!r}")
    return float(value)


def named(where: str, value: Any, known: Collection[str]) -> None:
    """Refuse all but a list of names of protocols."""
    if not (names := items(where, value)):
        refuse(where, "names no protocol")
    for name in names:
        if not isinstance(name, str) or name not in known:
            refuse(where, f"unknown protocols ['{name}'] (protocols: {', '.join(known)})")
