"""The sampler: the choice of a token from logits.

Filters apply in this order: top-k; top-p on the renormalised rest; min-p.

A GPU's host reads the predicate of every `lax.cond` before it starts what follows. So there is one
if all rows are greedy, and one more if some are not but none is filtered.
"""

import jax
import jax.numpy as jnp

from blocktx.decode.sampling import LEAST_TEMPERATURE, Sampling

_CHUNK = 128  # tokens that are summed before the others


def sample(
    logits_BxV: jax.Array, sampling: Sampling, position_B: jax.Array, formulation: str
) -> jax.Array:
    """Return a token for each row, int32 `[B]`.

    A draw is keyed by the row's seed and `position_B`, the number of tokens that the row has drawn.
    It does not depend on the row's index or on other rows.

    `formulation` is that of `Formulations.sampler`. On a CPU, JAX's argmax and categorical each
    take longer than the classifier, so other formulations of the same choice are used there.
    """
    chunked = formulation == "chunked"
    argmax, categorical = (
        (_argmax, _categorical) if chunked else (jnp.argmax, jax.random.categorical)
    )

    def greedy(logits_BxV: jax.Array) -> jax.Array:
        return jax.vmap(argmax)(logits_BxV).astype(jnp.int32)

    def draw(logits_BxV: jax.Array) -> jax.Array:
        def one(logits_V: jax.Array, seed_2: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])
            return categorical(jax.random.fold_in(key, position), logits_V)

        kept_BxV = _filter(logits_BxV, sampling)
        drawn_B = jax.vmap(one)(kept_BxV, sampling.seed_Bx2, position_B).astype(jnp.int32)
        return jnp.where(sampling.temperature_B > 0, drawn_B, greedy(logits_BxV))

    return jax.lax.cond(sampling.uses.draw, draw, greedy, logits_BxV)


def log_probability(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Return the model's log-probability of each row's token, unfiltered: float32 `[B]`."""
    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BxV, axis=-1)


def _filter(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Return logits at the rows' temperatures, minus infinity for tokens that are filtered out.

    Each filter scans the vocabulary, so it runs under `lax.cond`. It leaves rows that do not use it
    unchanged, bit by bit.
    """
    scaled_BxV = logits_BxV / jnp.maximum(sampling.temperature_B, LEAST_TEMPERATURE)[:, None]

    def by_top_k(scaled_V: jax.Array, logits_V: jax.Array, top_k: jax.Array) -> jax.Array:
        order_V = _ordered(logits_V)  # unscaled: a high temperature rounds differences away
        least = _threshold(order_V, jnp.ones(order_V.shape, jnp.int32), top_k)
        return jnp.where((order_V >= least) | (top_k == 0), scaled_V, -jnp.inf)

    def by_top_p(scaled_V: jax.Array, logits_V: jax.Array, top_p: jax.Array) -> jax.Array:
        del logits_V
        order_V, weight_V = _ordered(scaled_V), jnp.exp(scaled_V - scaled_V.max())
        least = _threshold(order_V, weight_V, top_p * _sum(weight_V))
        return jnp.where((order_V >= least) | (top_p >= 1), scaled_V, -jnp.inf)

    def by_min_p(scaled_V: jax.Array, logits_V: jax.Array, min_p: jax.Array) -> jax.Array:
        del logits_V
        return jnp.where(scaled_V >= scaled_V.max() + jnp.log(min_p), scaled_V, -jnp.inf)

    uses = sampling.uses

    def by_all(scaled_BxV: jax.Array) -> jax.Array:
        for used, keep, parameter_B in [
            (uses.top_k, by_top_k, sampling.top_k_B),
            (uses.top_p, by_top_p, sampling.top_p_B),
            (uses.min_p, by_min_p, sampling.min_p_B),
        ]:
            arguments = (scaled_BxV, logits_BxV, parameter_B)
            scaled_BxV = jax.lax.cond(used, jax.vmap(keep), lambda scaled, *_: scaled, *arguments)
        return scaled_BxV

    return jax.lax.cond(uses.top_k | uses.top_p | uses.min_p, by_all, lambda x: x, scaled_BxV)


def _argmax(logits_V: jax.Array) -> jax.Array:
    """Return the first index of the maximum, in two passes that vectorise on a CPU."""
    size = logits_V.size
    return jnp.where(logits_V == logits_V.max(), jnp.arange(size), size - 1).min()


def _categorical(key: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Draw by inverting the cumulative distribution, over sums of chunks, then within a chunk.

    One cumulative sum over a whole vocabulary is slow.
    """
    uniform_2 = jax.random.uniform(key, (2,), jnp.float32)
    weight_IxJ = _chunks(jnp.exp(logits_V - logits_V.max()))
    chunk = _invert(weight_IxJ.sum(1), uniform_2[0])
    return chunk * _CHUNK + _invert(weight_IxJ[chunk], uniform_2[1])


def _invert(weight_I: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return the index, of nonzero weight, where the cumulative sum passes a share in [0, 1)."""
    sum_I = jnp.cumsum(weight_I)
    index = (sum_I <= uniform * sum_I[-1]).sum()
    # Rounding may put a share close to 1 past the last weight.
    last = jnp.where(weight_I > 0, jnp.arange(weight_I.size), 0).max()
    return jnp.minimum(index, last).astype(jnp.int32)


def _chunks(x_V: jax.Array) -> jax.Array:
    return jnp.pad(x_V, (0, -x_V.size % _CHUNK)).reshape(-1, _CHUNK)


def _sum(x_V: jax.Array) -> jax.Array:
    return _chunks(x_V).sum(0).sum()


def _ordered(x_V: jax.Array) -> jax.Array:
    """Return uint32 that compare as the floats do."""
    bits_V = jax.lax.bitcast_convert_type(x_V, jnp.uint32)
    return jnp.where(bits_V >> 31, ~bits_V, bits_V | jnp.uint32(1 << 31))


def _threshold(order_V: jax.Array, amount_V: jax.Array, wanted: jax.Array) -> jax.Array:
    """Return the largest threshold for which `amount_V[order_V >= threshold]` sums to `wanted`.

    A search over its bits: on a CPU, 32 sums take a tenth of the time of sorting a vocabulary.
    """

    def with_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = _sum(jnp.where(order_V >= candidate, amount_V, 0)) >= wanted
        return jnp.where(enough, candidate, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.uint32(0))
