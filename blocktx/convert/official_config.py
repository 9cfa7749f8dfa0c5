"""The architecture of an official checkpoint: from its tensors, config.json, a configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blocktx.config import BlockConfig, EmbedderConfig, EncoderConfig, FieldError, StackConfig
from blocktx.convert import architecture, official_json
from blocktx.convert.architecture import Facts, Shapes, prefixed, section
from blocktx.convert.tensors import Checkpoint

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
    is_foreign = json is not None and not set(official_json.SECTIONS) & set(json)
    if checkpoint.path.is_file() and is_foreign:
        json = None  # beside a single file there may be the config.json of another
    else:
        is_foreign = False
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
    problems += architecture.missing(facts, fields)
    built = _build(facts, json or {}, config, problems)
    if problems and is_foreign:
        problems.append("config.json beside it is not used: not one of a Block Transformer")
    return built, problems


def _infer(facts: Facts) -> list[str]:
    """Adds to `facts` what follows from others."""
    problems = []
    length, expansion = facts.get("block_length"), facts.get("expansion")
    if "conditioning" not in facts and None not in (length, expansion) and length != expansion:
        facts["conditioning"] = "prefix"
    summation = facts.get("conditioning") == "summation"
    if summation and None not in (length, expansion) and length != expansion:
        problems.append(f"conditioning: summation of {expansion} vectors, in blocks of {length}")
    return problems


def _build(
    facts: Facts, json: Mapping[str, Any], config: BlockConfig | None, problems: list[str]
) -> BlockConfig | None:
    """The configuration, None if it cannot be told; what is impossible is added to `problems`.

    With problems, it is one whose tensors have the same shapes (see `architecture.build_stack`).
    """
    stacks = {
        name: architecture.build_stack(StackConfig, facts, name, problems) for name in _STACKS
    }
    kind = facts.get("embedder.kind")
    fields = {"projection": ("width",), "cls": ("cls_tokens", "concatenate")}.get(kind, ())
    known = section(facts, "embedder")
    embedder = {name: known[name] for name in ("kind", *fields) if name in known}
    if embedder.get("width") == facts.get("block_decoder.width"):
        embedder.pop("width", None)
    if kind in ("encoder", "cls"):
        embedder["encoder"] = architecture.build_stack(
            EncoderConfig, facts, "embedder.encoder", problems
        )
    conditioning = facts.get("conditioning", "prefix")  # a prefix has the same tensors
    is_known = kind is not None and {"vocab_size", "block_length"} <= facts.keys()
    if not is_known or None in (*stacks.values(), *embedder.values()):
        return None
    if (conditioning == "prefix" and "expansion" not in facts) or (
        kind == "cls" and "cls_tokens" not in embedder
    ):
        return None
    length = facts["block_length"]
    told = {
        "vocab_size": facts["vocab_size"],
        "block_length": length,
        "conditioning": conditioning,
        "embeddings_per_block": 1,
        **stacks,
    }
    if conditioning == "prefix":
        told["prefix_length"] = facts["expansion"]
    if "bos_id" in facts:
        told["bos_id"] = facts["bos_id"]
    rest, wrong = official_json.rest(json, length)
    problems += wrong
    try:
        told["embedder"] = EmbedderConfig(**embedder)
    except FieldError as error:
        problems.append(f"embedder.{error}")
        return None
    while True:
        try:
            if config is not None:
                return dataclasses.replace(config, **told)
            return BlockConfig(**rest, **told)
        except FieldError as error:
            problems.append(str(error))
            if error.field == "bos_id" and told.get("bos_id") != 0:
                told["bos_id"] = 0
            elif error.field == "initializer_range" and "initializer_range" in rest:
                del rest["initializer_range"]
            else:
                return None


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
        facts |= {"embedder.kind": "lookup", "embedder.width": rows[1]}
        if width and rows[1] and width % rows[1] == 0:
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
    if embedder.kind == "lookup":
        facts["embedder.width"] = config.context_width // config.block_length
    if embedder.kind == "cls":
        facts["embedder.cls_tokens"] = embedder.cls_tokens
        facts["embedder.concatenate"] = embedder.concatenate
    if embedder.kind in ("encoder", "cls"):
        known = dataclasses.asdict(encoder) | {"mlp_width": encoder.mlp_size}
        if encoder.positions is None:  # as many as are used, or more
            del known["positions"]
        facts |= prefixed("embedder.encoder", known)
    return facts
