"""Attention maps, and the tokens nearest to the inputs of the token decoder.

All functions take one text of N blocks, `tokens_NxK` and `mask_NxK` of `in_blocks`. They run one
forward pass without a cache, and read attention weights by intercepting the model's methods.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from blocktx import plotting
from blocktx.config import BlockConfig, Formulations
from blocktx.model import BlockTransformer, Model, build, record_attention, unstack_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAP_INCHES = 1.7
_MAP_LABELS = 18


def in_blocks(
    tokens: Sequence[int], model: Model, pad_id: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens as whole blocks `[N, K]`, padded in front, and a mask, True for real tokens.

    Args:
      tokens: token ids of a text.
      model: its block length is used.
      pad_id: the padding token; None: the model's.

    Raises:
      ValueError: there is no token, or there are more than the context holds.
    """
    config = model.config
    if not 0 < len(tokens) <= config.context_length:
        raise ValueError(
            f"text: got {len(tokens)} tokens, must be 1 to {config.context_length} (context_length)"
        )
    missing = -len(tokens) % config.block_length
    row = [config.pad_id if pad_id is None else pad_id] * missing + list(tokens)
    tokens_NxK = np.array(row, np.int32).reshape(-1, config.block_length)
    return tokens_NxK, (np.arange(len(row)) >= missing).reshape(tokens_NxK.shape)


def block_attention(
    model: Model, params: dict[str, Any], tokens_NxK: np.ndarray, mask_NxK: np.ndarray
) -> np.ndarray:
    """Return the attention weights of the block decoder, float32 `[layers, H, N, N]`: query, key.

    With n embeddings in a block they are `[layers, H, N * n, N * n]`. For a vanilla model they are
    over tokens: `[layers, H, T, T]`.
    """
    _, weights = _contexts(*_separate(model, params), tokens_NxK, np.asarray(mask_NxK, bool))
    return np.asarray(weights)


def token_attention(
    model: Model, params: dict[str, Any], tokens_NxK: np.ndarray, mask_NxK: np.ndarray
) -> np.ndarray:
    """Return the attention weights of the token decoder, float32 `[N - 1, layers, H, T, T]`.

    Entry i is of block i+1. Its T positions are the P prefixes, or BOS, followed by all tokens of
    the block but the last.

    Raises:
      ValueError: the model is vanilla, or there is no block to predict.
    """
    _require_block_model(model)
    if len(tokens_NxK) < 2:
        raise ValueError(f"tokens: got {len(tokens_NxK)} block, must be 2 or more to predict one")
    model, params = _separate(model, params)
    mask_NxK = np.asarray(mask_NxK, bool)
    context_NxnD, _ = _contexts(model, params, tokens_NxK, mask_NxK)
    return np.asarray(
        _token_attention(model, params, context_NxnD[:-1], tokens_NxK[1:], mask_NxK[1:])
    )


def token_labels(config: BlockConfig) -> list[str]:
    """Return the names of the positions of `token_attention`."""
    has_prefix = config.conditioning == "prefix"
    before = [f"prefix {i}" for i in range(config.prefix_length)] if has_prefix else ["BOS"]
    return before + [f"token {i}" for i in range(config.block_length - 1)]


def nearest_tokens(
    model: Model,
    params: dict[str, Any],
    tokens_NxK: np.ndarray,
    mask_NxK: np.ndarray,
    count: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens whose embeddings are nearest to the expanded context embeddings.

    A context embedding is expanded to P prefix embeddings or, with another conditioning, to K
    vectors. Distance is the cosine to the token decoder's embedding table.

    Returns:
      Int32 tokens and float32 cosines, both `[N, P, count]`, nearest first. Entry i is of the
      context embedding of blocks 0 to i, which predicts block i+1.

    Raises:
      ValueError: the model is vanilla, or `count` is not in 1..V.
    """
    _require_block_model(model)
    if not 1 <= count <= model.config.vocab_size:
        raise ValueError(f"count: got {count}, must be 1 to {model.config.vocab_size} (vocab_size)")
    model, params = _separate(model, params)
    context_NxnD, _ = _contexts(model, params, tokens_NxK, np.asarray(mask_NxK, bool))
    cosine_NxPxV, token_NxPxV = _nearest(model, params, context_NxnD, count)
    return np.asarray(token_NxPxV), np.asarray(cosine_NxPxV)


def first_block_share(weights_LxHxTxS: np.ndarray, group: int = 1) -> tuple[np.ndarray, float]:
    """Return the attention of later blocks to the first block (finding 11 of the paper).

    Args:
      weights_LxHxTxS: of `block_attention`.
      group: n, the embeddings per block.

    Returns:
      The mean over heads and blocks, `[layers]`, and its value under uniform attention.
    """
    share_L = weights_LxHxTxS[:, :, group:, :group].sum(-1).mean((1, 2))
    blocks = weights_LxHxTxS.shape[-1] // group
    return share_L, float(np.mean(1 / np.arange(2, blocks + 1))) if blocks > 1 else 1.0


def plot_attention(weights_LxHxTxS: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """Return a figure with a heat map for each layer (rows) and head (columns).

    Args:
      weights_LxHxTxS: attention weights.
      labels: of the positions, in order. If not all fit, equally spaced ones are shown.
      title: of the figure.
    """
    layers, heads, _, positions = weights_LxHxTxS.shape
    figure, grid = plotting.new_grid(
        layers,
        heads,
        width=_MAP_INCHES * heads + 1.8,
        height=_MAP_INCHES * layers + 0.9,
        sharex=True,
        sharey=True,
    )
    shown = range(0, positions, -(-positions // _MAP_LABELS))
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            image = axes.imshow(
                weights_LxHxTxS[layer, head],
                vmin=0,
                vmax=1,
                cmap=plotting.ATTENTION,
            )
            axes.grid(visible=False)
            axes.tick_params(length=0, labelsize=7, labelfontfamily="monospace")
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=9)
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
        row[0].set_yticks(shown, [plotting.plain(labels[i]) for i in shown])
    grid[0, 0].set_xticks([])
    bar = figure.colorbar(image, ax=grid, shrink=0.8)
    bar.set_label("attention of row to column", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(plotting.plain(title), fontsize=11)
    return figure


def _require_block_model(model: Model) -> None:
    if model.config.kind != "block":
        raise ValueError("model: got a vanilla one, which has no token decoder; use a block model")


def _separate(model: Model, params: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """Return the same model with plain formulations and one subtree per layer."""
    config = dataclasses.replace(
        model.config, scan_layers=False, remat="none", platform="cpu", formulations=Formulations()
    )
    params = unstack_layers(params) if model.config.scan_layers else params
    return build(config), params


@functools.partial(jax.jit, static_argnames="model")
def _contexts(
    model: Model, params: dict[str, Any], tokens_NxK: jax.Array, mask_NxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return context embeddings `[N, n * D]` and the attention weights of the block decoder."""

    def run(net: Model) -> tuple[jax.Array, jax.Array]:
        if isinstance(net, BlockTransformer):
            decoder = net.block_decoder
            embeddings_NxnxD = net.embed_blocks(tokens_NxK[None], mask_NxK[None])[0]
        else:
            decoder, embeddings_NxnxD = net.decoder, net.embed(tokens_NxK)
        return record_attention(lambda: decoder(embeddings_NxnxD, mask_NxK.any(-1)))

    return model.apply({"params": params}, method=run)


@functools.partial(jax.jit, static_argnames="model")
def _token_attention(
    model: BlockTransformer,
    params: dict[str, Any],
    context_NxnD: jax.Array,
    tokens_NxK: jax.Array,
    mask_NxK: jax.Array,
) -> jax.Array:
    def run(net: BlockTransformer, *block: jax.Array) -> jax.Array:
        return record_attention(lambda: net.token_decoder(*block))[1]

    def one_block(*block: jax.Array) -> jax.Array:
        return model.apply({"params": params}, *block, method=run)

    return jax.vmap(one_block)(context_NxnD, tokens_NxK, mask_NxK)


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _nearest(
    model: BlockTransformer, params: dict[str, Any], context_NxnD: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    vectors_NxPxE = model.apply(
        {"params": params}, context_NxnD, method=lambda net, x: net.token_decoder.expansion(x)
    )
    table_VxE = unit(params["token_decoder"]["embed"]["embedding"])
    return jax.lax.top_k(jnp.einsum("npe,ve->npv", unit(vectors_NxPxE), table_VxE), count)
