"""A live server over a tiny model, in a thread, on a free port of 127.0.0.1."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator

import httpx

from blocktx.config.model import BlockConfig, ModelConfig, StackConfig, VanillaConfig
from blocktx.config.run import DataConfig, RunConfig
from blocktx.data.tokenizer import Tokenizer
from blocktx.decode.engine import Engine
from blocktx.model.build import build
from blocktx.serve.app import ServeConfig
from blocktx.serve.server import Server
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=32, heads=2)
VOCAB = 300


def tokenizer() -> Tokenizer:
    """Bytes and a few merges."""
    words = ["the block token decoder", "a cache of blocks", "token by token"] * 9
    return Tokenizer.train(words, VOCAB, "<|endoftext|>", "<|padding|>")


def model(block_length: int = 4, kind: str = "block", context: int = 128) -> ModelConfig:
    shared = dict(vocab_size=VOCAB, context_length=context, scan_layers=False)
    if kind == "vanilla":
        return VanillaConfig(**shared, decoder=STACK)
    return BlockConfig(
        **shared, block_length=block_length, block_decoder=STACK, token_decoder=STACK
    )


def engine(config: ModelConfig, random_padding: bool = True, **attributes) -> Engine:
    run = RunConfig(model=config, data=DataConfig(random_padding=random_padding))
    found = Engine(run, random_params(build(config)), tokenizer())
    for name, value in attributes.items():
        setattr(found.tokenizer, name, value)
    return found


@dataclasses.dataclass
class Live:
    """A running server."""

    engine: Engine
    server: Server
    url: str
    client: httpx.Client  # of any thread; making one takes as long as many requests

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels but the model's."""
        text = self.client.get("/metrics").text
        (line,) = [x for x in text.splitlines() if x.startswith(f'{name}{{model_name="tiny"}} ')]
        return float(line.split()[-1])


@contextlib.contextmanager
def serving(engine: Engine, **settings) -> Iterator[Live]:
    """Serve until the end of the context, and then drain."""
    config = ServeConfig(**dict(model="tiny", port=0, rows=4, drain_seconds=30) | settings)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = Server(engine, config)
    thread = threading.Thread(target=lambda: asyncio.run(server.run(listening)))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    transport = httpx.HTTPTransport(retries=20, verify=False)
    try:
        with httpx.Client(base_url=url, timeout=60, transport=transport) as client:
            assert client.get("/health").status_code == 200
            yield Live(engine, server, url, client)
    finally:
        server.stop()
        thread.join(60)
        listening.close()
        assert not thread.is_alive()
