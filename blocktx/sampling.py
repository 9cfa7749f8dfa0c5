"""Samplers, and the jitted loop that generates: a block step and K token steps an iteration."""

import dataclasses
import functools
import numbers
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from blocktx.cache import Cache
from blocktx.model import Model
from blocktx.model_config import ModelConfig
from blocktx.prefill import prefill
from blocktx.prompts import blocks_that_fit, in_blocks
from blocktx.stack import unstack_layers

_SMALLEST_BUCKET = 64  # tokens


@flax.struct.dataclass
class Sampling:
    """How tokens are chosen; traced, so that no value costs a compilation."""

    temperature: jax.Array  # float32; 0 takes the likeliest token
    top_k: jax.Array  # int32; sample from the k likeliest; 0 from all
    top_p: jax.Array  # float32; sample from the fewest that hold this much probability
    key_B: jax.Array  # one random key a row, so that no row depends on the others

    @classmethod
    def create(cls, *, temperature: float, top_k: int, top_p: float, seed: int, rows: int):
        """Checked sampling parameters for a batch of `rows`.

        Raises:
          ValueError: temperature below 0, top_k below 0, or top_p outside (0, 1].
        """
        real, integer, tiny = numbers.Real, numbers.Integral, np.finfo(np.float32).tiny
        for name, value, kind, low, high, must in [
            ("temperature", temperature, real, 0, 1e30, "0 (greedy) or greater, and finite"),
            ("top_k", top_k, integer, 0, 2**31 - 1, "0 (all tokens) or greater, and whole"),
            ("top_p", top_p, real, tiny, 1, "above 0 and at most 1"),
            ("seed", seed, integer, -(2**63), 2**63 - 1, "a whole number of 64 bits"),
        ]:
            if not (isinstance(value, kind) and low <= value <= high):  # nan is in no range
                raise ValueError(f"{name}: got {value!r}, must be {must}")
        return cls(
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(top_k),
            top_p=jnp.float32(top_p),
            key_B=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows)),
        )


def sample(logits_BxV: jax.Array, sampling: Sampling, position: jax.Array) -> jax.Array:
    """A token for each row, int32 `[B]`; `position` counts the tokens that a row has drawn."""

    def draw(logits_BxV: jax.Array) -> jax.Array:
        logits_BxV = logits_BxV / sampling.temperature
        logits_BxV = jax.lax.cond(  # sorting a vocabulary is worth avoiding
            (sampling.top_k > 0) | (sampling.top_p < 1),
            lambda logits: _keep_likeliest(logits, sampling.top_k, sampling.top_p),
            lambda logits: logits,
            logits_BxV,
        )
        key_B = jax.vmap(jax.random.fold_in, (0, None))(sampling.key_B, position)
        return jax.vmap(jax.random.categorical)(key_B, logits_BxV)

    def greedy(logits_BxV: jax.Array) -> jax.Array:
        return logits_BxV.argmax(-1)

    return jax.lax.cond(sampling.temperature > 0, draw, greedy, logits_BxV).astype(jnp.int32)


def _keep_likeliest(logits_BxV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits with all but the top-k, and of those all but the top-p, at minus infinity."""
    ordered_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
    rank_V = jnp.arange(ordered_BxV.shape[-1])
    in_k_V = (rank_V < top_k) | (top_k == 0)
    probability_BxV = jax.nn.softmax(jnp.where(in_k_V, ordered_BxV, -jnp.inf), axis=-1)
    above_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
    kept_BxV = in_k_V & (above_BxV < top_p)
    least_Bx1 = jnp.where(kept_BxV, ordered_BxV, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)


def generate(
    model: Model,
    params: dict[str, Any],
    tokens_BxT: jax.Array | np.ndarray,
    mask_BxT: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
    pad_id: int | None = None,
) -> np.ndarray:
    """Continue a batch of prompts.

    Shapes are rounded up to buckets, and everything else is traced: calls whose prompt lengths and
    budgets fall into the same buckets share one compiled program, if they have as many rows.

    Args:
      model: a model. With `scan_layers` its layers are taken apart here, at every call; do it once
        (`unstack_layers`, as `blocktx.load` does) if there will be many.
      params: its parameters.
      tokens_BxT: int prompts, each at the right end of its row.
      mask_BxT: 1 for the prompt's tokens, 0 for the padding before them. A prompt whose length is
        no multiple of the block length stands at the right end of its blocks, behind padding.
      max_new_tokens: how many tokens to generate, at most.
      temperature, top_k, top_p, seed: see `Sampling`.
      end_id: a row ends with this token; None: none does.
      pad_id: the token that fills a prompt's first block, where the embedder sees it, and a row
        behind its end; None: the model's, which is 0 unless its embedder has an encoder.

    Returns:
      int32 `[B, max_new_tokens]`.

    Raises:
      ValueError: before anything is traced, if a prompt is empty, its mask has holes, or prompt
        and budget exceed the context.
    """
    config = model.config
    pad_id = config.pad_id if pad_id is None else pad_id
    tokens_BxNxK, mask_BxNxK = in_blocks(tokens_BxT, mask_BxT, config, pad_id)
    new_blocks = blocks_that_fit(mask_BxNxK, config, max_new_tokens)
    rows, prompt_blocks = tokens_BxNxK.shape[:2]
    sampling = Sampling.create(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, rows=rows
    )
    if config.scan_layers:
        model, params = separate_layers(model, params)
    prompt_bucket = _bucket(prompt_blocks, config.block_length)
    new_bucket = _bucket(new_blocks, config.block_length)
    extra = ((0, 0), (prompt_bucket - prompt_blocks, 0), (0, 0))
    generated_BxMxK, _ = _generate(
        model,
        params,
        np.pad(tokens_BxNxK, extra),
        np.pad(mask_BxNxK, extra),
        model.create_cache(rows, prompt_bucket + new_bucket),
        sampling,
        new_blocks=jnp.int32(new_blocks),
        new_bucket=new_bucket,
        end_id=jnp.int32(-1 if end_id is None else end_id),
        pad_id=jnp.int32(pad_id),
    )
    # Cut on the host: XLA would compile a slice for every budget.
    return np.asarray(generated_BxMxK).reshape(rows, -1)[:, :max_new_tokens]


def separate_layers(model: Model, params: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The same model with one subtree of parameters a layer, which is what decoding takes."""
    config = dataclasses.replace(model.config, scan_layers=False)
    return model.clone(config=config), unstack_layers(params)


def slots(config: ModelConfig, prompt_tokens: int, new_tokens: int) -> int:
    """Blocks in the cache of a call with such prompts and budget."""
    length = config.block_length
    return sum(_bucket(-(-tokens // length), length) for tokens in (prompt_tokens, new_tokens))


def lower(
    model: Model, params: dict[str, Any], rows: int, prompt_tokens: int, new_tokens: int
) -> jax.stages.Lowered:
    """The program of a call with such prompts and budget, for whoever wants to look at it."""
    length = model.config.block_length
    prompt_bucket, new_bucket = (
        _bucket(-(-tokens // length), length) for tokens in (prompt_tokens, new_tokens)
    )
    options = dict(temperature=0, top_k=0, top_p=1, seed=0, rows=rows)
    tokens_BxNxK = jax.ShapeDtypeStruct((rows, prompt_bucket, length), np.int32)
    return _generate.lower(
        model,
        params,
        tokens_BxNxK,
        jax.ShapeDtypeStruct(tokens_BxNxK.shape, bool),
        jax.eval_shape(lambda: model.create_cache(rows, prompt_bucket + new_bucket)),
        Sampling.create(**options),
        new_blocks=jnp.int32(new_bucket),
        new_bucket=new_bucket,
        end_id=jnp.int32(-1),
        pad_id=jnp.int32(0),
    )


def _bucket(blocks: int, block_length: int) -> int:
    """`blocks` rounded up to a power of two that holds at least the smallest bucket of tokens."""
    return 1 << (max(blocks, _SMALLEST_BUCKET // block_length) - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("model", "new_bucket"), donate_argnames=("cache",))
def _generate(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    cache: Cache,
    sampling: Sampling,
    *,
    new_blocks: jax.Array,
    new_bucket: int,
    end_id: jax.Array,
    pad_id: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Up to `new_blocks` blocks after prompts that end at the right, and the donated cache.

    The loop begins an iteration with the block step of the last block, which the prefill writes too
    but whose context it does not hand over: so no block step is ever made for a block that nobody
    will continue.
    """

    def apply(method: str, *args):
        return model.apply({"params": params}, *args, method=method)

    rows, prompt_blocks, block_length = tokens_BxNxK.shape
    real_BxN = mask_BxNxK.any(-1)
    # Every row's first block goes to slot 0: positions do not depend on the other rows.
    slot_N = jnp.arange(prompt_blocks)
    source_BxN = (slot_N + real_BxN.argmax(1)[:, None]) % prompt_blocks
    tokens_BxNxK = jnp.take_along_axis(tokens_BxNxK, source_BxN[..., None], axis=1)
    mask_BxNxK = jnp.take_along_axis(mask_BxNxK, source_BxN[..., None], axis=1)
    last_B = real_BxN.sum(1) - 1
    slot_S = jnp.arange(prompt_blocks + new_bucket)
    prompt_mask_BxK = jnp.take_along_axis(mask_BxNxK, last_B[:, None, None], axis=1)[:, 0]
    cache = prefill(model, params, tokens_BxNxK, mask_BxNxK, cache)

    def choose(logits_BxV: jax.Array, ended_B: jax.Array, position: jax.Array):
        token_B = jnp.where(ended_B, pad_id, sample(logits_BxV, sampling, position))
        return token_B, ended_B | (token_B == end_id)

    def decode_block(context_BxnD: jax.Array, ended_B: jax.Array, position: jax.Array):
        cache = model.create_token_cache(rows)
        logits_BxV, cache = apply("start_block", context_BxnD, cache)
        token_B, ended_B = choose(logits_BxV, ended_B, position)

        def step(carry, index):
            token_B, ended_B, cache = carry
            logits_BxV, cache = apply("step_token", token_B, index, cache)
            next_B, ended_B = choose(logits_BxV, ended_B, position + index + 1)
            return (next_B, ended_B, cache), next_B

        if block_length == 1:
            return token_B[:, None], ended_B
        (_, ended_B, _), rest_K1xB = jax.lax.scan(
            step, (token_B, ended_B, cache), jnp.arange(block_length - 1)
        )
        return jnp.concatenate([token_B[:, None], rest_K1xB.T], axis=1), ended_B

    def unfinished(state) -> jax.Array:
        index, _, ended_B, _, _ = state
        return (index < new_blocks) & ~ended_B.all()

    def decode_next(state):
        index, block_BxK, ended_B, cache, out_BxMxK = state
        # Only a prompt's block has padding that matters: a row that has ended is not read again.
        mask_BxK = prompt_mask_BxK | (index > 0)
        # Every row's next block goes to the same slot, behind where the longest prompt may end.
        slot = prompt_blocks + index
        seen_BxS = (slot_S < last_B[:, None]) | ((slot_S >= prompt_blocks) & (slot_S < slot))
        context_Bx1xnD, cache = apply(
            "extend", block_BxK[:, None], mask_BxK[:, None], last_B + index, cache, slot, seen_BxS
        )
        block_BxK, ended_B = decode_block(context_Bx1xnD[:, 0], ended_B, index * block_length)
        out_BxMxK = out_BxMxK.at[:, index].set(block_BxK)
        return index + 1, block_BxK, ended_B, cache, out_BxMxK

    state = (
        jnp.int32(0),
        jnp.take_along_axis(tokens_BxNxK, last_B[:, None, None], axis=1)[:, 0],
        jnp.zeros(rows, bool),
        cache,
        jnp.full((rows, new_bucket, block_length), pad_id),
    )
    *_, cache, out_BxMxK = jax.lax.while_loop(unfinished, decode_next, state)
    return out_BxMxK, cache
