"""Request bodies: JSON to checked fields."""

import collections
import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from blocktx.serve.errors import ApiError


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
      ApiError: 400: it is empty, not UTF-8, not JSON, nested too deeply, not an object, or an
        object of it has a name twice.
    """
    if not body:
        raise ApiError('the body is empty, must be a JSON object, such as {"prompt": "Once"}')
    try:
        parsed = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates,
        )
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the body is not UTF-8: {error.reason} at byte {error.start}; encode it as UTF-8"
        ) from None
    except RecursionError:
        raise ApiError("the body is nested too deeply; no field needs more than 3 levels") from None
    except ValueError as error:  # also numbers with more digits than Python converts
        raise ApiError(f"the body is not valid JSON: {error}"[:300]) from None
    if not isinstance(parsed, dict):
        raise ApiError(f"the body must be a JSON object, got {_name(parsed)}")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        name = names.most_common(1)[0][0]
        raise ApiError(f"{show(name)}: is there {names[name]} times, must be there once")
    return found


class Fields:
    """Fields of a body, read one after the other. A field that is null is not set."""

    def __init__(self, body: dict[str, Any]):
        self._body = {name: value for name, value in body.items() if value is not None}
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """Return the raw value of a field, None if it is not set."""
        self._read.add(name)
        return self._body.get(name)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Return an integer of a range, or the default."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._number(name, default if value is None else value, (int,), low, high)

    def real(self, name: str, default: float, low: float, high: float = math.inf) -> float:
        """Return a finite number of a range, or the default."""
        value = self.get(name)
        return self._number(name, default if value is None else value, (int, float), low, high)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return a bool, or the default."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ApiError(f"{name}: got {show(value)}, must be true or false", param=name)
        return value

    def text(self, name: str) -> str | None:
        """Return a string, None if it is not set."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise ApiError(f"{name}: got {show(value)}, must be a string", param=name)
        return value

    def items(self, name: str, check: Callable[[Any], bool], what: str, most: int) -> list[Any]:
        """Return a list of checked items; an item alone is a list of one."""
        value = self.get(name)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if len(found) > most:
            raise ApiError(f"{name}: got {len(found)} items, must be at most {most}", param=name)
        if not all(map(check, found)):
            raise ApiError(f"{name}: got {show(value)}, must be {what}", param=name)
        return found

    def refuse(self, unsupported: dict[str, tuple]) -> None:
        """Raise an ApiError for a field that is not supported, unless it has one of some values."""
        for name, neutral in unsupported.items():
            value = self.get(name)
            if value is not None and not any(_same(value, other) for other in neutral):
                values = " or ".join([*map(show, neutral), "left out"])
                raise ApiError(
                    f"{name}: got {show(value)}, is not supported, must be {values}", param=name
                )

    def unknown(self) -> Iterable[str]:
        """Return the names of fields that nothing has read."""
        return sorted(set(self._body) - self._read)

    def _number(self, name: str, value: Any, kinds: tuple[type, ...], low: Any, high: Any) -> Any:
        if value is None:
            return None
        right = isinstance(value, kinds) and not isinstance(value, bool)
        if not (right and low <= value <= high) or value in (math.inf, -math.inf):
            what = "an integer" if kinds == (int,) else "a number"
            bound = f"of {low} or greater" if high == math.inf else f"from {low} to {high}"
            raise ApiError(f"{name}: got {show(value)}, must be {what} {bound}", param=name)
        return value


def _same(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; Python's True equals 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def show(value: Any) -> str:
    """Return a value for a message, shortened."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = _name(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _name(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")
