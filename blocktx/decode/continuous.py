"""Continuous decoding: many requests through a fixed number of rows.

Requests are admitted to free rows and leave at the ends of device calls, each of which decodes a
few blocks of all rows. One call is in flight at a time: when it ends, free rows are filled and the
next call starts, and while that runs the host reads the results of the one before.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blocktx.decode.generate import use_mesh
from blocktx.decode.prompts import Placement, bucket, layout_prompts
from blocktx.decode.request import Request, Update, read_update, stack_prompts, stack_sampling
from blocktx.decode.rows import Outputs, admit, decode_rows, init_rows
from blocktx.decode.sampling import Sampling, SamplingConfig, check_stop_tokens
from blocktx.model import Model, for_decoding
from blocktx.parallel import batch_parts

# Positions of a prefill group, per device: with fewer a GPU or TPU is idle, a CPU is not.
_GROUP_POSITIONS = {"cpu": 1}
_TOKENS_PER_CALL = 16  # of each row, where `blocks_per_call` is not given


class ContinuousDecoder:
    """Rows that decode requests of different lengths, each as it would be decoded alone."""

    def __init__(
        self,
        model: Model,
        params: dict[str, Any],
        *,
        rows: int = 32,
        context: int | None = None,
        placement: Placement = "pad",
        pad_id: int | None = None,
        blocks_per_call: int | None = None,
        top_logprobs: int = 0,
        mesh: Mesh | None = None,
    ):
        """Allocate the cache. Programs are compiled at first use, or by `compile`.

        Args:
          model: a model.
          params: its parameters.
          rows: requests decoded at a time; rounded up to a multiple of the mesh's batch axes.
          context: largest number of tokens of a prompt and its continuation, in whole blocks.
            None: the model's context.
          placement: placement of prompts that are not whole blocks.
          pad_id: the padding token. None: the model's.
          blocks_per_call: largest number of blocks of a device call. Fewer are decoded if requests
            wait for a row that becomes free earlier. None: 16 tokens of each row.
          top_logprobs: most likely tokens that a request may ask for.
          mesh: shards rows, cache and activations; parameters must be on it.

        Raises:
          ValueError: an argument is out of range.
        """
        config = model.config
        if config.scan_layers:
            model, params = for_decoding(model, params)
        context = config.context_length if context is None else context
        blocks_per_call = blocks_per_call or max(1, _TOKENS_PER_CALL // config.block_length)
        for name, value, most in [
            ("rows", rows, 2**16),
            ("blocks_per_call", blocks_per_call, 2**16),
            ("context", context, config.context_length),
        ]:
            if not 1 <= value <= most:
                raise ValueError(f"{name}: got {value}, must be between 1 and {most}")
        blocks = max(2, -(-context // config.block_length))
        self._model, self._params, self._mesh = model, params, mesh
        # The layout of prompts follows from this configuration.
        self.config = dataclasses.replace(
            config, context_length=blocks * config.block_length, scan_layers=False
        )
        self.placement: Placement = placement
        self._pad_id = config.pad_id if pad_id is None else pad_id
        self._blocks_per_call, self._top = blocks_per_call, top_logprobs
        self._parts = batch_parts(mesh) if mesh else 1
        self._requests: list[Request | None] = [None] * (-(-rows // self._parts) * self._parts)
        self._sampling: Sampling | None = None  # of the requests in rows
        self._in_flight: tuple[Outputs, list[Request]] | None = None
        self._freed = 0  # rows that became free since requests were admitted
        self._state = self._init()

    @property
    def rows(self) -> int:
        """Requests decoded at a time."""
        return len(self._requests)

    @property
    def requests(self) -> list[Request]:
        """Requests in rows."""
        return [request for request in self._requests if request]

    @property
    def running(self) -> int:
        """The number of requests in rows."""
        return len(self.requests)

    @property
    def in_flight(self) -> bool:
        """Return whether a device call was started and not finished."""
        return self._in_flight is not None

    @property
    def slots_used(self) -> int:
        """Cache slots that hold blocks of requests in rows, of `rows * config.blocks`."""
        return sum(request.length for request in self.requests)

    def request(
        self,
        tokens: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed_2: np.ndarray,
        stop: Iterable[int] = (),
        score: int = 0,
        row: int = 0,
    ) -> Request:
        """Return a request for the continuation of a prompt.

        Args:
          tokens: token ids of the prompt, one or more.
          max_new_tokens: largest number of tokens to generate.
          sampling: sampling parameters.
          seed_2: a row of `blocktx.decode.sampling.seed_words`.
          stop: tokens that end the continuation.
          score: see `Request`.
          row: number of the prompt in error messages.

        Raises:
          ValueError: as `layout_prompts`, or a stop token is invalid.
        """
        tokens_1xT = np.asarray([tokens]) if len(tokens) else np.zeros((1, 0), int)
        prompt = layout_prompts(
            tokens_1xT,
            np.ones_like(tokens_1xT),
            self.config,
            max_new_tokens=max_new_tokens,
            placement=self.placement,
            pad_id=self._pad_id,
            first_row=row,
        )
        blocks = self._prefill_blocks(-(-int(prompt.begin_B[0]) // self.config.block_length))
        return Request(
            prompt=prompt.replace(tokens_BxNxK=prompt.tokens_BxNxK[:, :blocks]),
            sampling=sampling,
            seed_2=seed_2,
            stop=check_stop_tokens(stop),
            score=score,
        )

    def compile(self) -> None:
        """Compile all programs. Afterwards nothing is compiled while stop tokens are 8 or fewer."""
        blocks = 0
        while blocks < self.config.blocks:
            blocks = self._prefill_blocks(blocks + 1)
            self._admit(blocks, [])
        self._start(blocks=0)
        self.finish()

    def admit(self, waiting: collections.deque[Request]) -> None:
        """Move requests from `waiting`, the first ones first, to free rows.

        Rows that became free since the last call are filled, so that none stays idle while
        requests wait. More free rows are filled while all prompts together have as many positions
        as one context or less: a burst holds up running rows for one prefill of the longest prompt.
        """
        free = [row for row, request in enumerate(self._requests) if request is None]
        at_once, self._freed = self._freed if self.running else self.rows, 0
        positions, by_bucket = 0, collections.defaultdict(list)
        for count, row in enumerate(free):
            if not waiting:
                break
            positions += waiting[0].prompt_blocks
            if count >= max(1, at_once) and positions > self.config.blocks:
                break
            request = waiting.popleft()
            request.row, self._requests[row] = row, request
            by_bucket[request.prompt_blocks].append(request)
        for blocks, requests in by_bucket.items():
            self._sampling = None
            capacity, _ = self._capacity(blocks)
            for start in range(0, len(requests), capacity):
                self._admit(blocks, requests[start : start + capacity])

    def start(self, waiting: bool = False) -> None:
        """Start a device call for the requests in rows, without waiting for it.

        Args:
          waiting: whether requests wait. The call then ends with the first row that reaches its
            budget, or after one block if a row is free.
        """
        left = [request.blocks_left for request in self.requests]
        blocks = max(left) if not waiting else 1 if len(left) < self.rows else min(left)
        self._start(min(self._blocks_per_call, blocks))

    def finish(self) -> list[Update]:
        """Wait for the call in flight, free the rows that finished, and return the new tokens."""
        outputs, requests = self._in_flight
        self._in_flight = None
        outputs = jax.device_get(outputs)
        updates = []
        for request in requests:
            if request.row is None:  # cancelled
                continue
            updates.append(read_update(request, outputs))
            if updates[-1].finish_reason:
                self.cancel(request)
        return updates

    def cancel(self, request: Request) -> None:
        """Free the row of a request, if it has one. There are no more updates of it."""
        if request.row is not None:
            self._requests[request.row] = request.row = self._sampling = None
            self._freed += 1

    def run(self, requests: Iterable[Request]) -> Iterator[list[Update]]:
        """Decode all requests, and yield the updates of each call while the next one runs.

        The consumer may cancel requests between updates.
        """
        waiting, updates = collections.deque(requests), []
        while waiting or self.running:
            self.admit(waiting)
            self.start(bool(waiting))
            if updates:
                yield updates
            updates = self.finish()
        yield updates

    def _init(self) -> Any:
        with use_mesh(self._mesh):
            state = init_rows(self._model, self.rows, self.config.blocks)
        leaf = jax.tree.leaves(self._params)[0]
        if self._mesh is None and getattr(leaf, "committed", False):
            sharding = leaf.sharding  # else the second call of each program would recompile
            if isinstance(sharding, NamedSharding):
                sharding = NamedSharding(sharding.mesh, PartitionSpec())
            state = jax.device_put(state, sharding)
        return state

    def _prefill_blocks(self, blocks: int) -> int:
        """Return `blocks` rounded up to a bucket, or to three quarters of one, to waste less."""
        size = bucket(blocks, self.config.block_length, self.config.blocks)
        smallest = bucket(1, self.config.block_length, self.config.blocks)
        return size * 3 // 4 if max(blocks, smallest) <= size * 3 // 4 else size

    def _capacity(self, blocks: int) -> tuple[int, int]:
        """Return the prompts of a prefill call, and of a group in it, for a bucket of prompts."""
        most = min(self.config.blocks // blocks, self.rows)
        positions = _GROUP_POSITIONS.get(jax.default_backend(), 1024)
        group = max(1, min(positions // blocks, most))
        group = -(-group // self._parts) * self._parts
        return -(-most // group) * group, group

    def _admit(self, blocks: int, requests: Sequence[Request]) -> None:
        capacity, group = self._capacity(blocks)
        prompts = stack_prompts(requests, capacity, blocks, self.config.block_length, self._pad_id)
        row_P = np.full(capacity, self.rows, np.int32)  # out of range: dropped
        row_P[: len(requests)] = [request.row for request in requests]
        with use_mesh(self._mesh):
            self._state = admit(
                self._model,
                self._params,
                self._state,
                prompts,
                row_P,
                np.int32(len(requests)),
                group,
            )

    def _start(self, blocks: int) -> None:
        requests = self.requests
        if self._sampling is None:
            self._sampling = stack_sampling(self._requests)
        with use_mesh(self._mesh):
            self._state, outputs = decode_rows(
                self._model,
                self._params,
                self._state,
                self._sampling,
                np.array([request is None for request in self._requests]),
                np.int32(blocks),
                np.int32(self._pad_id),
                np.int32(max((request.score for request in requests), default=0)),
                most_blocks=self._blocks_per_call,
                top=self._top,
            )
        self._in_flight = (outputs, requests)
