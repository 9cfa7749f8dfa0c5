"""Block Transformers of the authors' PyTorch code (github.com/itsnamgyu/block-transformer)."""

import dataclasses
import os
from typing import Any

import numpy as np

from blocktx.config import BlockConfig
from blocktx.convert import hf_config, mapping, official_config
from blocktx.convert.agreement import configure
from blocktx.convert.stacks import neox_stack, roberta
from blocktx.convert.tensors import Checkpoint, check_foreign, open_checkpoint, raise_all
from blocktx.model import BlockTransformer, Model, build

# Their checkpoints have it, and it is unused: the block decoder's inputs are block embeddings.
_UNUSED = "block_decoder.gpt_neox.embed_in.weight"


def load_official(
    path: str | os.PathLike[str],
    config: BlockConfig | None = None,
    *,
    allow_nonfinite: bool = False,
) -> tuple[BlockTransformer, dict[str, Any]]:
    """Load a Block Transformer of the authors.

    Args:
      path: a folder, a .safetensors file, or a hub name (see `open_checkpoint`).
      config: needed if there is no config.json; its architecture has to be that of config.json. It
        decides what config.json does not know: `scan_layers`, dtypes, `context_length`.
      allow_nonfinite: accept weights that are NaN or infinite.

    Returns:
      The model and its parameters, NumPy arrays of `param_dtype`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is not a whole checkpoint of a supported model; all that is wrong is listed.
    """
    if config is not None and config.kind != "block":
        raise ValueError("config: a Block Transformer needs the configuration of a block model")
    checkpoint = open_checkpoint(path)
    shapes = checkpoint.shapes
    if any(name.startswith("token_decoder.decoder.") for name in shapes):
        t5 = "the token decoder is T5's, with cross-attention, which has no counterpart here"
        raise_all(path, [t5])
    if "embed_out.weight" in shapes and "gpt_neox.final_layer_norm.weight" in shapes:
        raise_all(path, ["a vanilla GPT-NeoX model, not a Block Transformer (use hf)"])
    problems = list(checkpoint.problems)
    sections = tuple(f"{name}." for name in official_config.SECTIONS)
    foreign = check_foreign("a Block Transformer", sections, shapes)
    if foreign:
        raise_all(path, problems + foreign)
    config, wrong = _configure(checkpoint, config)
    problems += wrong
    if config is None:
        raise_all(path, problems)
    table = _table(config)
    unused = {_UNUSED: (config.vocab_size, config.block_decoder.width)}
    problems += mapping.check_tensors(table, checkpoint.tensors, unused, checkpoint.lost)
    raise_all(path, problems)
    params = mapping.read_params(
        path, table, checkpoint.read, config, allow_nonfinite=allow_nonfinite
    )
    return build(config), params


def to_official(
    model: Model,
    params: dict[str, Any],
    dtype: str = "float32",
    *,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Convert a block model to the tensors that the authors' code loads, and a config.json.

    All tensors of a model that was loaded come back byte for byte, but for
    `block_decoder.gpt_neox.embed_in.weight`: their code loads and never uses it, a model here does
    not have it, and it is written as zeros.

    The config.json has the fields that `load_official` reads, and under `official_yaml` the model's
    part of a configuration file of the authors.

    Args:
      model: a block model.
      params: its parameters.
      dtype: of the tensors, as of `to_hf`.
      allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
      ValueError: the authors' code has no such model, or `params` are not its parameters.
    """
    config = model.config
    if config.kind != "block":
        raise ValueError("a vanilla model cannot become a Block Transformer; use to_hf")
    raise_all("the model", _unsupported(config))
    tensors, problems = mapping.to_tensors(
        _table(config),
        params,
        stacked=config.scan_layers,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
    )
    raise_all("the parameters", problems)
    dtype = next(iter(tensors.values())).dtype.name
    tensors[_UNUSED] = np.zeros((config.vocab_size, config.block_decoder.width), dtype)
    return tensors, official_config.write(config, dtype)


def _configure(
    checkpoint: Checkpoint, config: BlockConfig | None
) -> tuple[BlockConfig | None, list[str]]:
    """Return the configuration, if it is known, and all that is wrong with it."""
    json = checkpoint.config
    rows = checkpoint.shapes.get("embedder.embeddings.position_embeddings.weight", ())
    if config is not None and config.embedder.encoder.positions is None and len(rows) == 2:
        config = _with_positions(config, rows[0])  # as many as are used, or more
    if checkpoint.path.is_file() and json is not None and "block_decoder" not in json:
        json = None  # beside a single file there may be the config.json of another model
    return configure(json, config, official_config.read, _unsupported)


def _with_positions(config: BlockConfig, positions: int) -> BlockConfig:
    encoder = dataclasses.replace(config.embedder.encoder, positions=positions)
    embedder = dataclasses.replace(config.embedder, encoder=encoder)
    try:
        return dataclasses.replace(config, embedder=embedder)
    except ValueError:  # too few for the blocks
        return config


def _unsupported(config: BlockConfig) -> list[str]:
    """Return the reasons why `config` has no counterpart among the authors' models."""
    problems = []
    if config.conditioning == "cross_attention":
        problems.append("conditioning: cross_attention is T5's in the authors' code, not ours")
    if config.embeddings_per_block != 1:
        problems.append(
            f"embeddings_per_block: got {config.embeddings_per_block}; the authors project the "
            "tokens of each embedding separately, so only 1 can be converted"
        )
    if config.tied_classifier:
        problems.append("tied_classifier: got True; the authors' classifiers are not tied")
    if config.embedder.kind in ("mean", "mean_mlp"):
        problems.append(f"embedder.kind: got {config.embedder.kind!r}, which the authors lack")
    for name in ("block_decoder", "token_decoder"):
        family, reasons = hf_config.stack_family(getattr(config, name))
        if family != "gpt_neox":
            reasons = reasons or [f"got one of {family}; the authors' stacks are GPT-NeoX's"]
        problems += [
            f"{name}.{reason}" if ":" in reason else f"{name}: {reason}" for reason in reasons
        ]
    return problems


def _table(config: BlockConfig) -> list[mapping.Entry]:
    vocab, width, inner = config.vocab_size, config.context_width, config.token_decoder.width
    is_prefix = config.conditioning == "prefix"
    vectors = config.prefix_length if is_prefix else config.block_length
    return [
        *_embedder_table(config),
        *neox_stack("block_decoder/stack", "block_decoder.gpt_neox", config.block_decoder),
        mapping.table("token_decoder/embed", "token_decoder.gpt_neox.embed_in", vocab, inner),
        *mapping.linear(
            "token_decoder/expansion",
            "token_decoder.expansion_layer",
            (vectors, inner),
            (width,),
            shape=(vectors * inner, width, 1),
        ),
        *neox_stack("token_decoder/stack", "token_decoder.gpt_neox", config.token_decoder),
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
        entries = roberta(
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
