"""Block Transformers of the authors' PyTorch code (github.com/itsnamgyu/block-transformer)."""

import os
from typing import Any

import numpy as np

from blocktx.config import BlockConfig, EmbedderConfig, EncoderConfig, StackConfig
from blocktx.convert import architecture, mapping, official_config, official_json
from blocktx.convert.architecture import Shapes
from blocktx.convert.tensors import check_foreign, open_checkpoint, raise_all
from blocktx.model import BlockTransformer, Model, build

# In their checkpoints and unused: the block decoder is fed with embeddings of blocks.
_UNUSED = "block_decoder.gpt_neox.embed_in.weight"


def load_official(
    path: str | os.PathLike[str], config: BlockConfig | None = None
) -> tuple[BlockTransformer, dict[str, Any]]:
    """A Block Transformer of the authors.

    Sizes come from the tensors, the rest from config.json and `config`, which have to agree with
    them and with each other. Tensors do not tell heads.

    Args:
      path: a folder, a .safetensors file, or a hub name (see `open_checkpoint`).
      config: also decides what the others do not know (`scan_layers`, dtypes, `context_length`).

    Returns:
      The model and its parameters, numpy arrays of `param_dtype`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is not a whole checkpoint of a supported model; all that is wrong is listed.
    """
    if config is not None and config.kind != "block":
        raise ValueError("config: a Block Transformer needs the configuration of a block model")
    checkpoint = open_checkpoint(path)
    names, shapes, lost = checkpoint.tensors, checkpoint.shapes, checkpoint.lost
    problems = list(checkpoint.problems)
    if any(name.startswith("token_decoder.decoder.") for name in shapes):
        t5 = "the token decoder is T5's, with cross-attention, which has no counterpart here"
        raise_all(path, [t5])
    if "embed_out.weight" in shapes and "gpt_neox.final_layer_norm.weight" in shapes:
        raise_all(path, ["a vanilla GPT-NeoX model, not a Block Transformer (use neox)"])
    sections = tuple(f"{name}." for name in official_json.SECTIONS)
    foreign = check_foreign("a Block Transformer", sections, shapes)
    if foreign:
        raise_all(path, problems + foreign)
    problems += _unsupported(config) if config is not None else []
    config, wrong = official_config.configure(checkpoint, config)
    problems += wrong
    if config is not None:
        table = _table(config)
        unused = {_UNUSED: (config.vocab_size, config.block_decoder.width)}
        problems += mapping.check_tensors(table, names, unused, lost)
    else:
        table, other = _tables_of_any_size(shapes)
        optional = {name for entry in other for name in entry.theirs} | {_UNUSED}
        problems += mapping.check_names(table, names, optional, lost)
    raise_all(path, problems)
    mapping.check_ours(table, config)
    params = mapping.to_params(
        table, checkpoint.read, stacked=config.scan_layers, dtype=config.param_dtype
    )
    return build(config), params


def to_official(
    model: Model, params: dict[str, Any], dtype: str = "float32"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors in `dtype`, as the authors' code loads them, and what describes them.

    The second has the fields that `load_official` reads from config.json, and under `official_yaml`
    the model's part of a configuration file of the authors.

    Raises:
      ValueError: the authors' code has no such model, or `params` are not its parameters.
    """
    config = model.config
    if config.kind != "block":
        raise ValueError("a vanilla model cannot become a Block Transformer; use to_neox")
    raise_all("the model", _unsupported(config))
    tensors, problems = mapping.to_tensors(
        _table(config), params, stacked=config.scan_layers, dtype=dtype
    )
    raise_all("the parameters", problems)
    tensors[_UNUSED] = np.zeros((config.vocab_size, config.block_decoder.width), dtype)
    return tensors, official_json.to_json(config, dtype)


def _unsupported(config: BlockConfig) -> list[str]:
    """Why `config` has no counterpart among the authors' models."""
    problems = []
    if config.conditioning == "cross_attention":
        problems.append("conditioning: cross_attention is T5's in the authors' code, not ours")
    if config.embeddings_per_block != 1:
        problems.append(
            f"embeddings_per_block: got {config.embeddings_per_block}; the authors project the "
            "tokens of each embedding separately, so only 1 can be converted"
        )
    return problems


def _table(config: BlockConfig) -> list[mapping.Entry]:
    vocab, width, inner = config.vocab_size, config.context_width, config.token_decoder.width
    is_prefix = config.conditioning == "prefix"
    vectors = config.prefix_length if is_prefix else config.block_length
    return [
        *_embedder_table(config),
        *mapping.neox_stack("block_decoder/stack", "block_decoder.gpt_neox", config.block_decoder),
        mapping.table("token_decoder/embed", "token_decoder.gpt_neox.embed_in", vocab, inner),
        *mapping.linear(
            "token_decoder/expansion",
            "token_decoder.expansion_layer",
            (vectors, inner),
            (width,),
            shape=(vectors * inner, width, 1),
        ),
        *mapping.neox_stack("token_decoder/stack", "token_decoder.gpt_neox", config.token_decoder),
        *mapping.linear(
            "token_decoder/classifier", "token_decoder.embed_out", (vocab,), (inner,), bias=False
        ),
    ]


def _embedder_table(config: BlockConfig) -> list[mapping.Entry]:
    embedder, vocab, width = config.embedder, config.vocab_size, config.context_width
    if embedder.kind in ("lookup", "projection"):
        row = embedder.width or config.block_decoder.width
        if embedder.kind == "lookup":
            row = width // config.block_length
        rows = config.block_length
        entries = [mapping.table("embedder/tokens", "embedder.embeddings", vocab, row)]
    else:
        row = embedder.encoder.width
        rows = embedder.cls_tokens if embedder.kind == "cls" else config.block_length
        entries = mapping.roberta(
            "embedder/encoder", "embedder", embedder.encoder, vocab, config.encoder_positions
        )
    if embedder.kind == "lookup" or embedder.concatenate:
        return entries
    return entries + mapping.linear(
        "embedder/projection",
        "embedder.projection_layer",
        (width,),
        (row, rows),
        in_order=(1, 0),
        shape=(width, row, rows),
    )


def _tables_of_any_size(shapes: Shapes) -> tuple[list[mapping.Entry], list[mapping.Entry]]:
    """Entries whose names alone mean something: those of every model, and those of some."""
    stacks = {}
    for name in ("block_decoder", "token_decoder"):
        layers = architecture.stack_from_shapes(shapes, f"{name}.gpt_neox").get("layers", 1)
        stacks[name] = StackConfig(layers=layers, width=8, heads=1)
    layers = architecture.encoder_from_shapes(shapes, "embedder").get("layers", 1)
    encoder = EncoderConfig(layers=layers, width=8, heads=1)
    kinds = {
        kind: _table(
            BlockConfig(
                vocab_size=1,
                context_length=8,
                embedder=EmbedderConfig(kind=kind, encoder=encoder),
                **stacks,
            )
        )
        for kind in ("lookup", "projection", "encoder")
    }
    is_encoder = any(name.startswith("embedder.encoder.") for name in shapes)
    table = [
        entry
        for entry in kinds["encoder" if is_encoder else "lookup"]
        if not entry.ours.startswith("embedder/projection/")
    ]
    return table, kinds["encoder"] if is_encoder else kinds["projection"]
