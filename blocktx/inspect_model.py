"""Looking inside: attention maps, and the tokens nearest to what the token decoder is told.

All of it is for one text of N blocks, `tokens_NxK` and `mask_NxK`, as `in_blocks` makes them, and
computed in one pass without a cache. The models know nothing of it: their calls are intercepted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from blocktx.config import BlockConfig, Formulations
from blocktx.model import BlockTransformer, Model, build, record_attention, unstack_layers


def in_blocks(
    tokens: Sequence[int], model: Model, pad_id: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens as whole blocks `[N, K]` with padding before them, and a mask of what is no padding.

    `pad_id` None is the model's own.

    Raises:
      ValueError: if there is no token, or more than the context has room for.
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
    """What the block decoder's blocks attend to, float32 `[layers, H, N, N]`: query, then key.

    With n embeddings in a block it is `[layers, H, N * n, N * n]`. A vanilla model attends to
    tokens: `[layers, H, T, T]`.
    """
    _, weights = _contexts(*_separate(model, params), tokens_NxK, np.asarray(mask_NxK, bool))
    return np.asarray(weights)


def token_attention(
    model: Model, params: dict[str, Any], tokens_NxK: np.ndarray, mask_NxK: np.ndarray
) -> np.ndarray:
    """What the token decoder's positions attend to, float32 `[N - 1, layers, H, T, T]`.

    Entry i is of block i+1. Its T positions are the P prefixes, or BOS, and the block's tokens but
    the last.

    Raises:
      ValueError: if the model is vanilla, or there is no block to predict.
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
    """Names of the positions of `token_attention`."""
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
    """The tokens nearest, by cosine of embeddings, to what is made of each context embedding.

    That is the P prefix embeddings, or in the other conditionings the K vectors that are added to
    tokens or attended to. Embeddings of tokens are the token decoder's own.

    Returns:
      Int32 tokens and float32 cosines, both `[N, P, count]`, nearest first; entry i is what is told
      of blocks 0 to i, for block i+1.

    Raises:
      ValueError: if the model is vanilla, or `count` is not in 1..V.
    """
    _require_block_model(model)
    if not 1 <= count <= model.config.vocab_size:
        raise ValueError(f"count: got {count}, must be 1 to {model.config.vocab_size} (vocab_size)")
    model, params = _separate(model, params)
    context_NxnD, _ = _contexts(model, params, tokens_NxK, np.asarray(mask_NxK, bool))
    cosine_NxPxV, token_NxPxV = _nearest(model, params, context_NxnD, count)
    return np.asarray(token_NxPxV), np.asarray(cosine_NxPxV)


def first_block_share(weights_LxHxTxS: np.ndarray, group: int = 1) -> tuple[np.ndarray, float]:
    """How much of the later blocks' attention the first block gets (finding 11 of the paper).

    Args:
      weights_LxHxTxS: of `block_attention`.
      group: n, the embeddings in a block.

    Returns:
      The mean over heads and blocks, `[layers]`, and what it were if blocks attended to all alike.
    """
    share_L = weights_LxHxTxS[:, :, group:, :group].sum(-1).mean((1, 2))
    blocks = weights_LxHxTxS.shape[-1] // group
    return share_L, float(np.mean(1 / np.arange(2, blocks + 1))) if blocks > 1 else 1.0


def plot_attention(weights_LxHxTxS: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """A heat map for each layer (rows) and head; `labels` are those of the positions, in order."""
    layers, heads, _, positions = weights_LxHxTxS.shape
    figure = Figure(figsize=(1.4 * heads + 2, 1.5 * layers + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            image = axes.imshow(weights_LxHxTxS[layer, head], vmin=0, vmax=1, cmap="magma")
            axes.tick_params(length=0, labelsize=6)
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=8)
        row[0].set_ylabel(f"layer {layer}", fontsize=8)
    shown = range(0, positions, -(-positions // 12))  # as many as there is room for
    plain = [labels[i].replace("$", r"\$").replace("\n", " ") for i in shown]  # no mathematics
    grid[0, 0].set_yticks(shown, plain)
    grid[0, 0].set_xticks([])
    bar = figure.colorbar(image, ax=grid, shrink=0.7)
    bar.set_label("attention of row to column", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=9)
    return figure


def _require_block_model(model: Model) -> None:
    if model.config.kind != "block":
        raise ValueError("model: got a vanilla one, which has no token decoder; use a block model")


def _separate(model: Model, params: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The same function, computed in the plain way, layer by layer."""
    config = dataclasses.replace(
        model.config, scan_layers=False, remat="none", platform="cpu", formulations=Formulations()
    )
    params = unstack_layers(params) if model.config.scan_layers else params
    return build(config), params


@functools.partial(jax.jit, static_argnames="model")
def _contexts(
    model: Model, params: dict[str, Any], tokens_NxK: jax.Array, mask_NxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Context embeddings `[N, n * D]` and the attention that made them."""

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

    told_NxPxE = model.apply(
        {"params": params}, context_NxnD, method=lambda net, x: net.token_decoder.expansion(x)
    )
    table_VxE = unit(params["token_decoder"]["embed"]["embedding"])
    return jax.lax.top_k(jnp.einsum("npe,ve->npv", unit(told_NxPxE), table_VxE), count)
