"""What a run is: its schema, how one is composed, and by what it is known.

``schema`` holds the keys, their types and ranges; ``composition`` makes a plain dictionary of them
from ``conf/`` and overrides; ``identity`` says which of them change the weights, ``resumption``
what may change in a run that goes on. No torch in here.
"""

from normlab.config.composition import (
    chosen_arms,
    combined,
    compose,
    explained,
    jobs,
    near,
    options,
    register,
    resolve,
)
from normlab.config.identity import (
    LATER,
    SCHEMA_VERSION,
    cell_key,
    check_taken,
    is_task,
    network_name,
    run_id,
    training_config,
    with_later_keys,
)
from normlab.config.resumption import (
    OF_THE_PLACE,
    check_resume,
    continued,
    keys,
    other_statistics,
)
from normlab.config.schema import Config, ConfigError, check, plan_of

__all__ = [
    "LATER",
    "OF_THE_PLACE",
    "SCHEMA_VERSION",
    "Config",
    "ConfigError",
    "cell_key",
    "check",
    "check_resume",
    "check_taken",
    "chosen_arms",
    "combined",
    "compose",
    "continued",
    "explained",
    "is_task",
    "jobs",
    "keys",
    "near",
    "network_name",
    "options",
    "other_statistics",
    "plan_of",
    "register",
    "resolve",
    "run_id",
    "training_config",
    "with_later_keys",
]
