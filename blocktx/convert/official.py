"""Block Transformers of the authors' PyTorch code (github.com/itsnamgyu/block-transformer)."""

import os
from typing import Any

import numpy as np

from blocktx.convert import mapping, official_config, official_json
from blocktx.convert.tensors import open_checkpoint, raise_all
from blocktx.model import BlockTransformer, Model, build
from blocktx.model_config import BlockConfig

# In their checkpoints and unused: the block decoder is fed with embeddings of blocks.
_UNUSED = "block_decoder.gpt_neox.embed_in.weight"


def load_official(
    path: str | os.PathLike[str], config: BlockConfig | None = None
) -> tuple[BlockTransformer, dict[str, Any]]:
    """A Block Transformer of the authors.

    Sizes come from the tensors, the rest from config.json and `config`, which have to agree with
    them and with each other. With neither, heads follow the authors' rule from a width of 128 on,
    and a model whose tensors leave open what it is, is refused.

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
    names = checkpoint.tensors
    if any(name.startswith("token_decoder.decoder.") for name in names):
        t5 = "the token decoder is T5's, with cross-attention, which has no counterpart here"
        raise_all(path, [t5])
    if "embed_out.weight" in names and "gpt_neox.final_layer_norm.weight" in names:
        raise_all(path, ["a vanilla GPT-NeoX model, not a Block Transformer (use neox)"])
    config, problems = official_config.configure(checkpoint, config)
    if config is not None:
        unused = {_UNUSED: (config.vocab_size, config.block_decoder.width)}
        problems += mapping.check_tensors(_table(config), names, optional=unused)
    raise_all(path, problems)
    params = mapping.to_params(
        _table(config), checkpoint.read, stacked=config.scan_layers, dtype=config.param_dtype
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
    problems = []
    if config.conditioning == "cross_attention":
        problems.append("conditioning: cross_attention is T5's in the authors' code, not ours")
    if config.embeddings_per_block != 1:
        problems.append(
            f"embeddings_per_block: got {config.embeddings_per_block}; the authors project the "
            "tokens of each embedding separately, so only 1 can be converted"
        )
    raise_all("the model", problems)
    tensors, problems = mapping.to_tensors(
        _table(config), params, stacked=config.scan_layers, dtype=dtype
    )
    raise_all("the parameters", problems)
    tensors[_UNUSED] = np.zeros((config.vocab_size, config.block_decoder.width), dtype)
    return tensors, official_json.to_json(config, official_config.positions(config), dtype)


def _table(config: BlockConfig) -> list[mapping.Entry]:
    vocab, width, inner = config.vocab_size, config.block_decoder.width, config.token_decoder.width
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
    embedder, vocab, width = config.embedder, config.vocab_size, config.block_decoder.width
    if embedder.kind in ("lookup", "projection"):
        row = embedder.width or width
        if embedder.kind == "lookup":
            row = width // config.block_length
        rows = config.block_length
        entries = [mapping.table("embedder/tokens", "embedder.embeddings", vocab, row)]
    else:
        row = embedder.encoder.width
        rows = embedder.cls_tokens if embedder.kind == "cls" else config.block_length
        positions = official_config.positions(config)
        entries = mapping.roberta(
            "embedder/encoder", "embedder", embedder.encoder, vocab, positions
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
