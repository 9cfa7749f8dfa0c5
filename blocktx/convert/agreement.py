"""The configuration of a checkpoint, from config.json, from the caller, or from both."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from blocktx.config import BlockConfig, ModelConfig, StackConfig
from blocktx.convert.hf_config import simplify

_Config = TypeVar("_Config", bound=ModelConfig)


def configure(
    json: Mapping[str, Any] | None,
    given: _Config | None,
    read: Callable[[Mapping[str, Any]], tuple[_Config | None, list[str]]],
    unsupported: Callable[[_Config], list[str]],
) -> tuple[_Config | None, list[str]]:
    """Return the configuration of a checkpoint, None if it is unknown, and all that is wrong.

    Args:
      json: the content of config.json, None if there is none.
      given: the caller's configuration. It has to agree with config.json, and then it counts, as it
        has fields that config.json lacks.
      read: returns the configuration that a config.json describes, and problems.
      unsupported: returns the reasons why a configuration has no counterpart.
    """
    unfit = [] if given is None else unsupported(given)
    if json is None:
        if given is None:
            return None, ["config.json: absent; give the folder that has it, or a configuration"]
        return None if unfit else given, unfit
    described, problems = read(json)
    if given is None or described is None or unfit:
        return described, problems + unfit
    different = differences(described, given)
    return described if different else given, problems + different


def differences(described: ModelConfig, given: ModelConfig) -> list[str]:
    """Return the fields of the architecture in which config.json and a configuration differ.

    The length of the context, dtypes and the other options of execution are no part of it.
    """
    theirs, ours = _architecture(described), _architecture(given)
    return [
        f"{name}: config.json {theirs.get(name)!r}, configuration {value!r}"
        for name, value in ours.items()
        if not _same(theirs.get(name), value)
    ]


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that the function of the model depends on, by their paths."""
    fields = {"vocab_size": config.vocab_size, "tied_classifier": config.tied_classifier}
    if config.kind == "vanilla":
        return fields | _stack("decoder", config.decoder)
    names = ["block_length", "embeddings_per_block", "conditioning"]
    names.append("prefix_length" if config.conditioning == "prefix" else "bos_id")
    fields |= {name: getattr(config, name) for name in names}
    for name in ("block_decoder", "token_decoder"):
        fields |= _stack(name, getattr(config, name))
    return fields | _embedder(config)


def _stack(name: str, stack: StackConfig) -> dict[str, Any]:
    return {f"{name}.{field}": value for field, value in simplify(vars(stack)).items()}


def _embedder(config: BlockConfig) -> dict[str, Any]:
    embedder, encoder = config.embedder, config.embedder.encoder
    fields = {"kind": embedder.kind}
    if embedder.kind == "projection":
        fields["width"] = embedder.width or config.block_decoder.width
    if embedder.kind == "cls":
        fields |= {"cls_tokens": embedder.cls_tokens, "concatenate": embedder.concatenate}
    if embedder.kind in ("encoder", "cls"):
        known = {**vars(encoder), "mlp_width": encoder.mlp_size}
        known["positions"] = config.encoder_positions
        fields |= {f"encoder.{name}": value for name, value in known.items()}
    return {f"embedder.{name}": value for name, value in fields.items()}


def _same(a: Any, b: Any) -> bool:
    close = isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9)
    return a == b or close
