"""Rotary positions in config.json of transformers, of version 4 and of version 5."""

from typing import Any

from blocktx.config import RotaryScaling
from blocktx.convert.fields import Fields

_SECTIONS = ("rope_parameters", "rope_scaling")
# The kinds of RotaryScaling by `rope_type`, the fields that one needs and those that it may have.
_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_SCALING_FIELDS = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
_SCALING_NEEDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_frequency_factor", "high_frequency_factor", "original_context"),
    "yarn": ("factor",),
}
_SCALING_OPTIONS = {"yarn": ("original_context", "beta_fast", "beta_slow", "attention_factor")}
_ROPE_FIELDS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"),
    *_SCALING_FIELDS.values(),
}


def read_rotary(fields: Fields, model_type: str, context: int | None) -> dict[str, Any]:
    """Return the rotary fields of a StackConfig."""
    is_neox = model_type == "gpt_neox"
    old = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    if not any(name in fields.values for name in (*old, "rope_parameters")):
        fields.problem(
            "rope_theta",
            "absent, and so are rope_scaling and rope_parameters; add the base that the model was "
            "trained with (10000.0 for the first Llama)",
        )
    for name in ("rope_parameters", "rope_scaling"):
        for key, value in fields.section(name).items():
            if key not in _ROPE_FIELDS and value is not None and (key, value) != ("truncate", True):
                fields.problem(f"{name}.{key}", f"got {value!r}, is not supported")
    base = fields.agreed("rope_parameters.rope_theta", "rope_theta", "rotary_emb_base")
    if base is None and "rope_parameters" in fields.values:
        fields.problem("rope_parameters.rope_theta", "absent")
    fraction = fields.agreed(
        "rope_parameters.partial_rotary_factor", "partial_rotary_factor", "rotary_pct"
    )
    if not is_neox and fraction not in (None, 1.0):
        fields.problem("partial_rotary_factor", f"got {fraction}, only 1.0 is supported")
    scaling = _read_scaling(fields, is_neox, context)
    default = 0.25 if is_neox else 1.0
    return {
        "rotary_base": 10_000.0 if base is None else base,
        "rotary_fraction": default if fraction is None or not is_neox else fraction,
        "rotary_scaling": scaling,
    }


def _read_scaling(fields: Fields, is_neox: bool, context: int | None) -> RotaryScaling:
    names = [f"{where}.{name}" for where in _SECTIONS for name in ("rope_type", "type")]
    rope_type = fields.agreed(*names, kind=str)
    if rope_type is None:
        rope_type = "default"
        for section in _SECTIONS:
            if fields.get(f"{section}.factor") is not None:
                fields.problem(f"{section}.rope_type", "absent, but there is a factor")
    where = next((name for name in names if fields.get(name) is not None), names[0])
    if rope_type not in _ROPE_TYPES or (is_neox and rope_type != "default"):
        supported = "default" if is_neox else ", ".join(_ROPE_TYPES)
        fields.problem(where, f"got {rope_type!r}; supported are {supported}")
        return RotaryScaling()
    kind = _ROPE_TYPES[rope_type]
    needed = _SCALING_NEEDS[kind]
    values = {}
    for ours in (*needed, *_SCALING_OPTIONS.get(kind, ())):
        theirs = _SCALING_FIELDS[ours]
        value = fields.agreed(
            *(f"{section}.{theirs}" for section in _SECTIONS),
            kind=int if ours == "original_context" else float,
        )
        if value is None and ours in needed:
            fields.problem(f"{where.split('.')[0]}.{theirs}", f"absent, needed for {rope_type}")
        if value is not None:
            values[ours] = value
    if kind == "yarn" and context is not None:
        values.setdefault("original_context", context)
    if any(values.get(name) is None for name in needed):
        return RotaryScaling()
    try:
        return RotaryScaling(kind=kind, **values)
    except ValueError as error:
        fields.problems.append(f"config.json: {where.split('.')[0]}: {error}")
        return RotaryScaling()


def write_scaling(scaling: RotaryScaling) -> dict[str, Any] | None:
    """Return what `read_rotary` reads as `scaling`; None if there is none."""
    if scaling.kind == "none":
        return None
    names = (*_SCALING_NEEDS[scaling.kind], *_SCALING_OPTIONS.get(scaling.kind, ()))
    values = {_SCALING_FIELDS[name]: getattr(scaling, name) for name in names}
    return {"rope_type": scaling.kind} | {k: v for k, v in values.items() if v is not None}
