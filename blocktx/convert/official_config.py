"""The architecture of an official checkpoint: from its tensors, config.json, a configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blocktx.convert import architecture, official_json
from blocktx.convert.architecture import Facts, Shapes, prefixed, section
from blocktx.convert.tensors import Checkpoint
from blocktx.model_config import BlockConfig, EmbedderConfig, EncoderConfig

_STACKS = ("block_decoder", "token_decoder")


def configure(
    checkpoint: Checkpoint, config: BlockConfig | None
) -> tuple[BlockConfig | None, list[str]]:
    """The configuration (None if it cannot be told), and all that is wrong with it.

    `expansion` among the facts is the number of vectors that a context embedding becomes: the
    prefix length, or for other conditionings the block length.
    """
    sources: dict[str, Facts] = {"tensors": {}}
    problems: list[str] = []
    json = checkpoint.config
    if checkpoint.path.is_file() and not set(official_json.SECTIONS) & set(json or {}):
        json = None  # beside a single file there may be the config.json of another
    if json is not None:
        sources["config.json"], problems = official_json.from_json(json)
    if config is not None:
        sources["configuration"] = _from_config(config)
    kinds = [source["embedder.kind"] for source in sources.values() if "embedder.kind" in source]
    sources["tensors"] = _from_shapes(checkpoint.shapes, kinds[0] if kinds else None)
    facts, disagreements = architecture.merge(sources)
    problems += disagreements + _infer(facts)
    fields = ["vocab_size", "block_length", "embedder.kind", "conditioning"]
    fields += [f"{name}.{field}" for name in _STACKS for field in ("layers", "width", "heads")]
    if facts.get("embedder.kind") in ("encoder", "cls"):
        fields += [f"embedder.encoder.{field}" for field in ("layers", "width", "heads")]
    if facts.get("embedder.kind") == "cls":
        fields.append("embedder.cls_tokens")
    if facts.get("conditioning") == "prefix":
        fields.append("expansion")
    unknown = architecture.missing(facts, fields)
    problems += unknown
    if unknown:
        return None, problems
    try:
        return _build(facts, json, config), problems
    except ValueError as error:
        return None, [*problems, str(error)]


def positions(config: BlockConfig) -> int:
    """Rows of the table of positions of the embedder's encoder."""
    encoder = config.embedder.encoder
    return encoder.positions or config.encoded_tokens + encoder.pad_id + 1


def _infer(facts: Facts) -> list[str]:
    """Adds to `facts` what follows from others."""
    problems = []
    length, expansion = facts.get("block_length"), facts.get("expansion")
    if "conditioning" not in facts and None not in (length, expansion) and length != expansion:
        facts["conditioning"] = "prefix"
    summation = facts.get("conditioning") == "summation"
    if summation and None not in (length, expansion) and length != expansion:
        problems.append(f"conditioning: summation of {expansion} vectors, in blocks of {length}")
    for name in (*_STACKS, "embedder.encoder"):
        width = facts.get(f"{name}.width")
        if f"{name}.heads" not in facts and width is not None:
            size = 32 if width <= 256 else 64 if width <= 1536 else 128  # the authors' rule
            if width >= 128 and width % size == 0:  # their smallest model is that wide
                facts[f"{name}.heads"] = width // size
    return problems


def _build(facts: Facts, json: Mapping[str, Any] | None, config: BlockConfig | None) -> BlockConfig:
    kind = facts["embedder.kind"]
    embedder = {
        name: value for name, value in section(facts, "embedder").items() if "." not in name
    }
    if kind == "projection" and embedder["width"] == facts["block_decoder.width"]:
        del embedder["width"]
    if kind in ("encoder", "cls"):
        encoder = section(facts, "embedder.encoder")
        if encoder.get("mlp_width") == 4 * encoder["width"]:
            del encoder["mlp_width"]
        embedder["encoder"] = EncoderConfig(**encoder)
    length = facts["block_length"]
    told = {
        "vocab_size": facts["vocab_size"],
        "block_length": length,
        "conditioning": facts["conditioning"],
        "embedder": EmbedderConfig(**embedder),
        **{name: architecture.stack_config(section(facts, name)) for name in _STACKS},
    }
    if facts["conditioning"] == "prefix":
        told["prefix_length"] = facts["expansion"]
    if "bos_id" in facts:
        told["bos_id"] = facts["bos_id"]
    if config is not None:
        return dataclasses.replace(config, **told)
    stack = official_json.part(official_json.part(json or {}, "block_decoder"), "config")
    limit = stack.get("max_position_embeddings", 2048)
    return BlockConfig(context_length=max(limit // length, 2) * length, **told)


def _from_shapes(shapes: Shapes, kind: str | None) -> Facts:
    """What tensors say; `kind` of embedder as others say, for shapes that mean different things."""
    vocab = r"token_decoder\.(embed_out|gpt_neox\.embed_in)\.weight"
    tables = r"embedder\.embeddings\.(word_embeddings\.)?weight"
    facts = architecture.vote("vocab_size", shapes, vocab, tables)
    for name in _STACKS:
        facts |= prefixed(name, architecture.stack_from_shapes(shapes, f"{name}.gpt_neox"))
    width, inner = facts.get("block_decoder.width"), facts.get("token_decoder.width")
    vectors = shapes.get("token_decoder.expansion_layer.bias", ())
    if inner and len(vectors) == 1 and vectors[0] % inner == 0:
        facts["expansion"] = vectors[0] // inner
    kernel = shapes.get("embedder.projection_layer.weight", ())
    is_projected = any(name.startswith("embedder.projection_layer.") for name in shapes)
    rows = shapes.get("embedder.embeddings.weight", ())
    if any(name.startswith("embedder.encoder.") for name in shapes):
        encoder = architecture.encoder_from_shapes(shapes, "embedder")
        facts |= prefixed("embedder.encoder", encoder)
        if not is_projected:
            facts |= {"embedder.kind": "cls", "embedder.concatenate": True}
            if width and encoder.get("width"):
                facts["embedder.cls_tokens"] = width // encoder["width"]
        elif kind == "cls":
            facts |= {"embedder.concatenate": False}
            facts |= {"embedder.cls_tokens": kernel[2]} if len(kernel) == 3 else {}
        elif kind == "encoder" and len(kernel) == 3:
            facts["block_length"] = kernel[2]
    elif is_projected:
        facts["embedder.kind"] = "projection"
        if len(kernel) == 3:
            facts |= {"embedder.width": kernel[1], "block_length": kernel[2]}
    elif len(rows) == 2:
        facts["embedder.kind"] = "lookup"
        if width and width % rows[1] == 0:
            facts["block_length"] = width // rows[1]
    return facts


def _from_config(config: BlockConfig) -> Facts:
    embedder, encoder = config.embedder, config.embedder.encoder
    is_prefix = config.conditioning == "prefix"
    facts = {
        "vocab_size": config.vocab_size,
        "block_length": config.block_length,
        "conditioning": config.conditioning,
        "expansion": config.prefix_length if is_prefix else config.block_length,
        "embedder.kind": embedder.kind,
        **({} if is_prefix else {"bos_id": config.bos_id}),
    }
    for name in _STACKS:
        facts |= prefixed(name, architecture.stack_from_config(getattr(config, name)))
    if embedder.kind == "projection":
        facts["embedder.width"] = embedder.width or config.block_decoder.width
    if embedder.kind == "cls":
        facts["embedder.cls_tokens"] = embedder.cls_tokens
        facts["embedder.concatenate"] = embedder.concatenate
    if embedder.kind in ("encoder", "cls"):
        known = dataclasses.asdict(encoder) | {"mlp_width": encoder.mlp_size}
        if encoder.positions is None:  # as many as are used, or more
            del known["positions"]
        facts |= prefixed("embedder.encoder", known)
    return facts
