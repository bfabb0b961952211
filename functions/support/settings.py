"""Fields of a config that say what fits beside their default, and the check of these fields."""

import json
import math
from dataclasses import MISSING, Field, field, fields
from functools import partial, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, get_args

from functions.support.errors import printable

# Error messages describe the values of each type in this way.
TYPE_DESCRIPTIONS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a name or a path",
    int | str: "an integer or a path",
    tuple[int, ...]: "a list of integers, such as [1, 2, 4]",
    tuple[str, ...]: "a list of names or paths, none of which is empty",
    tuple[float, ...]: "a list of numbers",
    dict: "a table of fields",
}


class ConfigError(ValueError):
    """An error about a field with an invalid value; its message says which values are valid."""


def setting(default: Any = MISSING, **marks: Any) -> Any:
    """Return a field of a config with marks; without a default, its value must be given.

    A field of the type `X | None` may have no value, which is None.

    at_least, at_most: limits of a number, or of each number in a list. Without them, an integer is
        at least 1 and another number at least 0.
    choices: the values that fit.
    fixed: a resumed run cannot change the value.
    no_flag: the program sets the value, and not the command line.
    fixed_by_weights: weights work only with the value with which they were trained, so it is
        fixed, too.
    no_pixels: the value does not change what is drawn, but for rounding.
    formerly: the name that the field has in files of earlier versions.
    repeated: the flag is given once for each item of a list.
    metavar: what the help shows for the value.
    details: a function that returns what the help says after the comment.
    """
    return field(default=default, metadata=marks)


def choice(*choices: Any, **marks: Any) -> Any:
    """Return a field that has one of these values. The first one is the default."""
    return setting(choices[0], choices=choices, **marks)


def fields_with(config_class: type, mark: str) -> set[str]:
    """Return the names of the fields that have a mark."""
    return {each.name for each in fields(config_class) if mark in each.metadata}


def check_fields(config: Any) -> None:
    """Convert each field to its annotated type, or raise ConfigError if it does not fit."""
    for each in fields(config):
        value = checked(type(config), each, getattr(config, each.name))
        # A frozen dataclass can set its own fields only in this way.
        object.__setattr__(config, each.name, value)


def type_of(each: Field) -> Any:
    """Return the type of a field's values, but for None."""
    if not isinstance(each.type, UnionType):
        return each.type
    return reduce(or_, (kind for kind in get_args(each.type) if kind is not NoneType))


def checked(config_class: type | None, each: Field, value: Any) -> Any:
    """Return a value of a field as its annotated type. Raises ConfigError if it does not fit.

    The error begins with the name of the class, if there is one.
    """
    if value is None and NoneType in get_args(each.type):
        return None
    check = partial(require, config_class, each.name, value)
    if choices := each.metadata.get("choices"):
        check(value in tuple(choices), " or ".join(map(json.dumps, choices)))
    kind = type_of(each)

    # The value of a field is a single item, or a tuple of items, which is a list in JSON.
    is_list = Ellipsis in get_args(kind)
    item_types = [item for item in get_args(kind) or [kind] if item is not Ellipsis]
    # One text is a list of one.
    items = [value] if not is_list or isinstance(value, str) else value
    allowed = (float, int) if item_types == [float] else (*item_types,)
    fits = isinstance(items, (list, tuple)) and all(type(item) in allowed for item in items)
    check(fits and "" not in items, TYPE_DESCRIPTIONS[kind])

    numbers = [item for item in items if type(item) in (int, float)]
    at_least = each.metadata.get("at_least", int(float not in item_types))
    at_most = each.metadata.get("at_most", math.inf)
    requirement = f"{at_least} or more" if at_least > -math.inf else "finite"
    if at_most < math.inf:
        requirement = f"from {at_least} to {at_most:,}"
    # JSON has no infinity. A field that is a limit has 0 for none.
    check(not any(map(math.isinf, numbers)), "finite")
    # No comparison with nan is true, so nan does not fit.
    check(all(at_least <= item <= at_most for item in numbers), requirement)
    if is_list:
        return tuple(items)
    return float(value) if item_types == [float] else value


def require(config_class: type | None, name: str, value: Any, fits: bool, requirement: str) -> None:
    """Raise ConfigError, which states the requirement, unless the field's value fits."""
    if not fits:
        owner = f"{config_class.__name__}: " if config_class else ""
        raise ConfigError(f"{owner}{name} is {value!r:.100}; it must be {requirement}")


def from_fields(config_class: type, values: Any) -> Any:
    """Return the config with the values of a file, in which those with a default may be missing.

    Raises ConfigError for fields that are missing or unknown, and for values that do not fit.
    """
    known = {each.name for each in fields(config_class)}
    needed = {each.name for each in fields(config_class) if each.default is MISSING}
    if isinstance(values, dict):
        names = {each.metadata.get("formerly"): each.name for each in fields(config_class)}
        values = {names.get(name, name): value for name, value in values.items()}
    given = set(values) if isinstance(values, dict) else set()
    if wrong := sorted(needed - given | given - known):
        raise ConfigError(
            f"{config_class.__name__}: missing, or unknown to this version (see CHANGELOG.md): "
            f"{printable(', '.join(wrong))}"
        )
    return config_class(**values)
