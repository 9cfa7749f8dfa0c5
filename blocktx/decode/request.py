"""Requests of continuous decoding, and their parts of the arrays that go to and from the device."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from blocktx.decode.prompts import Prompts
from blocktx.decode.rows import Outputs
from blocktx.decode.sampling import Sampling, SamplingConfig


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt with its options; made by `ContinuousDecoder.request`.

    Attributes:
      prompt: the prompt's layout, one row.
      sampling, seed_2, stop: sampling parameters, the words of the seed, stop tokens.
      score: 0: no log-probabilities; 1: those of drawn tokens; 2: also the most likely tokens.
      row: the row that decodes it; None: waiting or finished.
      known: index of the first token that is not known to the host.
      length: whole blocks before the call in flight.
    """

    prompt: Prompts
    sampling: SamplingConfig
    seed_2: np.ndarray
    stop: Sequence[int]
    score: int
    row: int | None = None
    known: int = 0
    length: int = 0

    def __post_init__(self):
        self.known, self.length = int(self.prompt.begin_B[0]), int(self.prompt.length_B[0])

    @property
    def prompt_blocks(self) -> int:
        """The bucket of the prompt."""
        return self.prompt.tokens_BxNxK.shape[1]

    @property
    def blocks_left(self) -> int:
        """Blocks until the budget is used up."""
        return -(-int(self.prompt.end_B[0]) // self.prompt.tokens_BxNxK.shape[2]) - self.length


class Update(NamedTuple):
    """New tokens of a request."""

    request: Request
    tokens: list[int]  # a stop token included
    logprobs: list[float]  # empty if `Request.score` is 0
    top: list[list[tuple[int, float]]]  # most likely tokens, likeliest first; empty unless score 2
    finish_reason: Literal["stop", "length"] | None  # None: there will be more


def read_update(request: Request, outputs: Outputs) -> Update:
    """Return the update of a request in a row, and advance the request."""
    row, block = request.row, outputs.tokens_BxMxK.shape[2]
    length, end = int(outputs.length_B[row]), int(outputs.end_B[row])
    known = max(min(length * block, end), request.known)
    # Of the call's tokens, flat; the first is that of block `request.length`.
    new = slice(request.known - request.length * block, known - request.length * block)
    request.known, request.length = known, length

    def take(x_BxMxK: np.ndarray) -> list:
        x_MxK = x_BxMxK[row]
        return x_MxK.reshape(-1, *x_MxK.shape[2:])[new].tolist()

    finish_reason = None
    if length * block >= end:
        finish_reason = "stop" if outputs.ended_B[row] else "length"
    top = []
    if request.score == 2:
        pairs = zip(take(outputs.top_ids_BxMxKxJ), take(outputs.top_logprobs_BxMxKxJ), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in pairs]
    return Update(
        request=request,
        tokens=take(outputs.tokens_BxMxK),
        logprobs=take(outputs.logprobs_BxMxK) if request.score else [],
        top=top,
        finish_reason=finish_reason,
    )


def stack_prompts(
    requests: Sequence[Request], capacity: int, blocks: int, block_length: int, pad_id: int
) -> Prompts:
    """Return the prompts of requests of one bucket, filled up to `capacity`."""
    prompts = Prompts(
        tokens_BxNxK=np.full((capacity, blocks, block_length), pad_id, np.int32),
        padding_B=np.zeros(capacity, np.int32),
        length_B=np.ones(capacity, np.int32),
        begin_B=np.zeros(capacity, np.int32),
        end_B=np.zeros(capacity, np.int32),
        cache_blocks=0,
    )
    for index, request in enumerate(requests):
        for name in ("tokens_BxNxK", "padding_B", "length_B", "begin_B", "end_B"):
            getattr(prompts, name)[index] = getattr(request.prompt, name)[0]
    return prompts


def stack_sampling(requests: Sequence[Request | None]) -> Sampling:
    """Return the parameters of all rows.

    Free rows repeat those of a request, so that they use no other step of the sampler.
    """
    busy = [request for request in requests if request]
    idle = SamplingConfig(temperature=0), np.zeros(2, np.uint32), ()
    first = (busy[0].sampling, busy[0].seed_2, busy[0].stop) if busy else idle
    filled = [(r.sampling, r.seed_2, r.stop) if r else first for r in requests]
    configs, seeds, stops = zip(*filled, strict=True)
    return Sampling.from_rows(configs, seed_Bx2=np.array(seeds, np.uint32), stops=stops)
