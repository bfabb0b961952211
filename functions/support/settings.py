"""Fields of a config that say what fits beside their default, and the check of these fields."""

import json
import math
from dataclasses import MISSING, field, fields
from functools import partial
from typing import Any, get_args

# Error messages describe the values of each type in this way.
TYPE_DESCRIPTIONS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a name or a path",
    tuple[int, ...]: "a list of integers, such as [1, 2, 4]",
}


class ConfigError(ValueError):
    """An error about a field with an invalid value; its message says which values are valid."""


def setting(default: Any = MISSING, **marks: Any) -> Any:
    """Return a field of a config with marks; without a default, its value must be given.

    at_least, at_most: limits of a number, or of each number in a list. Without them, an integer is
        at least 1 and another number at least 0.
    choices: the values that fit.
    changeable: a resumed run may change the value.
    no_flag: the program sets the value, and not the command line.
    fixed_by_weights: weights work only with the value with which they were trained.
    """
    return field(default=default, metadata=marks)


def choice(*choices: Any, **marks: Any) -> Any:
    """Return a field that has one of these values. The first one is the default."""
    return setting(choices[0], choices=choices, **marks)


def changeable(default: Any = MISSING, **marks: Any) -> Any:
    """Return a field that a resumed run may change."""
    return setting(default, changeable=True, **marks)


def fields_with(config_class: type, mark: str) -> set[str]:
    """Return the names of the fields that have a mark."""
    return {each.name for each in fields(config_class) if mark in each.metadata}


def check_fields(config: Any) -> None:
    """Convert each field to its annotated type, or raise ConfigError if it does not fit."""
    for each in fields(config):
        check = partial(require, config, each.name)
        value = getattr(config, each.name)
        choices = each.metadata.get("choices", [value])
        check(value in tuple(choices), " or ".join(map(json.dumps, choices)))

        # The value of a field is a single item, or a tuple of items, which is a list in JSON.
        item_type, *ellipsis = get_args(each.type) or [each.type]
        items = value if ellipsis else [value]
        allowed = (float, int) if item_type is float else (item_type,)
        fits = isinstance(items, (list, tuple)) and all(type(item) in allowed for item in items)
        check(fits and value != "", TYPE_DESCRIPTIONS[each.type])

        if item_type in (int, float):
            at_least = each.metadata.get("at_least", int(item_type is int))
            at_most = each.metadata.get("at_most", math.inf)
            requirement = f"{at_least} or more"
            if at_most < math.inf:
                requirement = f"from {at_least} to {at_most:,}"
            # JSON has no infinity. A field that is a limit has 0 for none.
            check(math.inf not in items, "finite")
            # No comparison with nan is true, so nan does not fit.
            check(all(at_least <= item <= at_most for item in items), requirement)

        # A frozen dataclass can set its own fields only in this way.
        object.__setattr__(config, each.name, each.type(value))


def require(config: Any, name: str, fits: bool, requirement: str) -> None:
    """Raise ConfigError, which states the requirement, unless the field fits."""
    if not fits:
        value = f"{getattr(config, name)!r:.100}"
        raise ConfigError(f"{type(config).__name__}: {name} is {value}; it must be {requirement}")
