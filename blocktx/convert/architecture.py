"""The architecture of a checkpoint, put together from what several sources say about it.

A source is a dict of facts, by field of the model's configuration, such as
`{"vocab_size": 97, "decoder.layers": 6}`: tensor shapes, config.json, or a configuration that the
user gave. None of them knows everything, and where two know the same they have to agree.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from blocktx.model_config import StackConfig

Facts = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# What their configurations may say otherwise, but our layers are built for.
NEOX = {
    "model_type": "gpt_neox",
    "use_parallel_residual": True,
    "attention_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
ROBERTA = {
    "model_type": "roberta",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "absolute",
}

_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}


def merge(sources: Mapping[str, Facts]) -> tuple[Facts, list[str]]:
    """All facts together, and every field that sources disagree on, for which the first counts.

    But of numbers of layers the largest counts, so that missing layers can be named.
    """
    facts, problems = {}, []
    for field in dict.fromkeys(field for source in sources.values() for field in source):
        said = {name: source[field] for name, source in sources.items() if field in source}
        values = list(said.values())
        if any(value != values[0] for value in values):
            told = ", ".join(f"{name} {value!r}" for name, value in said.items())
            problems.append(f"{field}: {told}")
        facts[field] = max(values) if field.endswith("layers") else values[0]
    return facts, problems


def prefixed(prefix: str, facts: Facts) -> Facts:
    return {f"{prefix}.{field}": value for field, value in facts.items()}


def section(facts: Facts, prefix: str) -> Facts:
    """The facts below `prefix`, by the names that are left."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in facts.items() if name.startswith(start)}


def missing(facts: Facts, fields: Iterable[str]) -> list[str]:
    """One problem for each of `fields` that no source knows."""
    return [
        f"{field}: cannot be told from the tensors; give a config.json or a configuration"
        for field in fields
        if field not in facts
    ]


def stack_config(facts: Facts) -> StackConfig:
    width, hidden = facts["width"], facts.get("mlp_width")
    return StackConfig(**{**facts, "mlp_width": None if hidden == 4 * width else hidden})


def stack_from_config(stack: StackConfig) -> Facts:
    return dataclasses.asdict(stack) | {"mlp_width": stack.mlp_size}


def stack_from_shapes(shapes: Shapes, prefix: str) -> Facts:
    """Layers, width and MLP width of the GPT-NeoX stack whose names begin with `prefix`."""
    layer = re.escape(prefix) + r"\.layers\.(\d+)\."
    return {
        **count_layers(shapes, layer),
        **vote("width", shapes, layer + r"(input|post_attention)_layernorm\.(weight|bias)"),
        **vote("mlp_width", shapes, layer + r"mlp\.dense_h_to_4h\.bias"),
    }


def encoder_from_shapes(shapes: Shapes, prefix: str) -> Facts:
    """The same of a RoBERTa encoder, and the rows of its table of positions."""
    layer = re.escape(prefix) + r"\.encoder\.layer\.(\d+)\."
    embeddings = re.escape(prefix) + r"\.embeddings\."
    return {
        **count_layers(shapes, layer),
        **vote("width", shapes, layer + r"(attention\.)?output\.LayerNorm\.(weight|bias)"),
        **vote("mlp_width", shapes, layer + r"intermediate\.dense\.bias"),
        **vote("positions", shapes, embeddings + r"position_embeddings\.weight"),
    }


def count_layers(shapes: Shapes, pattern: str) -> Facts:
    found = [int(match[1]) for match in map(re.compile(pattern).match, shapes) if match]
    return {"layers": max(found) + 1} if found else {}


def vote(field: str, shapes: Shapes, *patterns: str) -> Facts:
    """`field` as most of the tensors have it, in their first axis, that `patterns` match.

    Most, so that one of a wrong shape is found to be the one that is wrong.
    """
    matches = re.compile("|".join(patterns)).fullmatch
    sizes = [shape[0] for name, shape in shapes.items() if shape and matches(name)]
    return {field: collections.Counter(sizes).most_common(1)[0][0]} if sizes else {}


def stack_from_json(config: Mapping[str, Any]) -> tuple[Facts, list[str]]:
    """Facts in a GPT-NeoX configuration of transformers, old or new, and what is unsupported."""
    facts, problems = integers(config, _SIZES)
    problems += _unsupported(config, NEOX)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.rope_type: got {rope['rope_type']!r}, must be default")
    fraction = _first(config, rope, "rotary_pct", "partial_rotary_factor")
    base = _first(config, rope, "rotary_emb_base", "rope_theta")
    facts["rotary_fraction"] = float(0.25 if fraction is None else fraction)
    facts["rotary_base"] = float(10_000 if base is None else base)
    return facts, problems


def encoder_from_json(config: Mapping[str, Any]) -> tuple[Facts, list[str]]:
    """Facts in a RoBERTa configuration of transformers, and what is unsupported."""
    names = {
        "positions": "max_position_embeddings",
        "pad_id": "pad_token_id",
        "cls_id": "bos_token_id",
    }
    facts, problems = integers(config, _SIZES | names)
    return facts, problems + _unsupported(config, ROBERTA)


def integers(config: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Facts, list[str]]:
    """The fields of `config` that `names` maps ours to, and those that are no integers."""
    said = {ours: config[its] for ours, its in names.items() if config.get(its) is not None}
    wrong = [ours for ours, value in said.items() if type(value) is not int]
    problems = [f"{names[ours]}: got {said.pop(ours)!r}, must be an integer" for ours in wrong]
    return said, problems


def _first(config: Mapping[str, Any], rope: Mapping[str, Any], *names: str) -> Any:
    values = [source.get(name) for source in (rope, config) for name in names]
    return next((value for value in values if value is not None), None)


def _unsupported(config: Mapping[str, Any], supported: Mapping[str, Any]) -> list[str]:
    return [
        f"{field}: got {config[field]!r}, only {value!r} is supported"
        for field, value in supported.items()
        if field in config and config[field] != value
    ]


def stack_to_json(stack: StackConfig, vocab_size: int) -> dict[str, Any]:
    """What `stack_from_json` reads, as transformers names it."""
    base = stack.rotary_base
    return {
        "vocab_size": vocab_size,
        "num_hidden_layers": stack.layers,
        "hidden_size": stack.width,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp_size,
        "rotary_pct": stack.rotary_fraction,
        "rotary_emb_base": int(base) if base.is_integer() else base,
        **NEOX,
    }
