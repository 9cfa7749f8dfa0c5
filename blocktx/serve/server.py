"""Start, drain and stop of a server."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from blocktx.decode import ContinuousDecoder, Engine
from blocktx.serve.app import App, ServeConfig
from blocktx.serve.handlers import Handlers
from blocktx.serve.metrics import Metrics
from blocktx.serve.protocol import TOP_LOGPROBS
from blocktx.serve.scheduler import Scheduler
from blocktx.serve.scoring import PromptScorer

_log = logging.getLogger("blocktx.serve")


class Server:
    """A server of one model; `run` serves until it is stopped."""

    def __init__(self, engine: Engine, config: ServeConfig):
        """Allocate the cache and compile all programs.

        Raises:
          ValueError: a setting is out of range, or the chat template is invalid.
        """
        for name in ("queue", "request_seconds", "drain_seconds", "body_bytes"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name}: got {getattr(config, name)}, must be greater than 0")
        self._config = config
        decoder = ContinuousDecoder(
            engine.model,
            engine.params,
            rows=config.rows,
            context=config.context,
            placement=engine.placement,
            pad_id=engine.tokenizer.pad_id,
            blocks_per_call=config.blocks_per_call,
            top_logprobs=TOP_LOGPROBS,
            mesh=engine.mesh,
        )
        self._metrics = Metrics(config.model)
        scorer = PromptScorer(engine, TOP_LOGPROBS)
        self._scheduler = Scheduler(engine, decoder, scorer, self._metrics, config.queue)
        self._handlers = Handlers(
            engine, decoder, scorer, self._scheduler, config.model, config.request_seconds
        )
        limit = decoder.config.context_length
        self._app = App(engine, config, self._scheduler, self._handlers, self._metrics, limit)
        self._scheduler.compile()

    def stop(self) -> None:
        """Begin to drain, as SIGTERM does; called again, stop at once. For other threads."""
        self._loop.call_soon_threadsafe(self._stop)

    async def run(self, listening: socket.socket) -> None:
        """Serve on a bound socket until SIGTERM or SIGINT, then drain.

        Raises:
          RuntimeError: the device thread failed.
        """
        self._scheduler.start()
        options = dict(log_level="warning", access_log=False, lifespan="off")
        server = _Uvicorn(uvicorn.Config(self._app.asgi(), timeout_graceful_shutdown=5, **options))
        draining: list[asyncio.Task] = []

        async def drain() -> None:
            _log.warning("draining: requests have %.0f s to finish", self._config.drain_seconds)
            seconds = self._config.drain_seconds
            finished = await asyncio.to_thread(self._scheduler.drain, seconds)
            if not finished:
                _log.warning("requests were ended after %.0f s", seconds)
            server.should_exit = True

        def stop() -> None:
            if draining:  # the second signal
                server.should_exit = server.force_exit = True
            else:
                draining.append(asyncio.create_task(drain()))

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
                loop.add_signal_handler(number, stop)
        watching = asyncio.create_task(self._watch(stop))
        self._stop, self._loop = stop, loop
        try:
            await server.serve(sockets=[listening])
        finally:
            watching.cancel()
            self._handlers.close()
            self._metrics.close()
        if self._scheduler.failure:
            raise RuntimeError(f"the device thread failed: {self._scheduler.failure}")

    async def _watch(self, stop: Callable[[], None]) -> None:
        while not self._scheduler.failure:
            await asyncio.sleep(0.5)
        stop()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Server.run`, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(engine: Engine, config: ServeConfig) -> None:
    """Serve a model over HTTP until SIGTERM or SIGINT, and finish the requests accepted so far.

    All programs are compiled before the port is open, and none afterwards.

    Args:
      engine: from `blocktx.load`.
      config: the settings.

    Raises:
      OSError: the port cannot be bound.
      ValueError: a setting is invalid.
      RuntimeError: the device failed.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.closing(listening):
        try:
            listening.bind((config.host, config.port))
        except OSError as error:
            raise OSError(
                f"--host, --port: cannot bind {config.host}:{config.port}: {error}"
            ) from None
        server = Server(engine, config)
        print(f"http://{config.host}:{listening.getsockname()[1]}/v1", flush=True)
        asyncio.run(server.run(listening))
