"""The thread that owns the device: a bounded queue, rows, time limits, drain.

Other threads submit and cancel jobs and never touch the device. Events go to a job's `emit`, which
the thread calls.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from blocktx.decode import Continuation, ContinuousDecoder, Engine, Request, Update
from blocktx.serve.errors import ApiError
from blocktx.serve.metrics import Metrics
from blocktx.serve.scoring import PromptScore, PromptScorer

_RETRY_AFTER = 1  # seconds
_log = logging.getLogger("blocktx.serve")


class Event(NamedTuple):
    """An event of a job."""

    text: str = ""
    tokens: Sequence[int] = ()  # new ones
    logprobs: Sequence[float] = ()
    top: Sequence[list[tuple[int, float]]] = ()
    finish_reason: str | None = None  # of the last event
    score: PromptScore | None = None  # of the prompt, before all tokens
    error: ApiError | None = None  # is the last event


@dataclasses.dataclass(eq=False)
class Job:
    """A request of the decoder, or the score of a prompt, or both, and who waits for it.

    Attributes:
      prompt: token ids.
      request: the decoder's; None: no token is generated.
      score: whether the prompt is scored first.
      continuation: text of the tokens.
      emit: is called with each event, in the scheduler's thread.
      deadline: when it is given up, in seconds of `time.monotonic`.
    """

    prompt: list[int]
    request: Request | None
    score: bool
    continuation: Continuation
    emit: Callable[[Event], Any]
    deadline: float
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    cancelled: bool = False


class Scheduler:
    """Decodes and scores jobs in a thread of its own."""

    def __init__(
        self,
        engine: Engine,
        decoder: ContinuousDecoder,
        scorer: PromptScorer,
        metrics: Metrics,
        queue: int,
    ):
        """Create the scheduler, without starting it; `queue` is the most jobs that may wait."""
        self._decoder, self._scorer, self._metrics = decoder, scorer, metrics
        self._block = engine.config.model.block_length
        self._size = queue
        self._condition = threading.Condition()
        self._arrived: list[Job] = []  # guarded by the condition, as are the next three
        self._queued = 0
        self._draining = self._stopped = False
        self._failure: str | None = None
        self._to_score: collections.deque[Job] = collections.deque()
        self._waiting: collections.deque[Request] = collections.deque()
        self._jobs: dict[Request, Job] = {}  # waiting or in rows
        self._thread = threading.Thread(target=self._run, name="blocktx-device", daemon=True)

    def compile(self) -> None:
        """Compile all programs."""
        self._decoder.compile()
        self._scorer.compile()
        self._metrics.count_compilations()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def accepting(self) -> bool:
        """Return whether jobs are accepted."""
        return not (self._draining or self._stopped or self._failure)

    @property
    def failure(self) -> str | None:
        """The error that ended the thread, if any."""
        return self._failure

    def check_size(self, jobs: int) -> None:
        """Refuse more jobs of one request than the queue holds.

        Raises:
          ApiError: 400.
        """
        if jobs > self._size:
            raise ApiError(
                f"n: got {jobs} completions, of all prompts together, must be at most "
                f"{self._size}, the queue of this server",
                param="n",
            )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
          ApiError: 429 if the queue is full, 503 if the server stops.
        """
        with self._condition:
            if not self.accepting:
                raise ApiError("the server is shutting down", status=503, retry_after=_RETRY_AFTER)
            if self._queued + len(jobs) > self._size:
                raise ApiError(
                    f"the queue is full ({self._size} requests); try again later",
                    status=429,
                    retry_after=_RETRY_AFTER,
                )
            self._queued += len(jobs)
            self._arrived += jobs
            self._condition.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs; rows are freed at the end of the device call in flight."""
        with self._condition:
            for job in jobs:
                job.cancelled = True
            self._condition.notify()

    def drain(self, seconds: float) -> bool:
        """Refuse new jobs, wait for those accepted, and stop; return whether all finished."""
        with self._condition:
            self._draining = True
            self._condition.notify()
        self._thread.join(seconds)
        finished = not self._thread.is_alive()
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join(5)
        self._metrics.close()
        return finished

    def _run(self) -> None:
        try:
            updates: list[Update] = []
            while self._wait_for_work():
                updates = self._step(updates)
        except Exception as error:
            _log.exception("the device thread failed")
            self._failure = f"{type(error).__name__}: {error}"
        message = "the server failed" if self._failure else "the server is shutting down"
        status = 500 if self._failure else 503
        with self._condition:
            left = [*self._jobs.values(), *self._to_score, *self._arrived]
        for job in left:
            job.emit(Event(error=ApiError(message, status=status)))

    def _wait_for_work(self) -> bool:
        """Take arrived jobs; wait for some if there are none; return whether to go on."""
        with self._condition:
            while not (self._arrived or self._jobs or self._to_score):
                if self._draining or self._stopped:
                    return False
                self._condition.wait()
            if self._stopped:
                return False
            arrived, self._arrived = self._arrived, []
        for job in arrived:
            if job.score:
                self._to_score.append(job)
            else:
                self._enqueue(job)
        return True

    def _enqueue(self, job: Job) -> None:
        self._waiting.append(job.request)
        self._jobs[job.request] = job

    def _step(self, updates: list[Update]) -> list[Update]:
        """Run one device call, and deliver the updates of the one before meanwhile."""
        self._drop()
        self._decoder.admit(self._waiting)
        self._note_admitted()
        if self._decoder.running:
            self._decoder.start(bool(self._waiting))
        self._deliver(updates)
        updates = self._decoder.finish() if self._decoder.in_flight else []
        if self._to_score:
            self._score(self._to_score.popleft())
        self._measure()
        return updates

    def _drop(self) -> None:
        """End jobs that were cancelled, or whose time is over."""
        now = time.monotonic()
        for job in [*self._jobs.values(), *self._to_score]:
            if job.cancelled or now > job.deadline:
                if not job.cancelled:
                    job.emit(Event(error=ApiError("the request took too long", status=504)))
                if job in self._to_score:
                    self._to_score.remove(job)
                    self._left_queue(1)
                else:
                    self._forget(job, "abort")

    def _forget(self, job: Job, reason: str) -> None:
        if job.request in self._waiting:
            self._waiting.remove(job.request)
            self._left_queue(1)
        self._decoder.cancel(job.request)
        del self._jobs[job.request]
        self._finished(job, reason)

    def _left_queue(self, count: int) -> None:
        with self._condition:
            self._queued -= count

    def _note_admitted(self) -> None:
        now, count = time.monotonic(), 0
        for request, job in self._jobs.items():
            if request.row is not None and not job.admitted:
                job.admitted = now
                count += 1
                self._metrics.queued.observe(now - job.arrived)
                self._metrics.prompt_tokens.inc(len(job.prompt))
                self._metrics.prompt_length.observe(len(job.prompt))
        if count:
            self._left_queue(count)

    def _deliver(self, updates: list[Update]) -> None:
        now = time.monotonic()
        for update in updates:
            job = self._jobs.get(update.request)
            if job is None or job.cancelled:
                continue
            if not job.first_token and update.tokens:
                job.first_token = now
                self._metrics.first_token.observe(now - job.arrived)
                self._metrics.prefill.observe(now - job.admitted)
            before = len(job.continuation.tokens)
            text = job.continuation.add(update.tokens, update.logprobs, update.finish_reason)
            tokens = job.continuation.tokens[before:]
            reason = job.continuation.finish_reason
            self._metrics.generation_tokens.inc(len(tokens))
            self._metrics.blocks.inc(-(-len(update.tokens) // self._block))
            if reason:
                self._forget(job, reason)
            job.emit(
                Event(
                    text=text,
                    tokens=tokens,
                    logprobs=job.continuation.logprobs[before:],
                    top=update.top[: len(tokens)],
                    finish_reason=reason,
                )
            )

    def _score(self, job: Job) -> None:
        found = self._scorer.score(job.prompt)
        if job.request is None:
            self._left_queue(1)
            self._finished(job, "length")
            job.emit(Event(score=found, finish_reason="length"))
        else:
            job.emit(Event(score=found))
            self._enqueue(job)

    def _finished(self, job: Job, reason: str) -> None:
        now, tokens = time.monotonic(), len(job.continuation.tokens)
        self._metrics.finished(reason)
        self._metrics.latency.observe(now - job.arrived)
        self._metrics.generation_length.observe(tokens)
        if job.first_token:
            self._metrics.decode.observe(now - job.first_token)
            if tokens > 1:
                self._metrics.between_tokens.observe((now - job.first_token) / (tokens - 1))

    def _measure(self) -> None:
        decoder, metrics = self._decoder, self._metrics
        metrics.running.set(decoder.running)
        metrics.waiting.set(len(self._waiting) + len(self._to_score))
        metrics.slots_used.set(decoder.slots_used)
        metrics.cache_usage.set(decoder.slots_used / (decoder.rows * decoder.config.blocks))
