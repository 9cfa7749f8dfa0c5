"""Conversion of a RunConfig from and to ConfigDicts and plain dicts.

A `configs/*.py` file builds a `RunConfig` and returns it as a ConfigDict (`to_config_dict`). Flags
override single fields of it, and the launch script converts the result back (`from_config_dict`).
An invalid field is a `UserError` that names the field, its value and valid values.
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from blocktx.config.errors import UserError
from blocktx.config.fields import FieldError, element_hints, shown
from blocktx.config.model import ModelConfig
from blocktx.config.run import RunConfig


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
    """Return `config` as a ConfigDict whose fields keep their declared types."""

    def convert(node: Any) -> ml_collections.ConfigDict:
        out = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(node))
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif isinstance(value, tuple):  # flags reach a section in it by its index
                value = tuple(convert(x) if dataclasses.is_dataclass(x) else x for x in value)
            elif value is None:  # a placeholder keeps the type, so that a flag can set the field
                (kind,) = set(typing.get_args(hints[field.name])) - {type(None)}
                value = config_dict.placeholder(kind)
            out[field.name] = value
        return out

    return convert(config)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested dicts. `from_config_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_config_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """Return the RunConfig of nested dicts. Missing fields get their defaults.

    Raises:
      UserError: an unknown field, a missing field without default, a wrong type, or an invalid
        value. The message begins with the field's full name, such as `config.model.block_length`.
    """
    return build_config(config, lambda cls, field: False)


def build_config(
    config: Mapping[str, Any] | ml_collections.ConfigDict, required: Callable[[type, str], bool]
) -> RunConfig:
    """`from_config_dict`, in which `required(cls, field)` fields may not be missing either."""
    return _build(RunConfig, config, "config", required)


def _build(cls: Any, mapping: Any, path: str, required: Callable[[type, str], bool]) -> Any:
    if isinstance(mapping, ml_collections.ConfigDict):
        mapping = mapping.to_dict()
    if not isinstance(mapping, Mapping):
        raise UserError(f"{path}: got {shown(mapping)}, expected a section with fields")
    if cls == ModelConfig:
        cls = _model_class(mapping, path)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in mapping:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"{path}.{name}: unknown field (value {shown(mapping[name])}); {hint}"
                f"{path} has {', '.join(fields)}"
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{path}.{name}", required)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing; it has no default")
        elif required(cls, name):
            raise UserError(f"{path}.{name}: missing; the file is incomplete or was changed")
    try:
        return cls(**values)
    except FieldError as error:
        raise UserError(f"{path}.{error.field}: {error.problem}") from None


def _model_class(mapping: Mapping[str, Any], path: str) -> type:
    kinds = {cls.kind: cls for cls in typing.get_args(ModelConfig)}
    kind = mapping.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path}.kind: got {shown(kind)}; use one of {', '.join(kinds)}")
    return kinds[kind]


def _convert(hint: Any, value: Any, path: str, required: Callable[[type, str], bool]) -> Any:
    """Build the sections, also those in tuples. `check_fields` checks the other fields."""
    if hint == ModelConfig or dataclasses.is_dataclass(hint):
        return _build(hint, value, path, required)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        hints = element_hints(hint, len(value))
        pairs = enumerate(zip(hints, value, strict=False))
        return tuple(_convert(kind, x, f"{path}[{i}]", required) for i, (kind, x) in pairs)
    return value
