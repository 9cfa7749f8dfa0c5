"""Token ids of prompts to texts, as one batch or continuously."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
from jax.sharding import Mesh

from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.generate import generate_blocks
from blocktx.decode.prompts import Placement, bucket
from blocktx.decode.sampling import SamplingConfig, seed_words
from blocktx.decode.stream import Continuation
from blocktx.model import Model
from blocktx.progress_bar import ProgressBar


class Settings(TypedDict):
    """Checked options, named as those of `generate_blocks`."""

    max_new_tokens: np.ndarray
    sampling: Sequence[SamplingConfig]
    seed: int | Iterable[int]
    stop: list[int]
    placement: Placement
    return_logprobs: bool


def decode_batch(
    model: Model,
    params: dict[str, Any],
    mesh: Mesh | None,
    pad_id: int,
    ids: list[list[int]],
    texts: list[Continuation],
    settings: Settings,
    **every: int,
) -> Iterator[dict[int, str]]:
    """Decode prompts as one batch; yield new text by prompt, until no text can grow.

    Raises:
      ValueError: at the call; see `generate_blocks`.
    """
    longest = max(map(len, ids))
    tokens_BxT = np.array([[pad_id] * (longest - len(row)) + row for row in ids])
    mask_BxT = np.arange(longest)[::-1] < np.array([[len(row)] for row in ids])
    options = {"pad_id": pad_id, "mesh": mesh, **settings, **every}
    results = generate_blocks(model, params, tokens_BxT, mask_BxT, **options)

    def follow() -> Iterator[dict[int, str]]:
        known_B = np.zeros(len(ids), int)
        for result in results:
            parts = {}
            for row, text in enumerate(texts):
                new = slice(known_B[row], result.count_B[row])
                reason = "stop" if result.ended_B[row] else "length"
                parts[row] = text.add(
                    result.tokens_BxM[row, new].tolist(),
                    [] if result.logprobs_BxM is None else result.logprobs_BxM[row, new].tolist(),
                    reason if result.finished_B[row] else None,
                )
            yield parts
            known_B = result.count_B
            if all(text.finish_reason for text in texts):
                return

    return follow()


def decode_continuously(
    model: Model,
    params: dict[str, Any],
    mesh: Mesh | None,
    pad_id: int,
    ids: list[list[int]],
    texts: list[Continuation],
    settings: Settings,
    rows: int,
) -> Iterator[dict[int, str]]:
    """Decode prompts through a fixed number of rows; yield new text by prompt, and show progress.

    Raises:
      ValueError: at the call; see `ContinuousDecoder.request`.
    """
    config, budget_P = model.config, settings["max_new_tokens"].tolist()
    longest = max(len(row) + new for row, new in zip(ids, budget_P, strict=True))
    blocks = bucket(-(-longest // config.block_length) + 1, config.block_length, config.blocks)
    decoder = ContinuousDecoder(
        model,
        params,
        rows=rows,
        context=blocks * config.block_length,
        placement=settings["placement"],
        pad_id=pad_id,
        mesh=mesh,
    )
    seed_Px2 = seed_words(settings["seed"], len(ids))
    requests = {
        decoder.request(
            ids[index],
            max_new_tokens=budget_P[index],
            sampling=settings["sampling"][index],
            seed_2=seed_Px2[index],
            stop=settings["stop"],
            score=int(settings["return_logprobs"]),
            row=index,
        ): index
        for index in range(len(ids))
    }

    def follow() -> Iterator[dict[int, str]]:
        with ProgressBar(total=len(ids), desc="generating", unit=" prompts") as bar:
            for updates in decoder.run(requests):
                parts = {}
                for request, tokens, logprobs, _, reason in updates:
                    index = requests[request]
                    parts[index] = texts[index].add(tokens, logprobs, reason)
                    if texts[index].finish_reason:
                        decoder.cancel(request)
                        bar.update()
                yield parts

    return follow()
