"""The fields of a JSON object of other code, read with a list of all that is wrong."""

from collections.abc import Mapping
from typing import Any

_REQUIRED = object()
_TOO_LARGE = 2**40  # no size is larger; arithmetic and messages stay small
_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


class Fields:
    """Reads fields of a JSON object by name; `a.b` is field b of the object a.

    Attributes:
      values: the object.
      problems: one line for each field that is missing, of another type, or unsupported.
      defaults: the values of absent fields, where their class has its own.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self.values, self._prefix = values, prefix
        self.problems: list[str] = []
        self.defaults: Mapping[str, Any] = {}

    def problem(self, name: str, problem: str) -> None:
        """Note a problem; without a name, one that names its field."""
        self.problems.append(f"{self._prefix}{name}{': ' if name else ''}{problem}")

    def section(self, name: str) -> Mapping[str, Any]:
        """Return the object `name`, empty if it is absent, null or something else."""
        section = self.values.get(name)
        if section is None or isinstance(section, Mapping):
            return section or {}
        line = f"{self._prefix}{name}: got {section!r:.100}, must be an object"
        if line not in self.problems:
            self.problems.append(line)
        return {}

    def get(self, name: str) -> Any:
        """Return the value of a field; None if it is absent or null."""
        if "." not in name:
            return self.values.get(name, self.defaults.get(name))
        section, *path = name.split(".")
        value = self.section(section)
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int | None:
        return self._typed(name, int, default)

    def number(self, name: str, default: Any = _REQUIRED) -> float | None:
        return self._typed(name, float, default)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool | None:
        return self._typed(name, bool, default)

    def agreed(self, *names: str, kind: type = float) -> Any:
        """Return the value that all fields of `names` have that are not absent; None if all are."""
        said = {name: self._typed(name, kind, None) for name in names}
        said = {name: value for name, value in said.items() if value is not None}
        values = list(said.values())
        if any(value != values[0] for value in values):
            told = ", ".join(f"{name} {value}" for name, value in said.items())
            self.problems.append(f"{self._prefix}{told}: differ")
        return values[0] if values else None

    def only(self, supported: Mapping[str, tuple[Any, ...]]) -> None:
        """Note every field whose value is none of the `supported`."""
        for name, values in supported.items():
            value = self.get(name)
            if not any(value is v or (type(value) is type(v) and value == v) for v in values):
                named = " or ".join(repr(v) for v in values if v is not None) or "its absence"
                self.problem(name, f"got {value!r:.100}, only {named} is supported")

    def _typed(self, name: str, kind: type, default: Any) -> Any:
        value = self.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if value is None:
            self.problem(name, "absent")
        elif kind is float and type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
        elif kind is int and type(value) is int and abs(value) >= _TOO_LARGE:
            self.problem(name, f"got {value!r:.100}, must be less than {_TOO_LARGE}")
        elif kind is not float and type(value) is kind:
            return value
        else:
            self.problem(name, f"got {value!r:.100}, must be {_NAMES[kind]}")
        return None if default is _REQUIRED else default
