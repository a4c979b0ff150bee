"""A checkpoint of the user's: the model's state found in it, and the file written anew."""

import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normlab.runs import write_atomically

__all__ = ["Checkpoint"]

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
NETWORKS = ("weight", "bias", "running_mean")
"""How names end in the state of a network, and not in that of a generator or a bank."""
SAFE = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file, and the state of a model in it.

    state: the model's tensors by name, on the CPU, as the file has them but for prefixes that
        wrappers put before the names (`module.` and `_orig_mod.`).
    optimizer: the one optimizer's state_dict in the file, None where there is none, or several.
    """

    path: Path
    state: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    _content: Any = field(repr=False)
    _at: tuple[str, ...] = ()
    _names: dict[str, str] = field(default_factory=dict, repr=False)
    _metadata: dict[str, str] | None = None

    @classmethod
    def read(cls, path: str | Path, *, key: str | None = None, prefix: str = "") -> "Checkpoint":
        """Read `path`: a .safetensors file, or one of torch.save's, with `weights_only=True`.

        Args:
            key: the entry that holds the model's state (`ema`, or `nets.generator`). By default it
                is the file's top level, or the only entry, at whatever depth, that looks like the
                state of a network.
            prefix: how the names of the model's tensors begin in the file, where it is for more
                than the model: `model.` in many of Lightning's. It is removed.

        Raises ValueError in one line for a file that cannot be read so, without a state or with
        several.
        """
        path = Path(path)
        metadata = None
        if path.suffix == SAFE:
            content, metadata = _read_safetensors(path)
        else:
            content = _read_torch(path)
        at = _find(path, content, key)
        held = _entry(content, at)
        names = _names(path, held, prefix)
        state = {n: held[stored] for n, stored in names.items() if isinstance(held[stored], Tensor)}
        return cls(path, state, _optimizer(content), content, at, names, metadata)

    def load_into(self, model: nn.Module) -> None:
        """Load the state into `model`, strictly.

        Raises ValueError in one line naming what is missing, unexpected or of another shape; the
        model is then partly loaded.
        """
        try:
            held = _entry(self._content, self._at)
            model.load_state_dict({n: held[stored] for n, stored in self._names.items()})
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} does not fit the model: {self._misfit(model)}"
            ) from error

    def _misfit(self, model: nn.Module) -> str:
        wanted = model.state_dict()
        missing = [n for n in wanted if n not in self.state and not n.endswith("batches_tracked")]
        unexpected = [n for n in self.state if n not in wanted]
        shapes = [
            f"{n} is {tuple(self.state[n].shape)} in the file and {tuple(v.shape)} in the model"
            for n, v in wanted.items()
            if n in self.state and isinstance(v, Tensor) and v.shape != self.state[n].shape
        ]
        told = []
        if missing:
            told.append(f"it lacks {_some(missing)}")
        if unexpected:
            told.append(f"it has {_some(unexpected)}, which the model has not")
        if shapes:
            told.append(f"{shapes[0]}{_more(shapes)}")
        for begin in {f"{name.split('.')[0]}." for name in unexpected}:
            if missing and all(begin + name in self.state for name in missing):
                told.append(f"--state-prefix {begin} takes the tensors whose names begin so")
        return "; ".join(told) or "its tensors are refused"

    def write(
        self, path: str | Path, state: Mapping[str, Tensor], *, overwrite: bool = False
    ) -> None:
        """Write this file's content to `path`, with the tensors of `state` in place of its own.

        Every other entry stays, and so do names, prefixes, types (values are rounded to the type
        that the file has), ties between tensors and the metadata of safetensors. Atomically: `path`
        is written whole or not at all.

        Raises ValueError as `check_out` does, and for names and shapes that the file does not have.
        """
        self.check_out(path, overwrite=overwrite)
        for name, value in state.items():
            if name not in self.state:
                raise ValueError(f"{self.path} has no tensor '{name}' to replace")
            if value.shape != self.state[name].shape:
                raise ValueError(
                    f"'{name}' is {tuple(self.state[name].shape)} in {self.path}, "
                    f"and {tuple(value.shape)} here"
                )
        content = self._replaced(state)
        if self.path.suffix == SAFE:
            from safetensors.torch import save

            data = save({k: v.contiguous() for k, v in content.items()}, self._metadata)
        else:
            buffer = BytesIO()
            torch.save(content, buffer)
            data = buffer.getvalue()
        write_atomically(Path(path), data)

    def check_out(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Refuse to write at `path`: ValueError where it is this file's own place, is taken without
        `overwrite`, would be of another kind of file, or is in no directory."""
        out = Path(path)
        self.refuse_itself(out)
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists; --overwrite replaces it")
        if (out.suffix == SAFE) != (self.path.suffix == SAFE):
            raise ValueError(
                f"{out} would be another kind of file than {self.path}, whose content it keeps: "
                f"name it *{self.path.suffix}"
            )
        if not out.parent.is_dir():
            raise ValueError(f"there is no directory {out.parent} to write {out.name} in")

    def refuse_itself(self, path: str | Path) -> None:
        """ValueError where `path` is this file, under whatever name."""
        out = Path(path)
        if out.exists() and out.samefile(self.path):
            raise ValueError(f"{out} is a checkpoint to read, which is never written over")

    def _replaced(self, state: Mapping[str, Tensor]) -> Any:
        """The content, with `state` in it, sharing everything else."""
        own = _entry(self._content, self._at)
        new = copy.copy(own)  # an OrderedDict with its _metadata
        made: dict[tuple[Any, ...], Tensor] = {}
        for name, value in state.items():
            old = self.state[name]
            rounded = value.detach().to(device=old.device, dtype=old.dtype)
            if not rounded.isfinite().all() and value.isfinite().all():
                kind = str(old.dtype).removeprefix("torch.")
                raise ValueError(f"'{name}' does not fit into {kind}, its type in {self.path}")
            storage = old.untyped_storage().data_ptr()
            place = (storage, old.storage_offset(), old.stride(), old.shape)
            new[self._names[name]] = made.setdefault(place, rounded.clone())
        for depth in reversed(range(len(self._at))):
            around = copy.copy(_entry(self._content, self._at[:depth]))
            around[self._at[depth]] = new
            new = around
        return new


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # the arguments of many a training
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except Exception as error:  # on foreign bytes torch's unpickler fails in any way it can
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        unsupported = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
        reason = (unsupported or lines or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read with weights_only=True ({reason[:200]}); only tensors, "
            "numbers, strings and containers of them are loaded: save the model's state_dict() "
            "alone"
        ) from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("safetensors is not installed: pip install 'normlab[models]'") from None
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def _is_state(value: Any) -> bool:
    """Tensors by name, beside which modules may have kept something of their own."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    kinds = [isinstance(v, Tensor) or k.endswith("_extra_state") for k, v in value.items()]
    return all(kinds) and any(isinstance(v, Tensor) for v in value.values())


def _states(content: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if _is_state(content):
        yield at
    elif isinstance(content, dict) and len(at) < 3:
        for name, value in content.items():
            if isinstance(name, str):
                yield from _states(value, (*at, name))


def _find(path: Path, content: Any, key: str | None) -> tuple[str, ...]:
    """Where in the content the state is."""
    if isinstance(content, nn.Module):
        raise ValueError(f"{path} holds a module, not its state_dict()")
    found = list(_states(content))
    if key is not None:
        for at in ((key,), tuple(key.split("."))):
            if _is_state(_entry(content, at)):
                return at
        offered = ", ".join(".".join(at) for at in found if at) or "none"
        raise ValueError(f"{path} has no state under '{key}'; it has: {offered}")
    networks = [
        at for at in found if any(n.rsplit(".", 1)[-1] in NETWORKS for n in _entry(content, at))
    ]
    candidates = networks or found
    if not candidates:
        raise ValueError(f"{path} holds no tensors by name: a model's state_dict() is needed")
    if len(candidates) > 1:
        told = ", ".join(".".join(at) for at in candidates)
        raise ValueError(f"{path} holds several states: --state-key says which of {told}")
    return candidates[0]


def _entry(content: Any, at: tuple[str, ...]) -> Any:
    for name in at:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _names(path: Path, held: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The stored name of each entry, by that which the model gives it."""
    names = {name: name for name in held}
    while begin := next((w for w in WRAPPERS if all(n.startswith(w) for n in names)), None):
        names = {name.removeprefix(begin): full for name, full in names.items()}
    if prefix:
        names = {n.removeprefix(prefix): full for n, full in names.items() if n.startswith(prefix)}
    if not names:
        raise ValueError(f"{path} has no tensor whose name begins with '{prefix}'")
    return names


def _optimizer(content: Any) -> dict[str, Any] | None:
    values = list(content.values()) if isinstance(content, dict) else []
    values += [one for value in values if isinstance(value, list) for one in value]
    found = [v for v in values if isinstance(v, dict) and {"state", "param_groups"} <= v.keys()]
    return found[0] if len(found) == 1 else None


def _some(names: list[str]) -> str:
    return f"'{names[0]}'{_more(names)}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
