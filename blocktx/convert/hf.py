"""Vanilla models of Hugging Face: Llama, SmolLM2, Mistral, Qwen2.5, Qwen3, GPT-NeoX and Pythia."""

import os
from typing import Any

import numpy as np

from blocktx.config import VanillaConfig
from blocktx.convert import hf_config, mapping
from blocktx.convert.agreement import configure
from blocktx.convert.stacks import llama_stack, neox_stack
from blocktx.convert.tensors import Checkpoint, check_foreign, open_checkpoint, raise_all
from blocktx.model import Model, Vanilla, build

# The prefix of a model's tensors, its embedding table and its classifier.
_NEOX = ("gpt_neox", "embed_in", "embed_out")
_LLAMA = ("model", "embed_tokens", "lm_head")


def load_hf(
    path: str | os.PathLike[str],
    config: VanillaConfig | None = None,
    *,
    allow_nonfinite: bool = False,
) -> tuple[Vanilla, dict[str, Any]]:
    """Load a decoder-only model of Hugging Face.

    Args:
      path: a folder, a .safetensors file, or a hub name (see `open_checkpoint`).
      config: needed if there is no config.json; its architecture has to be that of config.json. It
        decides what config.json does not know: `scan_layers`, dtypes, `context_length`.
      allow_nonfinite: accept weights that are NaN or infinite.

    Returns:
      The model and its parameters, NumPy arrays of `param_dtype`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is not a whole checkpoint of a supported model; all that is wrong is listed.
    """
    if config is not None and config.kind != "vanilla":
        raise ValueError("config: a model of Hugging Face needs the configuration of a vanilla one")
    checkpoint = open_checkpoint(path)
    if "block_decoder.gpt_neox.final_layer_norm.weight" in checkpoint.shapes:
        raise_all(path, ["a Block Transformer of the authors, not a vanilla model (use official)"])
    problems = list(checkpoint.problems)
    config, wrong = _configure(checkpoint, config)
    problems += wrong
    if config is None:
        raise_all(path, problems + _check_names(checkpoint))
    prefix, _, head = _names(config)
    starts = (f"{prefix}.", f"{head}.")
    foreign = check_foreign(f"one with tensors {prefix}.*", starts, checkpoint.shapes)
    if foreign:
        raise_all(path, problems + foreign)
    entries = _table(config)
    tied = {f"{head}.weight": (config.vocab_size, config.decoder.width)}
    problems += mapping.check_tensors(
        entries,
        checkpoint.tensors,
        optional=tied if config.tied_classifier else {},
        lost=checkpoint.lost,
    )
    if not problems:
        problems += _check_tied(checkpoint, config)
    raise_all(path, problems)
    params = mapping.read_params(
        path, entries, checkpoint.read, config, allow_nonfinite=allow_nonfinite
    )
    return build(config), params


def to_hf(
    model: Model,
    params: dict[str, Any],
    dtype: str = mapping.AUTO,
    *,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Convert a vanilla model to tensors and a config.json of transformers.

    Args:
      model: a vanilla model.
      params: its parameters.
      dtype: of the tensors; "auto": the narrowest that represents all values exactly, which is
        that of the checkpoint if the parameters were loaded from one.
      allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
      ValueError: transformers has no such model, or `params` are not its parameters.
    """
    config = model.config
    if config.kind != "vanilla":
        raise ValueError(
            "the model: transformers has no block models; write the authors' format: "
            "convert.py to-official, or blocktx.convert.to_official"
        )
    _, problems = hf_config.family_of(config)
    raise_all("the model", problems)
    tensors, problems = mapping.to_tensors(
        _table(config),
        params,
        stacked=config.scan_layers,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
    )
    raise_all("the parameters", problems)
    return tensors, hf_config.write(config, next(iter(tensors.values())).dtype.name)


def _configure(
    checkpoint: Checkpoint, config: VanillaConfig | None
) -> tuple[VanillaConfig | None, list[str]]:
    """Return the configuration, if it is known, and all that is wrong with it."""
    json = checkpoint.config
    if json is not None and "block_decoder" in json:
        json = None  # config.json of a Block Transformer, beside a single file
    if json is not None:
        json = json.get("config", json)
        if not isinstance(json, dict):
            return None, [f"config.json: config: got {json!r:.100}, must be an object"]
    return configure(json, config, hf_config.read, lambda config: hf_config.family_of(config)[1])


def _names(config: VanillaConfig) -> tuple[str, str, str]:
    return _NEOX if config.decoder.norm == "layer" else _LLAMA


def _table(config: VanillaConfig) -> list[mapping.Entry]:
    prefix, embed, head = _names(config)
    vocab, width = config.vocab_size, config.decoder.width
    stack = neox_stack if config.decoder.norm == "layer" else llama_stack
    entries = [
        mapping.table("embed", f"{prefix}.{embed}", vocab, width),
        *stack("decoder/stack", prefix, config.decoder),
    ]
    if not config.tied_classifier:
        entries += mapping.linear("classifier", head, (vocab,), (width,), bias=False)
    return entries


def _check_names(checkpoint: Checkpoint) -> list[str]:
    starts = tuple(f"{name}." for names in (_NEOX, _LLAMA) for name in names)
    return check_foreign("a supported model", starts, checkpoint.shapes)


def _check_tied(checkpoint: Checkpoint, config: VanillaConfig) -> list[str]:
    """Return a problem if the model is tied but has a classifier that is not its table."""
    prefix, embed, head = _names(config)
    names = f"{head}.weight", f"{prefix}.{embed}.weight"
    if not config.tied_classifier or names[0] not in checkpoint.tensors:
        return []
    if np.array_equal(*map(checkpoint.read, names), equal_nan=True):
        return []
    return [f"config.json: tie_word_embeddings: got True, but {names[0]} is not {names[1]}"]


load_neox, to_neox = load_hf, to_hf  # GPT-NeoX and Pythia
