"""Fields of a config that say what fits beside their default, and the check of these fields."""

import json
import math
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from functions.support.errors import printable

# How error messages describe a value of a type
TYPES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a name or a path, and not empty",
    dict: "a table of fields",
}


class ConfigError(Exception):
    """An error about a field with an invalid value; its message says which values are valid."""


class Presets(UserDict):
    """The presets by name. One is built when it is asked for, so a wrong one stops no other."""

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Add a function that returns a preset, under its name with - for _."""
        self[function.__name__.replace("_", "-")] = function
        return function

    def __getitem__(self, name: str) -> Any:
        """Return a preset. Raises ConfigError, with its name, for one that cannot work."""
        function = super().__getitem__(name)
        try:
            return function()
        except ConfigError as error:
            raise ConfigError(f"the preset {name!r} of config.py: {error}") from error


def setting(default: Any = MISSING, **marks: Any) -> Any:
    """Return a field of a config with marks; without a default, its value must be given.

    A field of the type `X | None` may have no value, which is None.

    at_least, at_most: limits of a number, or of each number in a list. Without them, an integer is
        at least 1 and another number at least 0.
    fixed: a resumed run cannot change the value.
    no_flag: the program sets the value, and not the command line.
    flat: the value is a dataclass whose fields are flags without this field's name.
    fixed_by_weights: weights work only with the value with which they were trained, so it is
        fixed, too.
    """
    return field(default=default, metadata=marks)


def fields_with(config_class: type, mark: str) -> set[str]:
    """Return the names of the fields that have a mark."""
    return {each.name for each in fields(config_class) if mark in each.metadata}


def check_fields(config: Any) -> None:
    """Convert each field to its annotated type, or raise ConfigError if it does not fit."""
    for each in fields(config):
        value = checked(each, getattr(config, each.name))
        # A frozen dataclass can set its own fields only in this way.
        object.__setattr__(config, each.name, value)


def types_of(each: Field) -> tuple[list[type], tuple, bool]:
    """Return the types of a field's value or of its items, its choices, and whether it has items.

    NoneType is one of them if there may be no value.
    """
    kinds = [each.type]
    if get_origin(each.type) in (Union, UnionType):
        kinds = [*get_args(each.type)]
    choices = ()
    is_list = get_origin(kinds[0]) is tuple
    if is_list:
        kinds[0] = get_args(kinds[0])[0]
    if get_origin(kinds[0]) is Literal:
        choices = get_args(kinds[0])
        kinds[0] = type(choices[0])
    return kinds, choices, is_list


def limits_of(each: Field) -> tuple[float, float, str]:
    """Return the least and the largest number that a field may have, and both in words."""
    at_least = each.metadata.get("at_least", int(float not in types_of(each)[0]))
    at_most = each.metadata.get("at_most", math.inf)
    if at_most < math.inf:
        return at_least, at_most, f"from {at_least} to {at_most:,}"
    return at_least, at_most, f"{at_least} or more" if at_least > -math.inf else "any number"


def checked(each: Field, value: Any) -> Any:
    """Return a value of a field as its annotated type. Raises ConfigError if it does not fit."""
    kinds, choices, is_list = types_of(each)
    if value is None and NoneType in kinds:
        return None
    check = partial(require, each.name, value)
    if choices:
        check(value in choices, " or ".join(map(json.dumps, choices)))

    # The value of a field is a single item, or a tuple of items, which is a list in JSON. One item
    # is a list of one.
    kinds = [kind for kind in kinds if kind is not NoneType]
    items = value if is_list and isinstance(value, (list, tuple)) else [value]
    allowed = (float, int) if kinds == [float] else (*kinds,)
    wanted = " or ".join(TYPES.get(kind, f"a {kind.__name__}") for kind in kinds)
    # True and False are integers to Python.
    fits = all(
        isinstance(item, allowed) and (bool in kinds or not isinstance(item, bool)) and item != ""
        for item in items
    )
    check(fits, f"a list, and each item {wanted}" if is_list else wanted)

    numbers = [item for item in items if type(item) in (int, float)]
    at_least, at_most, requirement = limits_of(each)
    # JSON has no infinity. A field that is a limit has 0 for none. No float has 400 digits.
    check(all(abs(item) <= 2**64 for item in numbers), "finite, and at most 2^64")
    check(all(at_least <= item <= at_most for item in numbers), requirement)
    if is_list:
        return tuple(items)
    return float(value) if kinds == [float] else value


def require(name: str, value: Any, fits: bool, requirement: str) -> None:
    """Raise ConfigError, which states the requirement, unless the field's value fits."""
    if not fits:
        raise ConfigError(f"{name} is {value!r:.100}; it must be {requirement}")


def from_fields(config_class: type, values: dict) -> Any:
    """Return the config with the values of a file, in which those with a default may be missing.

    Raises ConfigError for fields that are missing or unknown, and for values that do not fit.
    """
    known = {each.name: each for each in fields(config_class)}
    needed = {name for name, each in known.items() if each.default is MISSING}
    if wrong := sorted(needed - values.keys() | values.keys() - known.keys()):
        raise ConfigError(
            f"{config_class.__name__}: missing or unknown: {printable(', '.join(wrong))}"
        )
    return config_class(**values)


def row_of(table: Mapping[str, Any], field_name: str, name: str) -> Any:
    """Return the row of a table that a field names. Raises ConfigError for a name without a row."""
    require(field_name, name, name in table, " or ".join(map(json.dumps, table)))
    return table[name]
