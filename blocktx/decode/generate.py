"""Batches of prompts continued: everything around the jitted loop of `blocktx.decode.loop`."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from blocktx.decode.loop import DecodeState, advance, prefill
from blocktx.decode.prompts import Placement, Prompts, place_prompts
from blocktx.decode.sampling import Sampling
from blocktx.model import Model, for_decoding
from blocktx.parallel import MESH_AXES, batch_parts, batch_sharding

_ALL = 2**31 - 1  # blocks


class Generated(NamedTuple):
    """What was drawn so far, on the host. M is the largest budget."""

    tokens_BxM: np.ndarray  # int32; padding from `count_B` on
    logprobs_BxM: np.ndarray | None  # float32; 0 from `count_B` on
    count_B: np.ndarray  # tokens of each row, its stop token included
    ended_B: np.ndarray  # whether a stop token is its last
    finished_B: np.ndarray  # whether there will be no more


def generate(
    model: Model,
    params: dict[str, Any],
    tokens_BxT: jax.Array | np.ndarray,
    mask_BxT: jax.Array | np.ndarray,
    *,
    return_logprobs: bool = False,
    **options,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Continue a batch of prompts: `generate_blocks` at once.

    Returns:
      int32 `[B, M]`, M the largest budget: each row up to its stop token or budget, then padding.
      With `return_logprobs` also their log-probabilities, float32 `[B, M]`, 0 for that padding.
    """
    every = generate_blocks(
        model, params, tokens_BxT, mask_BxT, return_logprobs=return_logprobs, **options
    )
    (last,) = every
    return (last.tokens_BxM, last.logprobs_BxM) if return_logprobs else last.tokens_BxM


def generate_blocks(
    model: Model,
    params: dict[str, Any],
    tokens_BxT: jax.Array | np.ndarray,
    mask_BxT: jax.Array | np.ndarray,
    *,
    max_new_tokens: int | Iterable[int],
    every: int = _ALL,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Iterable[int] = 0,
    stop: Iterable[int] = (),
    placement: Placement = "pad",
    pad_id: int | None = None,
    return_logprobs: bool = False,
) -> Iterator[Generated]:
    """Continue a batch of prompts, and tell what there is after every few blocks.

    Shapes are rounded up to buckets, and everything else is traced: calls whose rows, prompt
    lengths and budgets fall into the same buckets share their compiled programs.

    Args:
      model: a model. With `scan_layers` its layers are taken apart here, at every call; do it once
        (`for_decoding`, as `blocktx.load` does) if there will be many.
      params: its parameters; where they are spread over a mesh, so is the work.
      tokens_BxT: int prompts, each at the right end of its row.
      mask_BxT: 1 for the prompt's tokens, 0 for the padding before them.
      max_new_tokens: how many tokens to generate, at most: one number, or one a row.
      every: blocks between two results; the rows' last one comes in any case.
      temperature, top_k, top_p, min_p, seed: see `Sampling`.
      stop: tokens that end a row.
      placement: how prompts that are not whole blocks are placed, see `blocktx.decode.prompts`.
      pad_id: the token that fills a prompt's first block, where the embedder sees it, and a row
        behind its end; None: the model's, which is 0 unless its embedder has an encoder.
      return_logprobs: whether to compute log-probabilities, in a program of its own. They are the
        model's: at temperature 1, of all tokens.

    Raises:
      ValueError: at the call and before anything is traced, if a prompt is empty, its mask has
        holes, prompt and budget exceed the context, or an option is out of its range.
    """
    config, mesh = model.config, _mesh(params)
    if not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(params)):
        raise ValueError(
            "params: they are spread over several processes, and text is generated in one; load "
            "them onto devices of this process, as blocktx.load does"
        )
    pad_id = config.pad_id if pad_id is None else pad_id
    if every < 1:
        raise ValueError(f"every: got {every!r}, must be 1 or greater")
    prompts = place_prompts(
        tokens_BxT,
        mask_BxT,
        config,
        max_new_tokens=max_new_tokens,
        placement=placement,
        pad_id=pad_id,
        parts=batch_parts(mesh) if mesh else 1,
    )
    rows = len(tokens_BxT)
    sampling = Sampling.create(
        rows=rows,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    seeds = ((0, len(prompts.end_B) - rows), (0, 0))
    sampling = sampling.replace(seed_Bx2=np.pad(sampling.seed_Bx2, seeds))
    if config.scan_layers:
        model, params = for_decoding(model, params)

    def run() -> Iterator[Generated]:
        with _set(mesh):
            placed = jax.device_put(prompts, batch_sharding(mesh)) if mesh else prompts
            state = prefill(model, params, placed, return_logprobs)
        while True:
            with _set(mesh):  # not while the caller has what is yielded
                state = advance(model, params, state, sampling, np.int32(every), np.int32(pad_id))
            generated = _read(state, prompts, rows, pad_id)
            yield generated
            if generated.finished_B.all():
                return

    return run()


def _mesh(params: dict[str, Any]) -> Mesh | None:
    """The mesh, of the kind that `blocktx.parallel` makes, that parameters are spread over."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    known = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == MESH_AXES
    return sharding.mesh if known else None


def _set(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def _read(state: DecodeState, prompts: Prompts, rows: int, pad_id: int) -> Generated:
    """What was drawn, cut out on the host: XLA would compile a slice for every length."""
    width = int((prompts.end_B - prompts.begin_B).max())
    tokens_BxSxK, logprobs_BxSxK, length_B, end_B, ended_B = (
        None if x is None else np.asarray(x)[:rows]
        for x in (
            state.tokens_BxSxK,
            state.logprobs_BxSxK,
            state.length_B,
            state.end_B,
            state.ended_B,
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
