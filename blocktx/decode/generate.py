"""Batches of prompts continued: host code around the jitted functions of `blocktx.decode.loop`."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from blocktx.decode.loop import DecodeState, decode_blocks, prefill
from blocktx.decode.prompts import Placement, Prompts, layout_prompts
from blocktx.decode.sampling import Sampling, SamplingConfig, SamplingOptions
from blocktx.model import Model, for_decoding
from blocktx.parallel import batch_parts, batch_sharding

_ALL = 2**31 - 1  # blocks


class Generated(NamedTuple):
    """Tokens drawn so far, on the host. M is the largest budget."""

    tokens_BxM: np.ndarray  # int32; padding from `count_B` on
    logprobs_BxM: np.ndarray | None  # float32; 0 from `count_B` on
    count_B: np.ndarray  # tokens of each row, its stop token included
    ended_B: np.ndarray  # whether the last of them is a stop token
    finished_B: np.ndarray  # whether there will be no more


def generate(
    model: Model,
    params: dict[str, Any],
    tokens_BxT: jax.Array | np.ndarray,
    mask_BxT: jax.Array | np.ndarray,
    *,
    return_logprobs: bool = False,
    **options: Any,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Continue a batch of prompts, all blocks in one device call.

    The arguments are those of `generate_blocks`, except `every`.

    Returns:
      int32 `[B, M]`, M the largest budget: each row up to its stop token or budget, then padding.
      With `return_logprobs` also their log-probabilities, float32 `[B, M]`, 0 for padding.
    """
    results = generate_blocks(
        model, params, tokens_BxT, mask_BxT, return_logprobs=return_logprobs, **options
    )
    (last,) = results
    return (last.tokens_BxM, last.logprobs_BxM) if return_logprobs else last.tokens_BxM


def generate_blocks(
    model: Model,
    params: dict[str, Any],
    tokens_BxT: jax.Array | np.ndarray,
    mask_BxT: jax.Array | np.ndarray,
    *,
    max_new_tokens: int | Iterable[int],
    every: int = _ALL,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    seed: int | Iterable[int] = 0,
    stop: Iterable[int] = (),
    placement: Placement = "pad",
    pad_id: int | None = None,
    return_logprobs: bool = False,
    mesh: Mesh | None = None,
    **options: Unpack[SamplingOptions],
) -> Iterator[Generated]:
    """Continue a batch of prompts, and yield the tokens so far after every few blocks.

    Shapes are rounded up to buckets and all other arguments are traced: calls whose rows, prompt
    lengths and budgets fall into the same buckets share their compiled programs.

    Args:
      model: a model. With `scan_layers` its parameters are unstacked at every call; call
        `blocktx.model.for_decoding` once if there will be many, as `blocktx.load` does.
      params: its parameters.
      tokens_BxT: int prompts, each at the right end of its row.
      mask_BxT: 1 for the prompt's tokens, 0 for the padding before them.
      max_new_tokens: largest number of tokens to generate: one number, or one per row.
      every: blocks between two results. The last result comes when all rows have finished.
      sampling: one configuration, or one per row.
      seed: see `Sampling.create`.
      stop: tokens that end a row.
      placement: placement of prompts that are not whole blocks, see `blocktx.decode.prompts`.
      pad_id: the token that fills a prompt's first block, where the embedder sees it, and a row
        after its end. None: the model's, which is 0 unless its embedder has an encoder.
      return_logprobs: whether to compute log-probabilities, in a program of its own. They are the
        model's: at temperature 1, unfiltered.
      mesh: shards rows, cache and activations. Parameters must be on the same mesh. None: the
        arrays follow the parameters, without constraints.
      **options: fields of `SamplingConfig`, in place of `sampling`.

    Raises:
      ValueError: at the call, before tracing: a prompt is empty, its mask has holes, prompt and
        budget exceed the context, or an option is out of range.
    """
    config = model.config
    if not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(params)):
        raise ValueError(
            "params: they are sharded over several processes, but generation runs in one; load "
            "them onto devices of this process, as blocktx.load does"
        )
    pad_id = config.pad_id if pad_id is None else pad_id
    if every < 1:
        raise ValueError(f"every: got {every!r}, must be 1 or greater")
    prompts = layout_prompts(
        tokens_BxT,
        mask_BxT,
        config,
        max_new_tokens=max_new_tokens,
        placement=placement,
        pad_id=pad_id,
        parts=batch_parts(mesh) if mesh else 1,
    )
    rows, batch = len(tokens_BxT), len(prompts.end_B)
    parameters = Sampling.create(
        SamplingConfig.of(sampling, options), rows=rows, seed=seed, stop=stop
    ).padded(batch)
    if config.scan_layers:
        model, params = for_decoding(model, params)

    def run() -> Iterator[Generated]:
        with use_mesh(mesh):
            placed = jax.device_put(prompts, batch_sharding(mesh)) if mesh else prompts
            state = prefill(model, params, placed, return_logprobs)
        while True:
            with use_mesh(mesh):  # not set while the caller holds the result
                state = decode_blocks(
                    model, params, state, parameters, np.int32(every), np.int32(pad_id)
                )
            generated = _read(state, prompts, rows, pad_id)
            yield generated
            if generated.finished_B.all():
                return

    return run()


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Return `jax.set_mesh(mesh)`, or a context that does nothing."""
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def _read(state: DecodeState, prompts: Prompts, rows: int, pad_id: int) -> Generated:
    """Return the drawn tokens, cut out on the host: XLA would compile a slice for every length."""
    width = int((prompts.end_B - prompts.begin_B).max())
    tokens_BxSxK, logprobs_BxSxK, length_B, end_B, ended_B = (
        None if x is None else np.asarray(x)[:rows]
        for x in (
            state.tokens_BxSxK,
            state.logprobs_BxSxK,
            state.rows.length_B,
            state.rows.end_B,
            state.rows.ended_B,
        )
    )
    begin_B, known_B = prompts.begin_B[:rows], length_B * tokens_BxSxK.shape[2]
    count_B = np.maximum(np.minimum(known_B, end_B) - begin_B, 0)
    place_BxM = begin_B[:, None] + np.arange(width)
    drawn_BxM = np.arange(width) < count_B[:, None]

    def cut(x_BxSxK: np.ndarray, filler: float) -> np.ndarray:
        x_BxT = x_BxSxK.reshape(rows, -1)
        place = np.minimum(place_BxM, x_BxT.shape[1] - 1)
        return np.where(
            drawn_BxM, np.take_along_axis(x_BxT, place, axis=1), x_BxT.dtype.type(filler)
        )

    return Generated(
        tokens_BxM=cut(tokens_BxSxK, pad_id),
        logprobs_BxM=None if logprobs_BxSxK is None else cut(logprobs_BxSxK, 0),
        count_B=count_B,
        ended_B=ended_B,
        finished_B=known_B >= end_B,
    )
