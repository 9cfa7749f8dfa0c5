"""A request from its parsed body to its answer or stream."""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from blocktx.decode import Continuation, ContinuousDecoder, Engine, encode_text, seed_words
from blocktx.serve.errors import ApiError
from blocktx.serve.protocol import Completion
from blocktx.serve.responses import DONE, Envelope, Logprobs, server_sent_event, usage
from blocktx.serve.scheduler import Event, Job, Scheduler
from blocktx.serve.scoring import PromptScore, PromptScorer

_log = logging.getLogger("blocktx.serve")


class _Choice:
    """The events of one choice, as text and log-probabilities."""

    def __init__(self, job: Job, echo: str | None, logprobs: Logprobs | None):
        self.job, self.finish_reason, self.first = job, None, True
        self._echo, self._logprobs = echo, logprobs

    def add(self, event: Event) -> tuple[str, dict[str, Any] | None]:
        """Return the new text and its log-probabilities."""
        echoed, text, self._echo = self._echo is not None, (self._echo or "") + event.text, None
        self.finish_reason = event.finish_reason
        if self._logprobs is None:
            return text, None
        tokens, logprobs = list(event.tokens), list(event.logprobs)
        top = list(event.top) or [[] for _ in tokens]  # none if only drawn tokens are scored
        if echoed:  # a prompt of one token has no score: its first token is not predicted
            score = event.score or PromptScore([], [])
            tokens = [*self.job.prompt, *tokens]
            logprobs = [None, *score.logprobs, *logprobs]
            top = [None, *score.top, *top]
        return text, self._logprobs.format(tokens, logprobs, top)


class Handlers:
    """Turns parsed requests into jobs and their events into answers."""

    def __init__(
        self,
        engine: Engine,
        decoder: ContinuousDecoder,
        scorer: PromptScorer,
        scheduler: Scheduler,
        model: str,
        request_seconds: float,
    ):
        """Create the handlers; `model` is the name in answers."""
        self._engine, self._decoder, self._scorer = engine, decoder, scorer
        self._scheduler, self._model, self._seconds = scheduler, model, request_seconds
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, "blocktx-tokenize")

    def close(self) -> None:
        """End the thread."""
        self._tokenizing.shutdown(wait=False)

    async def in_thread(self, function: Callable, *args: Any) -> Any:
        """Call a function that would block the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, function, *args)

    def encode(self, prompt: str | list[int], special: bool = False, number: int = 0) -> list[int]:
        """Return the token ids of a prompt; of an empty one, the end token.

        Args:
          prompt: text or token ids.
          special: whether the names of special tokens in a text are these tokens.
          number: the prompt's number, for messages.

        Raises:
          ApiError: 400: invalid Unicode or token ids, or nothing that the tokenizer knows.
        """
        tokenizer, size = self._engine.tokenizer, self._engine.config.model.vocab_size
        if isinstance(prompt, str):
            try:
                ids = encode_text(prompt, tokenizer, number, special)
            except ValueError as error:
                raise ApiError(str(error), param="prompt") from None
        else:
            ids = prompt
            for id_ in ids:
                if id_ >= size:
                    raise ApiError(
                        f"prompt: got token id {id_}, must be from 0 to {size - 1}", param="prompt"
                    )
        return list(ids) or [tokenizer.end_id]

    async def jobs(
        self, completion: Completion, events: "asyncio.Queue[tuple[int, Event]]"
    ) -> list[_Choice]:
        """Return a choice for each completion of a request, with its job, not yet submitted.

        Raises:
          ApiError: 400: a prompt is invalid or does not fit the context.
        """
        loop = asyncio.get_running_loop()
        total = len(completion.prompts) * completion.n
        self._scheduler.check_size(total)
        self._check_limits(completion)
        seed_Bx2 = seed_words(completion.seed, total)
        choices: list[_Choice] = []

        def emit(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        for number, prompt in enumerate(completion.prompts):
            ids = await self.in_thread(self.encode, prompt, completion.chat, number)
            for _ in range(completion.n):
                index = len(choices)
                job = self._job(
                    completion, ids, number, seed_Bx2[index], functools.partial(emit, index)
                )
                echo = None
                if completion.echo:
                    echo = prompt if isinstance(prompt, str) else self._engine.tokenizer.decode(ids)
                logprobs = None
                if completion.logprobs is not None:
                    before = [] if completion.echo else ids
                    logprobs = Logprobs(self._engine, completion.logprobs, completion.chat, before)
                choices.append(_Choice(job, echo, logprobs))
        return choices

    def _job(
        self, completion: Completion, ids: list[int], number: int, seed_2: Any, emit: Callable
    ) -> Job:
        tokenizer, scored = self._engine.tokenizer, completion.logprobs is not None
        request, limit = None, self._decoder.config.context_length
        try:
            new = completion.max_tokens
            if new is None:  # as many as fit
                block = self._decoder.config.block_length
                padding = block if self._decoder.placement == "pad" or len(ids) < block else 0
                new = max(1, limit - len(ids) - padding)
            if new > 0:
                request = self._decoder.request(
                    ids,
                    max_new_tokens=new,
                    sampling=completion.sampling,
                    seed_2=seed_2,
                    stop=[
                        *([] if completion.ignore_eos else tokenizer.end_ids),
                        *completion.stop_ids,
                    ],
                    score=0 if not scored else 2 if completion.logprobs else 1,
                    row=number,
                )
            elif len(ids) > self._scorer.longest:
                raise ValueError(
                    f"prompt: row {number} has {len(ids)} tokens, must be at most "
                    f"{self._scorer.longest} with echo"
                )
        except ValueError as error:
            raise ApiError(str(error), param="prompt", code="context_length_exceeded") from None
        return Job(
            prompt=ids,
            request=request,
            score=completion.echo and scored and len(ids) > 1,
            continuation=Continuation(tokenizer, ids, completion.stop),
            emit=emit,
            deadline=time.monotonic() + self._seconds,
        )

    def _check_limits(self, completion: Completion) -> None:
        """Raise an ApiError for what no prompt could make right."""
        limit, size = self._decoder.config.context_length, self._engine.config.model.vocab_size
        if completion.max_tokens is not None and completion.max_tokens >= limit:
            raise ApiError(
                f"max_tokens: got {completion.max_tokens}, must be less than the context of "
                f"{limit} tokens, which has room for the prompt too",
                param="max_tokens",
                code="context_length_exceeded",
            )
        for id_ in completion.stop_ids:
            if id_ >= size:
                raise ApiError(
                    f"stop_token_ids: got {id_}, must be from 0 to {size - 1}",
                    param="stop_token_ids",
                )

    def submit(self, choices: list[_Choice]) -> None:
        """Submit the jobs of choices; those with nothing to compute end at once."""
        jobs = []
        for choice in choices:
            if choice.job.request is None and not choice.job.score:
                choice.job.emit(Event(finish_reason="length"))
            else:
                jobs.append(choice.job)
        self._scheduler.submit(jobs)

    async def whole(self, completion: Completion) -> dict[str, Any]:
        """Return the whole answer to a request.

        Raises:
          ApiError: the request is invalid, refused or failed.
        """
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        choices = await self.jobs(completion, events)
        texts = [""] * len(choices)
        logprobs: list[dict[str, list] | None] = [None] * len(choices)
        self.submit(choices)
        try:
            left = len(choices)
            while left:
                index, event = await events.get()
                if event.error:
                    raise event.error
                text, new = await self._add(choices[index], event)
                texts[index] += text
                if logprobs[index] is None:
                    logprobs[index] = new
                elif new is not None:
                    for name, values in new.items():
                        logprobs[index][name] += values
                left -= event.finish_reason is not None
        finally:
            self._scheduler.cancel([choice.job for choice in choices])
        envelope = Envelope(self._model, completion.chat, stream=False)
        return envelope.wrap(
            [
                envelope.choice(index, texts[index], logprobs[index], choice.finish_reason)
                for index, choice in enumerate(choices)
            ],
            _usage(completion, choices),
        )

    async def stream(
        self,
        completion: Completion,
        choices: list[_Choice],
        events: "asyncio.Queue[tuple[int, Event]]",
    ) -> AsyncIterator[bytes]:
        """Yield the events of submitted choices as server-sent events."""
        envelope = Envelope(self._model, completion.chat, stream=True)
        try:
            left = len(choices)
            while left:
                index, event = await events.get()
                if event.error:
                    yield server_sent_event(event.error.body)
                    break
                choice = choices[index]
                text, logprobs = await self._add(choice, event)
                left -= event.finish_reason is not None
                if text or event.finish_reason or event.score or (logprobs and event.tokens):
                    delta = envelope.delta(index, text, logprobs, event.finish_reason, choice.first)
                    choice.first = False
                    yield server_sent_event(envelope.wrap([delta]))
            else:
                if completion.include_usage:
                    yield server_sent_event(envelope.wrap([], _usage(completion, choices)))
            yield DONE
        except Exception as error:  # the status is sent already
            _log.error("a stream failed", exc_info=error)
            yield server_sent_event(ApiError("internal error", status=500).body)
            yield DONE
        finally:
            self._scheduler.cancel([choice.job for choice in choices])

    async def _add(self, choice: _Choice, event: Event) -> tuple[str, dict[str, Any] | None]:
        if event.score is not None:  # the texts of a long prompt's tokens take a while
            return await self.in_thread(choice.add, event)
        return choice.add(event)


def _usage(completion: Completion, choices: list[_Choice]) -> dict[str, Any]:
    prompts = choices[:: completion.n]
    return usage(
        sum(len(choice.job.prompt) for choice in prompts),
        sum(len(choice.job.continuation.tokens) for choice in choices),
    )
