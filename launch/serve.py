"""Serve a checkpoint over HTTP, with the API of OpenAI.

python launch/serve.py --checkpoint=runs/quickstart --port=8000 --rows=64

Needs the extra `serve`: pip install -e '.[serve]'.
"""

import logging
import pathlib

from absl import flags

import blocktx
from blocktx import command_line

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder (its newest checkpoint) or one step's."
)
_QUANTIZE = flags.DEFINE_enum("quantize", None, ["int8"], "Keep the kernels as integers.")
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", None, ["int8"], "Keep keys and values of the cache as integers."
)
_MODEL = flags.DEFINE_string("model", None, "Name of the model in answers. Default: the folder's.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is all of them.")
_PORT = flags.DEFINE_integer(
    "port", 8000, "Port; 0 is any free one.", lower_bound=0, upper_bound=65535
)
_ROWS = flags.DEFINE_integer("rows", 64, "Requests decoded at a time.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Most tokens of a prompt and its continuation. Default: the model's context. "
    "Less takes less memory and time.",
    lower_bound=1,
)
_BLOCKS_PER_CALL = flags.DEFINE_integer(
    "blocks_per_call",
    None,
    "Most blocks of a device call: more is more throughput, and a later "
    "first token. Default: 16 tokens of each row.",
    lower_bound=1,
)
_QUEUE = flags.DEFINE_integer(
    "queue", 512, "Requests that may wait; others are answered 429.", lower_bound=1
)
_REQUEST_SECONDS = flags.DEFINE_float(
    "request_seconds", 600.0, "Requests that take longer are ended."
)
_DRAIN_SECONDS = flags.DEFINE_float(
    "drain_seconds", 60.0, "Seconds from SIGTERM until requests are ended that have not finished."
)


def main() -> None:
    try:
        from blocktx.serve import ServeConfig, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install -e '.[serve]'") from None
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    path = pathlib.PurePath(_CHECKPOINT.value)
    serve(
        blocktx.load(_CHECKPOINT.value, quantize=_QUANTIZE.value, cache_dtype=_CACHE_DTYPE.value),
        ServeConfig(
            model=_MODEL.value or path.name or "blocktx",
            host=_HOST.value,
            port=_PORT.value,
            rows=_ROWS.value,
            context=_CONTEXT.value,
            blocks_per_call=_BLOCKS_PER_CALL.value,
            queue=_QUEUE.value,
            request_seconds=_REQUEST_SECONDS.value,
            drain_seconds=_DRAIN_SECONDS.value,
        ),
    )


if __name__ == "__main__":
    command_line.run(main, required=("checkpoint",))
