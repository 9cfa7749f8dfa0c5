"""Vanilla models: GPT-NeoX and Pythia as Hugging Face has them, and back."""

import os
from typing import Any

import numpy as np

from blocktx.config import StackConfig, VanillaConfig
from blocktx.convert import architecture, mapping
from blocktx.convert.architecture import Facts
from blocktx.convert.tensors import Checkpoint, check_foreign, open_checkpoint, raise_all
from blocktx.model import Model, Vanilla, build


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
    if config is not None and config.kind != "vanilla":
        raise ValueError("config: a GPT-NeoX model needs the configuration of a vanilla model")
    checkpoint = open_checkpoint(path)
    names, lost, problems = checkpoint.tensors, checkpoint.lost, list(checkpoint.problems)
    if "block_decoder.gpt_neox.final_layer_norm.weight" in checkpoint.shapes:
        raise_all(path, ["a Block Transformer of the authors, not a vanilla model (use official)"])
    foreign = check_foreign("a GPT-NeoX model", ("gpt_neox.", "embed_out."), checkpoint.shapes)
    if foreign:
        raise_all(path, problems + foreign)
    config, wrong = _configure(checkpoint, config)
    problems += wrong
    if config is not None:
        table = _table(config)
        problems += mapping.check_tensors(table, names, lost=lost)
    else:
        layers = architecture.stack_from_shapes(checkpoint.shapes, "gpt_neox").get("layers", 1)
        table = _table(_any_sizes(layers))
        problems += mapping.check_names(table, names, lost=lost)
    raise_all(path, problems)
    mapping.check_ours(table, config)
    params = mapping.to_params(
        table, checkpoint.read, stacked=config.scan_layers, dtype=config.param_dtype
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


def _any_sizes(layers: int) -> VanillaConfig:
    stack = StackConfig(layers=layers, width=8, heads=1)
    return VanillaConfig(vocab_size=1, context_length=2, decoder=stack)


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
    problems, rest = [], {"context_length": 2048}
    json = checkpoint.config
    is_foreign = json is not None and "block_decoder" in json
    if json is not None and not is_foreign:
        json = json.get("config", json)
        if not isinstance(json, dict):
            problems.append(f"config: got {json!r}, must be an object")
            json = {}
        stack, wrong = architecture.stack_from_json(json)
        vocab, no_vocab = architecture.integers(json, {"vocab_size": "vocab_size"})
        limit, no_limit = architecture.integers(json, {"context_length": "max_position_embeddings"})
        scale, no_scale = architecture.numbers(json, {"initializer_range": "initializer_range"})
        problems += wrong + no_vocab + no_limit + no_scale
        problems = [f"config.json: {problem}" for problem in problems]
        rest |= limit | scale
        sources["config.json"] = vocab | architecture.prefixed("decoder", stack)
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
    if is_foreign and (problems or checkpoint.path.is_dir()):
        problems.append("config.json: not used: it is one of a Block Transformer")
    stack = architecture.build_stack(StackConfig, facts, "decoder", problems)
    if stack is None or "vocab_size" not in facts:
        return None, problems
    if config is not None and not problems:
        return config, problems
    try:
        return VanillaConfig(vocab_size=facts["vocab_size"], decoder=stack, **rest), problems
    except ValueError as error:
        problems.append(f"config.json: {error}")
    try:  # so that tensors can be checked
        vocab = facts["vocab_size"]
        return VanillaConfig(vocab_size=vocab, context_length=2, decoder=stack), problems
    except ValueError:
        return None, problems
