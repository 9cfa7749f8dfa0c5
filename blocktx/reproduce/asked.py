"""Descriptions that results are stored with, and their comparison."""

import dataclasses
import json
from typing import Any

from blocktx.config import ModelConfig, RunConfig
from blocktx.reproduce.study import Run, Speed

# Fields that change no result: where files are, what is printed and saved, how it is computed.
_IRRELEVANT = {
    "config.data.cache_dir",
    "config.training.log_every",
    "config.training.evaluate_every",
    "config.training.checkpoint_every",
    "config.training.keep_checkpoints",
    "config.mesh",
    "config.model.platform",
    "config.model.remat",
    "config.model.scan_layers",
}


def of_run(run: Run, seed: int) -> dict[str, Any]:
    """Return the description of a run: its configuration, and that of the run it starts from."""
    described = {"config": _json(dataclasses.replace(run.config, seed=seed))}
    if run.uptrained_from is not None:
        described["uptrained_from"] = of_run(run.uptrained_from, seed)
    return described | {"not_default": sorted(_not_default(run, seed))}


def of_speed(speed: Speed) -> dict[str, Any]:
    """Return the description of a measurement."""
    changed = [
        field
        for name, model in speed.models.items()
        for field in _changed(model, f"models.{name}.")
    ]
    return _json(speed._asdict()) | {"not_default": sorted(changed)}


def difference(saved: dict[str, Any], asked: dict[str, Any]) -> str | None:
    """Return the first field in which two descriptions differ, or None.

    A field that the saved one lacks was added since: it must be at its default. A field that only
    the saved one has was removed since: it must have been at its default. Fields that change no
    result are ignored.
    """
    before, now = _flat(saved), _flat(asked)
    for name in sorted(before.keys() | now.keys()):
        if name in before and name in now:
            same = before[name] == now[name]
        else:
            same = name not in (saved if name in before else asked)["not_default"]
        if not same and not _irrelevant(name):
            return name
    return None


def _irrelevant(name: str) -> bool:
    name = name.replace("uptrained_from.", "")
    return any(name == field or name.startswith(f"{field}.") for field in _IRRELEVANT)


def _json(asked: Any) -> Any:
    """Return `asked` as JSON reads it back."""
    return json.loads(json.dumps(asked, default=dataclasses.asdict))


def _flat(described: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in described.items():
        if name == "not_default":
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{name}.")
        else:
            flat[path + name] = value
    return flat


def _not_default(run: Run, seed: int) -> list[str]:
    names = _changed(dataclasses.replace(run.config, seed=seed), "config.")
    if run.uptrained_from is not None:
        names += [f"uptrained_from.{name}" for name in _not_default(run.uptrained_from, seed)]
    return names


def _changed(config: RunConfig | ModelConfig, path: str) -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), path + field.name
        if dataclasses.is_dataclass(value):
            names += _changed(value, f"{name}.")
        elif field.default is dataclasses.MISSING or value != field.default:
            names.append(name)
    return names
