"""From ``conf/``, experiment files and overrides to one plain, validated dictionary."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from normlab import experiment, plugins
from normlab.config.identity import NOT_TRAINING
from normlab.config.schema import Config, ConfigError, Recipe

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_NAME = "config"

GROUPS = ("norm", "conv", "model", "data", "recipe", "task", "scale", "experiment")
"""What is chosen by an option's name; all but experiments are files of ``conf/``."""

_EXTRAS = {
    "joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray",
}  # fmt: skip
"""Launchers that are no part of Hydra, and the extra of normlab that brings each."""


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved config behind command-line overrides, as `normlab train` would compose it.

    Nothing is checked for making sense (see ``check``). Raises ConfigError.
    """
    with suppress(ConfigError):  # which Hydra explains better
        if (node := _laid_over(overrides)) is not None:
            return resolve(OmegaConf.create(node))
    return resolve(_composed(overrides))


def _composed(overrides: Sequence[str]) -> DictConfig:
    import hydra

    with explained():
        register(overrides)
        with hydra.initialize_config_dir(str(plugins.package_dir("conf")), version_base="1.3"):
            return hydra.compose(CONFIG_NAME, list(overrides))


def _laid_over(overrides: Sequence[str]) -> dict[str, Any] | None:
    """What Hydra makes of the overrides, in a third of the time, once it has composed the options
    that they choose; None where they are more than options and values of keys that exist.

    A report composes hundreds of cells of a few options.
    """
    picked = tuple(word for word in overrides if word.partition("=")[0] in GROUPS)
    if any(word.startswith("experiment=") for word in picked):
        return None
    node = deepcopy(_options_composed(picked, tuple(plugins.conf_dirs())))
    plain = all(_lay_over(node, word) for word in overrides if word not in picked)
    return node if plain else None


@cache
def _options_composed(picked: tuple[str, ...], _: tuple[Path, ...]) -> dict[str, Any]:
    """What Hydra makes of options alone, interpolations as they stand; they may lie anywhere in the
    installed directories."""
    node = OmegaConf.to_container(_composed(picked), resolve=False)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def _lay_over(node: dict[str, Any], word: str) -> bool:
    """Set an override's key in a composed node, if it is one that only replaces a value."""
    from hydra.core.override_parser.types import OverrideType, QuotedString

    override = _override(word)
    *parents, last = override.key_or_group.split(".")
    inner: Any = node
    for parent in parents:
        inner = inner.get(parent) if isinstance(inner, dict) else None
    plain = override.type == OverrideType.CHANGE and override.package is None
    if not plain or override.is_sweep_override() or not isinstance(inner, dict):
        return False
    value = override.value()
    if last not in inner or isinstance(value, dict) or isinstance(inner[last], dict):
        return False
    inner[last] = value.text if isinstance(value, QuotedString) else value
    return True


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """A composed config as plain data, interpolations and environment look-ups carried out.

    The schema is applied once more, since Hydra lets `+key=value` past it. Raises ConfigError for
    unknown and missing keys and for values of the wrong type.
    """
    with explained():
        given = OmegaConf.to_container(cfg, resolve=True)
        typed = OmegaConf.merge(_schema(), given)
        plain = OmegaConf.to_container(typed, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}


@cache
def _schema() -> Any:
    """Made once, since that takes as long as half a merge; a merge leaves it as it is."""
    return OmegaConf.structured(Config)


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's sweeper makes them, in its order.

    What an experiment sweeps is swept unless the overrides say otherwise. Raises ConfigError.
    """
    name, scale = _chosen(overrides, "experiment"), _chosen(overrides, "scale")
    axes: dict[str, str] = {}
    if name in experiment.files():
        node = experiment.overlay(name, scale or default_scale())
        axes = node["hydra"]["sweeper"]["params"]
    given = [word for word in overrides if not word.lstrip("+~").startswith("hydra")]
    words = [f"{axis}={values}" for axis, values in axes.items()]
    return combined([*words, *given])


def combined(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run that Hydra's sweeper makes of these. Raises ConfigError."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    with explained():
        (all_of_them,) = BasicSweeper.split_arguments(_parsed(overrides), None)
        return [list(job) for job in all_of_them]


def options(group: str) -> dict[str, Path]:
    """The options of a group that need no further directory: name -> file, ours before others'."""
    if group == "experiment":
        return experiment.files()
    found: dict[str, Path] = {}
    for directory in plugins.conf_dirs():
        for path in sorted((directory / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def register(overrides: Sequence[str]) -> None:
    """Tell Hydra about the schema, the experiments and the conf directories of installed packages.

    An experiment's sweep depends on the scale, so both are read from the overrides beforehand.
    Raises ValueError for an unknown experiment, or one that does not have the scale.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from normlab.config.searchpath import InstalledConf

    for override in overrides:
        _refuse_malformed(override)
    chosen, scale = _chosen(overrides, "experiment"), _chosen(overrides, "scale")
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.repo.pop("experiment", None)  # those that there were before
    for name in experiment.files():  # the others only to be listed and completed
        node = experiment.overlay(name, scale or default_scale()) if name == chosen else {}
        store.store(group="experiment", name=name, node=node, package="_global_")
    store.repo.pop(experiment.AXIS, None)  # those of an experiment chosen before
    if chosen in experiment.files():
        for name, node in experiment.arms(chosen, scale or default_scale()).items():
            store.store(group=experiment.AXIS, name=name, node=node, package="_global_")
        _refuse_one_value_for_all_arms(overrides)
    if chosen not in (None, "null", *experiment.files()):
        experiment.load(chosen)  # says which there are
    Plugins.instance().register(InstalledConf)


def _refuse_malformed(override: str) -> None:
    """What Hydra answers with a message about its own types."""
    key, _, text = override.partition("=")
    if not key.lstrip("+~"):
        raise ConfigError(f"'{override}' is not of the form key=value")
    group = key.lstrip("+")
    if group in GROUPS[:6] and (text == "null" or text.isdigit()):
        raise ConfigError(f"{group} takes a name ({', '.join(options(group))}), got {override}")
    if group in GROUPS[:7] and re.match(r"[^{]*/", text):
        raise ConfigError(
            f"{group} takes a name ({', '.join(options(group))}) and no path, got {override}"
        )


def chosen_arms(overrides: Sequence[str]) -> list[str]:
    """The arms that overrides choose of their experiment: all, unless they say which.

    None where there is no experiment, or it has no arms at that scale.
    """
    name, scale = _chosen(overrides, "experiment"), _chosen(overrides, "scale")
    if name not in experiment.files():
        return []
    known = list(experiment.load(name).arms(scale or default_scale()))
    for override in reversed(_parsed(overrides) if known else []):
        if override.key_or_group == experiment.AXIS:
            wanted = _values(override, known)
            return [arm for arm in known if arm in wanted]
    return known


def _refuse_one_value_for_all_arms(overrides: Sequence[str]) -> None:
    """Refuse a key in which the chosen arms differ: one value may make the same run of several.

    A single arm may be varied, and what all of them have in common. Raises ConfigError.
    """
    chosen = chosen_arms(overrides)
    if len(chosen) < 2:
        return
    loaded = experiment.load(_chosen(overrides, "experiment") or "")
    scale = _chosen(overrides, "scale") or default_scale()
    made, axes = loaded.arms(scale), loaded.scale(scale).axes
    for override in _parsed(overrides):
        for key, values in _keys(override):
            if key in axes or key in NOT_TRAINING or override.is_delete():
                continue
            at = {arm: experiment.spelled(made[arm][key]) for arm in chosen if key in made[arm]}
            unset = [arm for arm in chosen if arm not in at]
            if len(set(at.values())) + bool(unset) < 2:
                continue
            word = override.input_line
            if same := [arm for arm, value in at.items() if value in values]:
                instead = f"arm={','.join(same)} for those that have it"
            elif unset:
                instead = f"arm={','.join(unset)} {word} to leave these out"
            else:
                instead = f"arm={chosen[0]} {word} for one arm (arms: {', '.join(chosen)})"
            raise ConfigError(
                f"{word}: arms of {loaded.name} set {key} themselves ({', '.join(at)}), and one "
                f"value for all would undo what they compare; type {instead}"
            )


@cache
def _override(word: str) -> "Override":
    return _parsed([word])[0]


def _parsed(overrides: Sequence[str]) -> list["Override"]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with explained():
        return OverridesParser.create().parse_overrides(list(overrides))


def _keys(override: "Override") -> Iterator[tuple[str, list[str]]]:
    """(key, values) of an override; what a group's option is made of counts as the group."""
    mapping = override.value()
    if isinstance(mapping, dict):
        for inner, value in mapping.items():
            yield f"{override.key_or_group}.{inner}", [experiment.spelled(value)]
    else:
        yield re.sub(r"\.(name|module)$", "", override.key_or_group), _values(override)


def _values(override: "Override", options: Sequence[str] = ()) -> list[str]:
    """The value that an override gives, or those it sweeps; `options`: what a glob chooses of."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if isinstance(value, Glob):
        return value.filter(list(options))
    if override.is_interval_sweep():
        return []
    values = override.sweep_iterator() if override.is_sweep_override() else [value]
    return [experiment.spelled(getattr(one, "text", one)) for one in values]


def _chosen(overrides: Sequence[str], group: str) -> str | None:
    """The option that the overrides choose, the last one counting."""
    value = None
    for override in overrides:
        key, _, text = override.partition("=")
        if key.lstrip("+") == group:
            value = text.strip("'\"")
    if value and "," in value and group == "experiment":
        raise ConfigError(f"one experiment at a time, got experiment={value}")
    return value


@cache
def default_scale() -> str:
    """The scale that ``conf/config.yaml`` names."""
    defaults = OmegaConf.load(plugins.package_dir("conf") / f"{CONFIG_NAME}.yaml").defaults
    return next(str(entry["scale"]) for entry in defaults if "scale" in entry)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into ConfigError, in at most four lines."""
    from hydra.errors import HydraException, OverrideParseException

    try:
        yield
    except OverrideParseException as error:
        raise ConfigError(_unreadable(str(error.override), str(error))) from error
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_explanation(error)) from error


def _explanation(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    text = str(error)
    if missing := re.search(r"Could not find '(hydra/[^/]+|[^/]+)/([^']+)'", text):
        return _no_option(*missing.groups())
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in", f"{cause or ''}\n{text}"):
        return _no_key(unknown[1], cause or error, text)
    first = [line for line in _lines(text) if "override_grammar" not in line]
    detail = _lines(str(cause)) if cause else first[1:]
    said = [first[0] if first else type(error).__name__]
    said += [line for line in detail if not line.startswith(("object_type", "reference_type"))]
    key = re.search(r"full_key: (\S+)", f"{cause or ''}\n{text}")
    if key and (wanted := _wanted(key[1])):
        said = [line for line in said if not line.startswith("full_key")]
        said.append(f"{key[1]} takes {wanted}")
    return "\n".join(said[:4])


def _unreadable(override: str, text: str) -> str:
    """What Hydra's grammar does not take, and how to write it."""
    if re.search(r"missing EQUAL| at '='", text):
        return f"'{override}' is not of the form key=value"
    key, _, value = override.partition("=")
    if not value or set(value) & set("'\"[]{}"):
        key, value = "key", "value"
    return (
        f"{override} cannot be read: brackets and quotes must close, and a value with other"
        f""" characters needs quotes inside those of the shell: '{key}="{value}"'"""
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _no_option(group: str, name: str) -> str:
    known = list(options(group))
    if group == experiment.AXIS:
        known = _stored(group)
    if group == "hydra/launcher":
        hint = f": pip install 'normlab[{_EXTRAS[name]}]'" if name in _EXTRAS else ""
        return f"no launcher '{name}'{hint} (installed: {', '.join(launchers())})"
    return f"no {group} '{name}'{near(name, known)} ({group}: {', '.join(known)})"


def launchers() -> list[str]:
    """Hydra's launchers that are installed."""
    return _stored("hydra/launcher")


def _stored(group: str) -> list[str]:
    from hydra.core.config_store import ConfigStore

    return sorted(name.removesuffix(".yaml") for name in ConfigStore.instance().list(group))


def _no_key(key: str, error: Exception, text: str) -> str:
    """The unknown key, and those that exist where it was looked for."""
    parent = getattr(error, "parent_node", None)
    known = [str(k) for k in parent] if isinstance(parent, DictConfig) else list(_types())
    known = [k for k in known if k != "hydra"]
    override = re.search(r"override '([^']+)'", text)
    full = override[1] if override else key
    if key not in full.split("."):  # an override with a mapping: norm={a: 1}
        full = f"{full}.{key}"
    return f"no key '{full}'" + (near(key, known) or f" (keys: {', '.join(known)})")


def near(word: str, known: Sequence[str]) -> str:
    """What may have been meant."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _wanted(key: str) -> str:
    """The type of a schema's key, in words."""
    words: dict[Any, str] = {
        int: "an integer", float: "a number", bool: "true or false", str: "a word",
        bool | str: "true or false, or a word",
        int | None: "an integer or null", float | None: "a number or null",
        str | None: "a word or null", list[float]: "a list of numbers: [0.5,0.75]",
        list[str]: "a list: [train:batch,val:ema]", list[int]: "a list of integers: [0,5]",
    }  # fmt: skip
    return "a list of names: [ema_trace]" if key == "probes" else words.get(_types().get(key), "")


def _types() -> dict[str, Any]:
    """Dotted key of the schema -> its type."""
    recipe = {f"recipe.{key}": kind for key, kind in Recipe.__annotations__.items()}
    return {**Config.__annotations__, **recipe}
