"""Checks that every config class applies to its fields when it is constructed."""

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal

from blocktx.config.errors import UserError

_MOST = 2**31 - 1  # of a size: XLA indexes with 32 bits
_TRIED = 100_000  # divisors up to here are found, and their counterparts
_LISTED = 12
_SHOWN = 60  # characters of an invalid value in a message


class FieldError(UserError):
    """An invalid field value. `field` is relative to the dataclass that raises."""

    def __init__(self, field: str, problem: str = ""):  # exceptions are copied by message alone
        super().__init__(f"{field}: {problem}" if problem else field)
        self.field, self.problem = field, problem


def require(condition: bool, field: str, problem: str) -> None:
    """Raise a FieldError unless `condition` holds."""
    if not condition:
        raise FieldError(field, problem)


def positive(config: Any, *fields: str) -> None:
    """Require fields to be greater than 0, and integers to be below 2^31."""
    for field in fields:
        value = getattr(config, field)
        require(value > 0, field, f"got {value}, must be greater than 0")
        _require_bounded(field, value)


def not_negative(config: Any, *fields: str) -> None:
    """Require fields to be 0 or greater, and integers to be below 2^31."""
    for field in fields:
        value = getattr(config, field)
        require(value >= 0, field, f"got {value}, must be 0 or greater")
        _require_bounded(field, value)


def _require_bounded(field: str, value: float) -> None:
    if isinstance(value, int):
        require(value <= _MOST, field, f"got {value}, must be at most {_MOST}")


def divisors(number: int, near: int = 1) -> str:
    """Return the divisors of `number` for an error message, at most 12: those nearest to `near`.

    Of a number above 10^10 some divisors are missed.
    """
    small = [d for d in range(1, min(math.isqrt(number), _TRIED) + 1) if number % d == 0]
    found = {*small, *(number // d for d in small)}
    nearest = sorted(found, key=lambda d: abs(d - near))[:_LISTED]
    more = ", ..." if len(found) > _LISTED else ""
    return ", ".join(map(str, sorted(nearest))) + more


def check_fields(config: Any) -> None:
    """Check the type of each field of a frozen dataclass against its annotation.

    Every `__post_init__` calls it first. An int given for a float becomes a float.

    Raises:
      FieldError: a value is not one of a Literal's choices, not of the annotated type, or a float
        that is not finite.
    """
    for field, hint in _hints(type(config)).items():
        value = _checked(field, hint, getattr(config, field))
        object.__setattr__(config, field, value)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(field: str, hint: Any, value: Any) -> Any:
    """Return `value`, or the float that an int stands for."""
    if isinstance(hint, types.UnionType):  # of classes, or of one class and None
        kinds = typing.get_args(hint)
        if types.NoneType in kinds:
            (hint,) = set(kinds) - {types.NoneType}
            return None if value is None else _checked(field, hint, value)
        _require_instance(field, kinds, value)
    elif typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        require(known, field, f"got {shown(value)}; use one of {', '.join(map(str, choices))}")
    elif typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), field, _expected(value, "tuple"))
        hints = element_hints(hint, len(value))
        problem = f"got {shown(value)}, expected {len(hints)} values"
        require(len(hints) == len(value), field, problem)
        pairs = enumerate(zip(hints, value, strict=True))
        value = tuple(_checked(f"{field}[{i}]", kind, x) for i, (kind, x) in pairs)
    elif dataclasses.is_dataclass(hint):
        _require_instance(field, (hint,), value)
    elif hint is float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        require(real, field, _expected(value, "float"))
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        require(math.isfinite(value), field, f"got {value!r}, expected a finite number")
    elif hint in (int, bool, str):
        require(type(value) is hint, field, _expected(value, hint.__name__))
        if hint is int:
            require(abs(value) < 2**63, field, f"got {shown(value)}, must be below 2^63")
    return value


def element_hints(hint: Any, length: int) -> tuple[Any, ...]:
    """Return the annotation of each element of a tuple: `tuple[X, ...]` or `tuple[X, Y]`."""
    hints = typing.get_args(hint)
    return hints[:1] * length if hints[-1:] == (Ellipsis,) else hints


def _require_instance(field: str, kinds: tuple[type, ...], value: Any) -> None:
    names = " or ".join(kind.__name__ for kind in kinds)
    require(isinstance(value, kinds), field, _expected(value, names))


def _expected(value: Any, name: str) -> str:
    return f"got {shown(value)} ({type(value).__name__}), expected {name}"


def shown(value: Any) -> str:
    """Return `repr(value)` for an error message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a number of {value.bit_length()} bits"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
