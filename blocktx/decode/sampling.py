"""How a token is chosen from logits: parameters, all of them traced, and the choice."""

import numbers
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 128  # tokens that are summed before the others


_SMALLEST_STOP = 8  # stop tokens that cost no compilation


@flax.struct.dataclass
class Sampling:
    """How tokens are chosen and which of them end a row; no value costs a compilation.

    What is kept to sample from are the tokens that pass top-k, of those again, by the share of
    their common probability, the ones that pass top-p, and of those the ones that pass min-p.
    """

    temperature: Any  # float32; 0 takes the likeliest token
    top_k: Any  # int32; the k likeliest; 0: all
    top_p: Any  # float32; the fewest that hold this much probability
    min_p: Any  # float32; those that have this share of the likeliest one's probability
    seed_Bx2: Any  # uint32; a row's draws follow from its seed and its position alone
    stop_X: Any  # int32; tokens that end a row, and -1

    @classmethod
    def create(
        cls,
        *,
        rows: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Iterable[int] = 0,
        stop: Iterable[int] = (),
    ) -> "Sampling":
        """Checked parameters for `rows` rows, as NumPy arrays.

        A single seed gives each row draws of its own. Of several, one a row, each gives its row the
        draws that it would have alone.

        Raises:
          ValueError: a parameter is outside the range that the message names.
        """
        real, integer, tiny = numbers.Real, numbers.Integral, np.finfo(np.float32).tiny
        for name, value, kind, low, high, must in [
            ("temperature", temperature, real, 0, 1e30, "0 (greedy) or greater, and finite"),
            ("top_k", top_k, integer, 0, 2**31 - 1, "0 (all tokens) or greater, and whole"),
            ("top_p", top_p, real, tiny, 1, "above 0 and at most 1"),
            ("min_p", min_p, real, 0, 1, "between 0 (all tokens) and 1"),
        ]:
            if not (isinstance(value, kind) and low <= value <= high):  # nan is in no range
                raise ValueError(f"{name}: got {value!r}, must be {must}")
        stop = list(stop)
        for token in stop:
            if not (isinstance(token, integer) and 0 <= token < 2**31):
                raise ValueError(f"stop: got {token!r}, must be a token, 0 or greater")
        width = max(_SMALLEST_STOP, 1 << max(len(stop) - 1, 0).bit_length())
        return cls(
            temperature=np.float32(temperature),
            top_k=np.int32(top_k),
            top_p=np.float32(top_p),
            min_p=np.float32(min_p),
            seed_Bx2=_seed_words(seed, rows),
            stop_X=np.array(stop + [-1] * (width - len(stop)), np.int32),
        )


def _seed_words(seed: int | Iterable[int], rows: int) -> np.ndarray:
    if isinstance(seed, numbers.Integral):
        pairs = [(seed, row) for row in range(rows)]
    elif isinstance(seed, Iterable) and len(seeds := list(seed)) == rows:
        pairs = [(seed, 0) for seed in seeds]
    else:
        raise ValueError(f"seed: got {seed!r}, must be one whole number or one a row ({rows})")
    for value, _ in pairs:
        if not (isinstance(value, numbers.Integral) and value >= 0):
            raise ValueError(f"seed: got {value!r}, must be a whole number, 0 or greater")
    words = [np.random.SeedSequence((int(a), b)).generate_state(2) for a, b in pairs]
    return np.array(words, np.uint32)


def sample(
    logits_BxV: jax.Array, sampling: Sampling, position_B: jax.Array, platform: str
) -> jax.Array:
    """A token for each row, int32 `[B]`; `position_B` counts the tokens that a row has drawn.

    A CPU takes other formulations of the same choice: its argmax, and its random noise for every
    token, each take longer than the classifier takes to make the logits.
    """
    cpu = platform == "cpu"
    likeliest, draw = (_likeliest, _invert_all) if cpu else (jnp.argmax, jax.random.categorical)

    def draw_B(logits_BxV: jax.Array) -> jax.Array:
        def one(logits_V: jax.Array, seed_2: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])
            return draw(jax.random.fold_in(key, position), _kept(logits_V, sampling))

        return jax.vmap(one)(logits_BxV, sampling.seed_Bx2, position_B).astype(jnp.int32)

    def likeliest_B(logits_BxV: jax.Array) -> jax.Array:
        return jax.vmap(likeliest)(logits_BxV).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw_B, likeliest_B, logits_BxV)


def log_probability(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Float32 `[B]`: what the model, at temperature 1 and of all tokens, gives each row's token."""
    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BxV, axis=-1)


def _kept(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits at the temperature, minus infinity for tokens that are not kept.

    Each criterion looks through the vocabulary, which is worth avoiding where nobody asked for it.
    """
    scaled_V = logits_V / jnp.maximum(sampling.temperature, 1e-6)

    def by_top_k(scaled_V: jax.Array) -> jax.Array:
        order_V = _ordered(logits_V)  # a high temperature leaves no differences between them
        least = _threshold(order_V, jnp.ones(order_V.shape, jnp.int32), sampling.top_k)
        return jnp.where(order_V >= least, scaled_V, -jnp.inf)

    def by_top_p(scaled_V: jax.Array) -> jax.Array:
        order_V, weight_V = _ordered(scaled_V), jnp.exp(scaled_V - scaled_V.max())
        least = _threshold(order_V, weight_V, sampling.top_p * _sum(weight_V))
        return jnp.where(order_V >= least, scaled_V, -jnp.inf)

    def by_min_p(scaled_V: jax.Array) -> jax.Array:
        least = scaled_V.max() + jnp.log(sampling.min_p)
        return jnp.where(scaled_V >= least, scaled_V, -jnp.inf)

    for wanted, keep in [
        (sampling.top_k > 0, by_top_k),
        (sampling.top_p < 1, by_top_p),
        (sampling.min_p > 0, by_min_p),
    ]:
        scaled_V = jax.lax.cond(wanted, keep, lambda scaled_V: scaled_V, scaled_V)
    return scaled_V


def _likeliest(logits_V: jax.Array) -> jax.Array:
    """The first of the largest, in two passes that vectorise on a CPU."""
    size = logits_V.size
    return jnp.where(logits_V == logits_V.max(), jnp.arange(size), size - 1).min()


def _invert_all(key: jax.Array, logits_V: jax.Array) -> jax.Array:
    """A draw by inverting the cumulative distribution at random.

    Among sums of chunks first, then inside one: a sum along a whole vocabulary is slow.
    """
    uniform_2 = jax.random.uniform(key, (2,))
    weight_IxJ = _chunks(jnp.exp(logits_V - logits_V.max()))
    chunk = _invert(weight_IxJ.sum(1), uniform_2[0])
    return chunk * _CHUNK + _invert(weight_IxJ[chunk], uniform_2[1])


def _invert(weight_I: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index, of a weight that is not 0, where the cumulative sum passes a share in [0, 1)."""
    sum_I = jnp.cumsum(weight_I)
    index = (sum_I <= uniform * sum_I[-1]).sum()
    # Rounding may put a share of nearly 1 behind the last weight.
    last = jnp.where(weight_I > 0, jnp.arange(weight_I.size), 0).max()
    return jnp.minimum(index, last).astype(jnp.int32)


def _chunks(x_V: jax.Array) -> jax.Array:
    return jnp.pad(x_V, (0, -x_V.size % _CHUNK)).reshape(-1, _CHUNK)


def _sum(x_V: jax.Array) -> jax.Array:
    return _chunks(x_V).sum(0).sum()


def _ordered(x_V: jax.Array) -> jax.Array:
    """Uint32 that compare as the floats do."""
    bits_V = jax.lax.bitcast_convert_type(x_V, jnp.uint32)
    return jnp.where(bits_V >> 31, ~bits_V, bits_V | jnp.uint32(1 << 31))


def _threshold(order_V: jax.Array, amount_V: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest number such that what is not below it in `order_V` has the wanted amount.

    Found bit by bit: 32 sums take a tenth of the time of sorting a vocabulary, on a CPU.
    """

    def with_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = _sum(jnp.where(order_V >= candidate, amount_V, 0)) >= wanted
        return jnp.where(enough, candidate, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.uint32(0))
