"""The Block Transformer (Ho et al., NeurIPS 2024) in JAX and Flax.

    engine = blocktx.load("runs/quickstart")     a checkpoint with its tokenizer
    engine.generate("The state of the Union is")
    blocktx.load_params, blocktx.generate        arrays in, arrays out

Packages, in the order of their imports: config, files, chips, cost, parallel, data, ops, model,
checkpoint, decode, evaluate, train, benchmark, compile, convert, inspect_model, lm_eval, reproduce.
Each is imported on first use as an attribute, such as `blocktx.convert`.
"""

import importlib
from typing import Any

__all__ = ["Engine", "generate", "load", "load_params"]

# Importing blocktx imports no JAX: the processes that tokenize text need none.
_NAMES = {
    "Engine": "decode",
    "generate": "decode",
    "load": "decode",
    "load_params": "checkpoint",
}
_ON_FIRST_USE = (
    "benchmark",
    "checkpoint",
    "chips",
    "compile",
    "convert",
    "cost",
    "decode",
    "evaluate",
    "inspect_model",
    "lm_eval",
    "reproduce",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"blocktx.{_NAMES[name]}"), name)
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"blocktx.{name}")
    raise AttributeError(f"module 'blocktx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_ON_FIRST_USE])
