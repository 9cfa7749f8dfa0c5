"""HTTP routes."""

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from blocktx.decode import Engine
from blocktx.serve.body import Fields, parse_json
from blocktx.serve.chat import ChatTemplate
from blocktx.serve.errors import ApiError
from blocktx.serve.handlers import Handlers
from blocktx.serve.metrics import Metrics
from blocktx.serve.protocol import Completion, check_model, parse_chat, parse_completion
from blocktx.serve.scheduler import Scheduler

_log = logging.getLogger("blocktx.serve")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of a server."""

    model: str = "blocktx"  # the name in answers
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    rows: int = 64  # requests decoded at a time
    context: int | None = None  # largest number of tokens of a request; None: the model's
    blocks_per_call: int | None = None  # largest number of blocks of a device call
    queue: int = 512  # requests that wait for a row; more are refused
    request_seconds: float = 600.0  # a request that takes longer is ended
    drain_seconds: float = 60.0  # from SIGTERM until requests that are not finished are ended
    body_bytes: int = 4 * 2**20  # larger bodies are refused


class App:
    """The routes of a server."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        scheduler: Scheduler,
        handlers: Handlers,
        metrics: Metrics,
        limit: int,
    ):
        """Compile the chat template; `limit` is the largest number of tokens of a request.

        Raises:
          ValueError: the chat template is invalid.
        """
        self._engine, self._config, self._scheduler = engine, config, scheduler
        self._handlers, self._metrics, self._limit = handlers, metrics, limit
        tokenizer = engine.tokenizer
        self._template = None
        if tokenizer.chat_template is not None:
            self._template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)

    def asgi(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            ("/v1/completions", self._completions, "POST"),
            ("/v1/chat/completions", self._chat, "POST"),
            ("/v1/models", self._models, "GET"),
            ("/tokenize", self._tokenize, "POST"),
            ("/detokenize", self._detokenize, "POST"),
            ("/tokenizer_info", self._tokenizer_info, "GET"),
            ("/health", self._health, "GET"),
            ("/metrics", self._metrics_text, "GET"),
        ]
        return Starlette(
            routes=[Route(path, handler, methods=[method]) for path, handler, method in routes],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                Exception: _unexpected_error,
            },
        )

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request)
        return await self._answer(request, parse_completion(body, self._config.model))

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        if self._template is None:
            raise ApiError(
                "the tokenizer of this model has no chat template; use /v1/completions", status=404
            )
        messages, completion = parse_chat(body, self._config.model)
        prompt = self._template.render(messages)
        return await self._answer(request, dataclasses.replace(completion, prompts=[prompt]))

    async def _answer(self, request: Request, completion: Completion) -> Response:
        if completion.stream:
            events: asyncio.Queue = asyncio.Queue()
            choices = await self._handlers.jobs(completion, events)
            self._handlers.submit(choices)
            stream = self._handlers.stream(completion, choices, events)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        answer = asyncio.create_task(self._handlers.whole(completion))
        gone = asyncio.create_task(_disconnected(request))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():  # the client has gone
            answer.cancel()
            return Response(status_code=499)
        gone.cancel()
        return _json(answer.result())

    async def _models(self, request: Request) -> Response:
        del request
        model = {"id": self._config.model, "object": "model", "created": 0, "owned_by": "blocktx"}
        return _json({"object": "list", "data": [{**model, "max_model_len": self._limit}]})

    async def _tokenize(self, request: Request) -> Response:
        fields = Fields(await self._body(request))
        check_model(fields, self._config.model)
        text = fields.text("prompt")
        if text is None:
            raise ApiError("prompt: must be a string", param="prompt")
        tokenizer = self._engine.tokenizer
        # A text that is the name of a special token is how clients ask for its id.
        name = text in {
            tokenizer.end_token,
            tokenizer.pad_token,
            *tokenizer.special_tokens.values(),
        }
        ids = await self._handlers.in_thread(self._handlers.encode, text, name) if text else []
        return _json({"tokens": ids, "count": len(ids), "max_model_len": self._limit})

    async def _detokenize(self, request: Request) -> Response:
        fields = Fields(await self._body(request))
        check_model(fields, self._config.model)
        tokens, size = fields.get("tokens"), self._engine.config.model.vocab_size
        if not isinstance(tokens, list) or not all(
            isinstance(t, int) and not isinstance(t, bool) and 0 <= t < size for t in tokens
        ):
            raise ApiError(f"tokens: must be a list of ids below {size}", param="tokens")
        text = await self._handlers.in_thread(self._engine.tokenizer.decode, tokens)
        return _json({"prompt": text})

    async def _tokenizer_info(self, request: Request) -> Response:
        del request
        tokenizer = self._engine.tokenizer
        return _json(
            {
                "tokenizer_class": "blocktx",
                "eos_token": tokenizer.end_token,
                "pad_token": tokenizer.pad_token,
                **tokenizer.special_tokens,
                "chat_template": tokenizer.chat_template,
            }
        )

    async def _health(self, request: Request) -> Response:
        del request
        return Response(status_code=200 if self._scheduler.accepting else 503)

    async def _metrics_text(self, request: Request) -> Response:
        del request
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _body(self, request: Request) -> dict[str, Any]:
        most, body = self._config.body_bytes, bytearray()
        with _too_large(request, most):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(f"the body is larger than {most} bytes", status=413)
        return parse_json(bytes(body))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@contextlib.contextmanager
def _too_large(request: Request, most: int) -> Iterator[None]:
    """Refuse a body by its announced length, and a client that leaves while it sends."""
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > most:
        raise ApiError(f"the body is larger than {most} bytes", status=413)
    try:
        yield
    except ClientDisconnect:
        raise ApiError("the client disconnected") from None


def _json(body: dict[str, Any], status: int = 200, headers: dict | None = None) -> Response:
    text = json.dumps(body, ensure_ascii=False)
    data = text.encode("utf-8", errors="replace")
    return Response(data, status, headers, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return _json(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(request, ApiError(message, status=error.status_code))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _api_error(request, ApiError("internal error", status=500))
