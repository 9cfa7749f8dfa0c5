"""Vanilla models: GPT-NeoX and Pythia as Hugging Face has them, and back."""

import os
from typing import Any

import numpy as np

from blocktx.convert import architecture, mapping
from blocktx.convert.architecture import Facts
from blocktx.convert.tensors import Checkpoint, open_checkpoint, raise_all
from blocktx.model import Model, build
from blocktx.model_config import VanillaConfig
from blocktx.vanilla import Vanilla


def load_neox(
    path: str | os.PathLike[str], config: VanillaConfig | None = None
) -> tuple[Vanilla, dict[str, Any]]:
    """A GPT-NeoX model, for example Pythia.

    Sizes come from the tensors, the rest from config.json and `config`, which have to agree with
    them and with each other.

    Args:
      path: a folder, a .safetensors file, or a hub name (see `open_checkpoint`).
      config: needed where there is no config.json; also decides what config.json does not know
        (`scan_layers`, dtypes, `context_length`).

    Returns:
      The model and its parameters, numpy arrays of `param_dtype`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is not a whole GPT-NeoX checkpoint; all that is wrong is listed.
    """
    checkpoint = open_checkpoint(path)
    if config is not None and config.kind != "vanilla":
        raise ValueError("config: a GPT-NeoX model needs the configuration of a vanilla model")
    if "block_decoder.gpt_neox.final_layer_norm.weight" in checkpoint.tensors:
        raise_all(path, ["a Block Transformer of the authors, not a vanilla model (use official)"])
    config, problems = _configure(checkpoint, config)
    if config is not None:
        problems += mapping.check_tensors(_table(config), checkpoint.tensors)
    raise_all(path, problems)
    params = mapping.to_params(
        _table(config), checkpoint.read, stacked=config.scan_layers, dtype=config.param_dtype
    )
    return build(config), params


def to_neox(
    model: Model, params: dict[str, Any], dtype: str = "float32"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors in `dtype` and the config.json of transformers' GPTNeoXForCausalLM.

    Raises:
      ValueError: it is not a vanilla model, or `params` are not its parameters.
    """
    config = model.config
    if config.kind != "vanilla":
        raise ValueError("a block model cannot become a GPT-NeoX model; use to_official")
    tensors, problems = mapping.to_tensors(
        _table(config), params, stacked=config.scan_layers, dtype=dtype
    )
    raise_all("the parameters", problems)
    return tensors, {
        "architectures": ["GPTNeoXForCausalLM"],
        **architecture.stack_to_json(config.decoder, config.vocab_size),
        "max_position_embeddings": config.context_length,
        "initializer_range": config.initializer_range,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": dtype,
    }


def _table(config: VanillaConfig) -> list[mapping.Entry]:
    vocab, width = config.vocab_size, config.decoder.width
    return [
        mapping.table("embed", "gpt_neox.embed_in", vocab, width),
        *mapping.neox_stack("decoder/stack", "gpt_neox", config.decoder),
        *mapping.linear("classifier", "embed_out", (vocab,), (width,), bias=False),
    ]


def _configure(
    checkpoint: Checkpoint, config: VanillaConfig | None
) -> tuple[VanillaConfig | None, list[str]]:
    shapes = checkpoint.shapes
    stack = architecture.stack_from_shapes(shapes, "gpt_neox")
    sources: dict[str, Facts] = {
        "tensors": {
            **architecture.vote("vocab_size", shapes, r"(gpt_neox\.embed_in|embed_out)\.weight"),
            **architecture.prefixed("decoder", stack),
        }
    }
    problems, limit = [], 2048
    if checkpoint.config is not None:
        json = checkpoint.config.get("config", checkpoint.config)
        stack, problems = architecture.stack_from_json(json)
        names = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"}
        more, wrong = architecture.integers(json, names)
        problems = [f"config.json: {problem}" for problem in problems + wrong]
        limit = more.pop("context_length", limit)
        sources["config.json"] = more | architecture.prefixed("decoder", stack)
    if config is not None:
        stack = architecture.stack_from_config(config.decoder)
        sources["configuration"] = {
            "vocab_size": config.vocab_size,
            **architecture.prefixed("decoder", stack),
        }
    facts, disagreements = architecture.merge(sources)
    fields = ("vocab_size", *(f"decoder.{field}" for field in ("layers", "width", "heads")))
    unknown = architecture.missing(facts, fields)
    problems += disagreements + unknown
    if unknown:
        return None, problems
    if config is not None and not problems:
        return config, problems
    try:
        stack = architecture.stack_config(architecture.section(facts, "decoder"))
        vocab = facts["vocab_size"]
        return VanillaConfig(vocab_size=vocab, context_length=limit, decoder=stack), problems
    except ValueError as error:
        return None, [*problems, str(error)]
