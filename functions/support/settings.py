"""Fields of a config that say what fits beside their default, and the check of these fields."""

import json
import math
from dataclasses import MISSING, Field, field, fields
from functools import partial
from typing import Any, get_args

from functions.support.errors import printable

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
    departs: with another value, a resumed run is no longer what it would have been.
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
        value = checked(type(config), each, getattr(config, each.name))
        # A frozen dataclass can set its own fields only in this way.
        object.__setattr__(config, each.name, value)


def checked(config_class: type, each: Field, value: Any) -> Any:
    """Return a value of a field as its annotated type. Raises ConfigError if it does not fit."""
    check = partial(require, config_class, each.name, value)
    if choices := each.metadata.get("choices"):
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
    return each.type(value)


def require(config_class: type, name: str, value: Any, fits: bool, requirement: str) -> None:
    """Raise ConfigError, which states the requirement, unless the field's value fits."""
    if not fits:
        raise ConfigError(
            f"{config_class.__name__}: {name} is {value!r:.100}; it must be {requirement}"
        )


def from_fields(config_class: type, values: Any) -> Any:
    """Return the config with the values of a file, in which those with a default may be missing.

    Raises ConfigError for fields that are missing or unknown, and for values that do not fit.
    """
    known = {each.name for each in fields(config_class)}
    needed = {each.name for each in fields(config_class) if each.default is MISSING}
    given = set(values) if isinstance(values, dict) else set()
    if wrong := sorted(needed - given | given - known):
        raise ConfigError(
            f"{config_class.__name__}: missing, or unknown to this version (see CHANGELOG.md): "
            f"{printable(', '.join(wrong))}"
        )
    return config_class(**values)
