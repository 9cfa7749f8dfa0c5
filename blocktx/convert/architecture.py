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

from blocktx.config import EncoderConfig, FieldError, StackConfig

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


_MOST_LAYERS = 1000  # more are a mistake


def merge(sources: Mapping[str, Facts]) -> tuple[Facts, list[str]]:
    """All facts together, and every field that sources disagree on, for which the first counts.

    But of numbers of layers the largest credible one counts, so that missing layers can be named.
    """
    facts, problems = {}, []
    for field in dict.fromkeys(field for source in sources.values() for field in source):
        said = {name: source[field] for name, source in sources.items() if field in source}
        values = list(said.values())
        if any(value != values[0] for value in values):
            told = ", ".join(f"{name} {value!r}" for name, value in said.items())
            problems.append(f"{field}: {told}")
        if field.endswith("layers"):
            values = sorted((value for value in values if value <= _MOST_LAYERS), reverse=True)
            if not values:
                problems.append(f"{field}: got {said}, more than {_MOST_LAYERS}")
                continue
        facts[field] = values[0]
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
        + " that has them" * field.endswith("heads")
        for field in fields
        if field not in facts
    ]


def build_stack(
    kind: type[StackConfig] | type[EncoderConfig], facts: Facts, prefix: str, problems: list[str]
) -> StackConfig | EncoderConfig | None:
    """The stack whose facts are below `prefix`; what is impossible is added to `problems`.

    Something else stands in for unknown heads and for what is impossible, so that tensors can be
    checked: their shapes do not depend on it. None if they do.
    """
    stand_ins = {"heads": 1, "pad_id": 1, "cls_id": 0, "positions": None}
    stand_ins |= {"rotary_fraction": 0.0, "rotary_base": 1.0} if kind is StackConfig else {}
    values = section(facts, prefix)
    if not {"layers", "width"} <= values.keys():
        return None
    if values.get("mlp_width") == 4 * values["width"]:
        del values["mlp_width"]
    if "heads" not in values:
        values |= {"heads": 1, "rotary_fraction": 0.0} if kind is StackConfig else {"heads": 1}
    while True:
        try:
            return kind(**values)
        except FieldError as error:
            problems.append(f"{prefix}.{error}")
            field = error.field
            if field not in stand_ins or values.get(field) == stand_ins[field]:
                return None
            values[field] = stand_ins[field]
            if field == "heads" and 0 <= values.get("rotary_fraction", -1) <= 1:
                values["rotary_fraction"] = 0.0


def stack_from_config(stack: StackConfig) -> Facts:
    return dataclasses.asdict(stack) | {"mlp_width": stack.mlp_size}


def stack_from_shapes(shapes: Shapes, prefix: str) -> Facts:
    """Layers, width and MLP width of the GPT-NeoX stack whose names begin with `prefix`."""
    layer = re.escape(prefix) + r"\.layers\.(\d{1,9})\."
    return {
        **count_layers(shapes, layer),
        **vote("width", shapes, layer + r"(input|post_attention)_layernorm\.(weight|bias)"),
        **vote("mlp_width", shapes, layer + r"mlp\.dense_h_to_4h\.bias"),
    }


def encoder_from_shapes(shapes: Shapes, prefix: str) -> Facts:
    """The same of a RoBERTa encoder, and the rows of its table of positions."""
    layer = re.escape(prefix) + r"\.encoder\.layer\.(\d{1,9})\."
    embeddings = re.escape(prefix) + r"\.embeddings\."
    return {
        **count_layers(shapes, layer),
        **vote("width", shapes, layer + r"(attention\.)?output\.LayerNorm\.(weight|bias)"),
        **vote("mlp_width", shapes, layer + r"intermediate\.dense\.bias"),
        **vote("positions", shapes, embeddings + r"position_embeddings\.weight"),
    }


def count_layers(shapes: Shapes, pattern: str) -> Facts:
    """As far as layers are there with half of their tensors, not just a stray one."""
    matches = map(re.compile(pattern).match, shapes)
    sizes = collections.Counter(int(match[1]) for match in matches if match)
    most = max(sizes.values(), default=0)
    found = [i for i, size in sizes.items() if 2 * size >= most and i < _MOST_LAYERS]
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
    rope = {} if config.get("rope_parameters") is None else config["rope_parameters"]
    if not isinstance(rope, Mapping):
        problems.append(f"rope_parameters: got {rope!r}, must be an object")
        rope = {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.rope_type: got {rope['rope_type']!r}, must be default")
    everything = {**config, **{f"rope_parameters.{name}": rope[name] for name in rope}}
    for field, default, names in (
        ("rotary_fraction", 0.25, ("rotary_pct", "partial_rotary_factor")),
        ("rotary_base", 10_000.0, ("rotary_emb_base", "rope_theta")),
    ):
        names = [prefix + name for prefix in ("rope_parameters.", "") for name in names]
        said, wrong = numbers(everything, {name: name for name in names})
        if len(set(said.values())) > 1:
            wrong.append(", ".join(f"{name} {value}" for name, value in said.items()) + ": differ")
        problems += wrong
        facts[field] = next(iter(said.values()), default)
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


def numbers(config: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Facts, list[str]]:
    """The same of finite numbers, as floats."""
    said = {ours: config[its] for ours, its in names.items() if config.get(its) is not None}
    wrong = [o for o, v in said.items() if type(v) not in (int, float) or not abs(v) < 1e300]
    problems = [f"{names[ours]}: got {said.pop(ours)!r}, must be a number" for ours in wrong]
    return {ours: float(value) for ours, value in said.items()}, problems


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
