"""Sampling parameters: `SamplingConfig` for users, `Sampling` as arrays with a value per row."""

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import flax.struct
import jax
import numpy as np

LEAST_TEMPERATURE = 1e-6  # of rows that are sampled; smaller ones may be 0 in float32
_STOP_TOKENS = 8  # per row, at least; more are rounded up to a power of two


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters of a row.

    Raises:
      ValueError: a value is outside the range that the message names.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens that hold this much probability; 1: all
    min_p: float = 0.0  # keep tokens with this share of the largest probability; 0: all

    def __post_init__(self):
        real, integer, tiny = numbers.Real, numbers.Integral, float(np.finfo(np.float32).tiny)
        for name, kind, low, high, must in [
            ("temperature", real, 0, 1e30, "0 (greedy) or greater, and finite"),
            ("top_k", integer, 0, 2**31 - 1, "0 (all tokens) or greater, and whole"),
            ("top_p", real, tiny, 1, "above 0 and at most 1"),
            ("min_p", real, 0, 1, "between 0 (all tokens) and 1"),
        ]:
            value = to_python(getattr(self, name))
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not (number and low <= value <= high):  # also refuses nan
                raise ValueError(f"{name}: got {value!r}, must be {must}")
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        sampling: "SamplingConfig | Sequence[SamplingConfig] | None",
        options: SamplingOptions,
    ) -> "SamplingConfig | Sequence[SamplingConfig]":
        """Return `sampling` if it is given, else the configuration with these options.

        Raises:
          ValueError: both are given, or an option is out of range.
          TypeError: an option is unknown.
        """
        if sampling is None:
            return cls(**options)
        if options:
            raise ValueError(f"sampling: got {sampling!r} and also {', '.join(options)}; use one")
        return sampling


@flax.struct.dataclass
class Uses:
    """Bool scalars: the sampler steps that any row needs. The others are skipped for all rows."""

    draw: Any  # False: all rows are greedy
    top_k: Any
    top_p: Any
    min_p: Any


@flax.struct.dataclass
class Sampling:
    """Sampling parameters and stop tokens of each row. All are traced: no value recompiles."""

    temperature_B: Any  # float32
    top_k_B: Any  # int32
    top_p_B: Any  # float32
    min_p_B: Any  # float32
    seed_Bx2: Any  # uint32; a row's draws depend on its seed and its position only
    stop_BxX: Any  # int32; tokens that end a row, filled up with -1
    uses: Uses

    @classmethod
    def create(
        cls,
        config: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        rows: int,
        seed: int | Iterable[int] = 0,
        stop: Iterable[int] = (),
    ) -> "Sampling":
        """Return checked parameters for `rows` rows, as NumPy arrays.

        Args:
          config: one for all rows, or one per row.
          rows: number of rows.
          seed: one integer, from which each row derives its own seed, or one per row. A row with
            its own seed draws what it would draw alone.
          stop: tokens that end a row.

        Raises:
          ValueError: a parameter has the wrong type, range or number of values.
        """
        return cls.from_rows(
            per_row(config, rows),
            seed_Bx2=seed_words(seed, rows),
            stops=[check_stop_tokens(stop)] * rows,
        )

    @classmethod
    def from_rows(
        cls,
        configs: Sequence[SamplingConfig],
        *,
        seed_Bx2: np.ndarray,
        stops: Sequence[Sequence[int]],
    ) -> "Sampling":
        """Return the parameters of rows that differ in everything, as NumPy arrays."""
        most = max(map(len, stops), default=0)
        width = max(_STOP_TOKENS, 1 << max(most - 1, 0).bit_length())
        return cls(
            temperature_B=np.array(
                [c.temperature and max(c.temperature, LEAST_TEMPERATURE) for c in configs],
                np.float32,
            ),
            top_k_B=np.array([c.top_k for c in configs], np.int32),
            top_p_B=np.array([c.top_p for c in configs], np.float32),
            min_p_B=np.array([c.min_p for c in configs], np.float32),
            seed_Bx2=seed_Bx2,
            stop_BxX=np.array([[*s, *[-1] * (width - len(s))] for s in stops], np.int32),
            uses=Uses(
                draw=np.bool_(any(c.temperature > 0 for c in configs)),
                top_k=np.bool_(any(c.top_k > 0 for c in configs)),
                top_p=np.bool_(any(c.top_p < 1 for c in configs)),
                min_p=np.bool_(any(c.min_p > 0 for c in configs)),
            ),
        )

    def padded(self, rows: int) -> "Sampling":
        """Return the parameters with zeros for more rows, `rows` altogether."""

        def pad(x_B: np.ndarray) -> np.ndarray:
            return np.pad(x_B, [(0, rows - len(x_B)), *[(0, 0)] * (x_B.ndim - 1)])

        return jax.tree.map(lambda x: pad(x) if x.ndim else x, self)


def to_python(value: Any) -> Any:
    """Return NumPy and JAX scalars and arrays as Python numbers and lists, others unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def per_row(
    config: SamplingConfig | Sequence[SamplingConfig] | None, rows: int
) -> list[SamplingConfig]:
    """Return a configuration for each row; None: the default one.

    Raises:
      ValueError: there is not one, or one per row.
    """
    configs = [config or SamplingConfig()] * rows if not isinstance(config, Sequence) else config
    if len(configs) != rows or not all(isinstance(c, SamplingConfig) for c in configs):
        raise ValueError(
            f"sampling: got {config!r}, must be one SamplingConfig or one per row ({rows})"
        )
    return list(configs)


def check_stop_tokens(stop: Iterable[int]) -> list[int]:
    """Return stop tokens as a list.

    Raises:
      ValueError: an item is not a token id.
    """
    stop = list(to_python(stop))
    for token in stop:
        if not (isinstance(token, numbers.Integral) and 0 <= token < 2**31):
            raise ValueError(f"stop: got {token!r}, must be a token, 0 or greater")
    return stop


def seed_words(seed: int | Iterable[int], rows: int) -> np.ndarray:
    """Return the seeds of `rows` rows as uint32 `[B, 2]`; see `Sampling.create`.

    Raises:
      ValueError: a seed is negative or not an integer, or there is another number of them.
    """
    seed = to_python(seed)
    if isinstance(seed, numbers.Integral):
        pairs = [(seed, row) for row in range(rows)]
    elif isinstance(seed, Iterable) and len(seeds := [to_python(s) for s in seed]) == rows:
        pairs = [(seed, 0) for seed in seeds]
    else:
        raise ValueError(f"seed: got {seed!r}, must be one whole number or one a row ({rows})")
    for value, _ in pairs:
        if not (isinstance(value, numbers.Integral) and value >= 0):
            raise ValueError(f"seed: got {value!r}, must be a whole number, 0 or greater")
    words = [np.random.SeedSequence((int(a), b)).generate_state(2) for a, b in pairs]
    return np.array(words, np.uint32).reshape(rows, 2)
