"""HTTP routes."""

import asyncio
import dataclasses
import json
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from blocktx.decode import Engine
from blocktx.serve.body import Fields, parse_json, show
from blocktx.serve.chat import ChatTemplate
from blocktx.serve.errors import ApiError
from blocktx.serve.handlers import Handlers
from blocktx.serve.metrics import Metrics
from blocktx.serve.protocol import Completion, check_model, is_id, parse_chat, parse_completion
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
        app = Starlette(
            routes=[Route(path, handler, methods=[method]) for path, handler, method in routes],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                Exception: _unexpected_error,
            },
        )
        app.router.redirect_slashes = False
        return app

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
            raise ApiError("prompt: got null, must be a string", param="prompt")
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
        if not isinstance(tokens, list) or not all(is_id(t) and t < size for t in tokens):
            raise ApiError(
                f"tokens: got {show(tokens)}, must be a list of token ids from 0 to {size - 1}",
                param="tokens",
            )
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
        _check_headers(request)
        most, seconds, body = self._config.body_bytes, self._config.request_seconds, bytearray()
        length = request.headers.get("content-length", "0")
        too_large = ApiError(f"the body is larger than {most} bytes", status=413)
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except ClientDisconnect:
            raise ApiError("the client disconnected") from None
        except TimeoutError:
            raise ApiError(f"the body did not arrive in {seconds:g} s", status=408) from None
        return parse_json(bytes(body))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_headers(request: Request) -> None:
    """Refuse bodies of another type, as web pages can send to any address without being asked."""
    given = request.headers.get("content-type")
    kind = (given or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            f"Content-Type: got {show(given)}, must be application/json (curl: --json)", status=415
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(
            f"Content-Encoding: got {show(encoding)}, must be left out; send it as it is",
            status=415,
        )


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
    path = request.scope["path"]  # `request.url` fails if the header Host is invalid
    message = f"{request.method} {show(path)}: {error.detail}"
    if error.headers:
        message += f"; {', '.join(f'{name}: {value}' for name, value in error.headers.items())}"
    answer = await _api_error(request, ApiError(message, status=error.status_code))
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected_error(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return await _api_error(request, ApiError("internal error", status=500))
