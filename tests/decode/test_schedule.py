"""The schedule of continuous decoding, without a device: which rows work, and who waits how long.

Times are in units of a decoded block of all rows. A prefill takes as long as block_170m's beside it
on two CPU cores: 0.27 for 1,024 tokens. Requests are those of `launch/benchmark_serving.py`.
"""

import collections

import numpy as np
import pytest

from blocktx.config.model import BlockConfig, StackConfig
from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.request import Request, Update
from blocktx.decode.sampling import SamplingConfig
from blocktx.model.build import build

STACK = StackConfig(layers=1, width=32, heads=2)
MODEL = BlockConfig(
    vocab_size=300,
    context_length=2048,
    scan_layers=False,
    block_decoder=STACK,
    token_decoder=STACK,
)
ROWS, BLOCK = 32, MODEL.block_length
PREFILL = 0.27 / (1024 // BLOCK)  # of a block


class Schedule(ContinuousDecoder):
    """Draws nothing, and counts the time that a device would take.

    Attributes:
      now: the time.
      decoded: blocks of all rows.
      worked: blocks of a row that a request needed.
    """

    now = decoded = worked = 0.0

    def __init__(self):
        super().__init__(build(MODEL), {}, rows=ROWS, context=1024 + 256 + BLOCK)

    def _init(self):
        return None

    def _admit(self, blocks: int, requests: list[Request]) -> None:
        self.now += PREFILL * blocks * len(requests)

    def _start(self, blocks: int) -> None:
        self.now += blocks
        self.decoded += blocks
        self._in_flight = (blocks, self.requests)

    def finish(self) -> list[Update]:
        (blocks, requests), self._in_flight = self._in_flight, None
        updates = []
        for request in requests:
            last = -(-int(request.prompt.end_B[0]) // BLOCK)
            self.worked += min(blocks, last - request.length)
            request.length = min(request.length + blocks, last)
            reason = "length" if request.length == last else None
            updates.append(Update(request, [0], [], [], reason))
            if reason:
                self.cancel(request)
        return updates


def requests(decoder: Schedule, count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(16, 1025, count)
    answers = np.minimum(rng.geometric(1 / 64, count), 256)
    greedy, seed_2 = SamplingConfig(temperature=0), np.zeros(2, np.uint32)
    return [
        decoder.request([1] * prompt, max_new_tokens=int(answer), sampling=greedy, seed_2=seed_2)
        for prompt, answer in zip(prompts.tolist(), answers, strict=True)
    ]


@pytest.fixture(scope="module")
def saturated() -> tuple[float, float]:
    """The share of rows that work while requests wait, and the requests per block's time."""
    decoder = Schedule()
    every = requests(decoder, 600)
    left, share, rate = set(every), 0.0, 0.0
    for updates in decoder.run(every):
        left -= {update.request for update in updates}
        if left:
            share = decoder.worked / decoder.decoded / ROWS
            rate = (len(every) - len(left) - ROWS) / decoder.now
    return share, rate


def test_no_row_is_idle_while_requests_wait(saturated):
    assert saturated[0] > 0.97


def first_tokens(rate: float, count: int) -> np.ndarray:
    """Times from arrival to the first token, of Poisson arrivals."""
    decoder = Schedule()
    every = requests(decoder, count)
    arrival = dict(
        zip(every, np.random.default_rng(1).exponential(1 / rate, count).cumsum(), strict=True)
    )
    later, waiting, found = collections.deque(every), collections.deque(), {}
    while later or waiting or decoder.running:
        while later and arrival[later[0]] <= decoder.now:
            waiting.append(later.popleft())
        if not (waiting or decoder.running):
            decoder.now = arrival[later[0]]
            continue
        decoder.admit(waiting)
        decoder.start(bool(waiting))
        for update in decoder.finish():
            found.setdefault(update.request, decoder.now - arrival[update.request])
    return np.array(list(found.values()))


def test_first_tokens_come_soon_at_half_of_the_saturating_rate(saturated):
    idle = np.percentile(first_tokens(1e-4, 200), 95)
    loaded = np.percentile(first_tokens(saturated[1] / 2, 600), 95)
    assert loaded < 2 * idle + PREFILL * 1024 / BLOCK
