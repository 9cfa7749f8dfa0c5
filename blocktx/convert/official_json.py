"""config.json of an official checkpoint: resolved hyperparameters in the authors' words."""

from collections.abc import Mapping
from typing import Any

from blocktx.config import BlockConfig
from blocktx.convert import architecture
from blocktx.convert.architecture import Facts, prefixed

SECTIONS = ("embedder", "block_decoder", "token_decoder")


def from_json(config: Mapping[str, Any]) -> tuple[Facts, list[str]]:
    """What `config` says (see `architecture`), and what of it is unsupported."""
    lacking = [name for name in SECTIONS if not part(config, name)]
    if lacking:
        return {}, [f"config.json: not one of a Block Transformer: no {', '.join(lacking)}"]
    facts, problems = architecture.integers(config, {"block_length": "block_length"})
    if config.get("n_embedding_tokens", 1) != 1:
        problems.append(
            f"n_embedding_tokens: got {config['n_embedding_tokens']!r}, only 1 is supported"
        )
    for name in SECTIONS:
        inner = config[name].get("config")
        if inner is not None and not isinstance(inner, Mapping):
            problems.append(f"{name}.config: got {inner!r}, must be an object")
    for name in ("block_decoder", "token_decoder"):
        stack, unsupported = architecture.stack_from_json(part(config[name], "config"))
        facts |= prefixed(name, stack)
        problems += [f"{name}.config.{problem}" for problem in unsupported]
        if config[name].get("cls", "gpt-neo-x") != "gpt-neo-x":
            problems.append(f"{name}.cls: got {config[name]['cls']!r}, only gpt-neo-x is supported")
    for read in (_embedder, _conditioning):
        more, wrong = read(config)
        facts |= more
        problems += wrong
    width, wrong = architecture.integers(
        config["embedder"], {"block_decoder.width": "projection_hidden_size"}
    )
    problems += [f"embedder.{problem}" for problem in wrong]
    sources = {"block_decoder.config": facts, "embedder.projection_hidden_size": width}
    for name in reversed(SECTIONS):
        sources[name], wrong = architecture.integers(
            part(config[name], "config"), {"vocab_size": "vocab_size"}
        )
        problems += [f"{name}.config.{problem}" for problem in wrong]
    facts, differences = architecture.merge(sources)
    problems += differences
    return facts, [f"config.json: {problem}" for problem in problems]


def rest(config: Mapping[str, Any], block_length: int) -> tuple[Facts, list[str]]:
    """Fields of the configuration that say nothing about tensors, and what is wrong with them."""
    stack = part(part(config, "block_decoder"), "config")
    facts, problems = architecture.integers(stack, {"context_length": "max_position_embeddings"})
    scale, wrong = architecture.numbers(stack, {"initializer_range": "initializer_range"})
    blocks = facts.get("context_length", 2048) // max(block_length, 1)
    facts["context_length"] = max(blocks, 2) * block_length
    where = "config.json: block_decoder.config"
    return facts | scale, [f"{where}.{problem}" for problem in problems + wrong]


def part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section, empty if there is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _embedder(config: Mapping[str, Any]) -> tuple[Facts, list[str]]:
    embedder = config["embedder"]
    inner = part(embedder, "config")
    row, no_row = architecture.integers(inner, {"embedder.width": "hidden_size"})
    no_row = [f"embedder.config.{problem}" for problem in no_row]
    cls, method = embedder.get("cls"), embedder.get("projection_method")
    if method not in (None, "concat", "projection_layer"):
        return {}, [f"embedder.projection_method: got {method!r}, unknown"]
    if cls == "lookup" and method != "projection_layer":
        return {"embedder.kind": "lookup", **row}, no_row
    if cls == "lookup":
        return {"embedder.kind": "projection", **row}, no_row
    if cls not in ("roberta", "roberta_cls") or (cls == "roberta" and method == "concat"):
        got = f"embedder.cls: got {cls!r} with projection_method {method!r}"
        return {}, [f"{got}, only lookup, roberta (projected) and roberta_cls are supported"]
    encoder, problems = architecture.encoder_from_json(inner)
    problems = [f"embedder.config.{problem}" for problem in problems]
    facts = {"embedder.kind": "encoder", **prefixed("embedder.encoder", encoder)}
    if cls == "roberta_cls":
        tokens, wrong = architecture.integers(embedder, {"embedder.cls_tokens": "n_cls_tokens"})
        facts |= {"embedder.kind": "cls", "embedder.concatenate": method == "concat", **tokens}
        problems += [f"embedder.{problem}" for problem in wrong]
    return facts, problems


def _conditioning(config: Mapping[str, Any]) -> tuple[Facts, list[str]]:
    decoder = config["token_decoder"]
    facts, problems = architecture.integers(decoder, {"expansion": "expansion_ratio"})
    strategy, method = decoder.get("decoding_strategy"), decoder.get("expansion_method")
    if strategy in ("prefix", "summation"):
        facts["conditioning"] = strategy
    else:
        problems.append(f"decoding_strategy: got {strategy!r}, only prefix and summation work")
    if strategy == "summation":
        names = {"bos_id": "bos_token_id", "eos": "eos_token_id"}
        ids, wrong = architecture.integers(part(decoder, "config"), names)
        problems += [f"config.{problem}" for problem in wrong]
        facts["bos_id"] = ids.get("bos_id", ids.get("eos", 0))
        length = architecture.integers(config, {"expansion": "block_length"})[0]
        facts = length | facts
    if method not in (None, "expansion_layer"):
        problems.append(f"expansion_method: got {method!r}, only expansion_layer is supported")
    return facts, [f"token_decoder.{problem}" for problem in problems]


def to_json(config: BlockConfig, dtype: str) -> dict[str, Any]:
    """The inverse of `from_json`, and as `official_yaml` what the authors' loader takes."""
    embedder, length = config.embedder, config.block_length
    is_prefix = config.conditioning == "prefix"
    common = {"vocab_size": config.vocab_size, "initializer_range": config.initializer_range}
    if embedder.kind in ("encoder", "cls"):
        encoder = embedder.encoder
        inner = common | {
            "num_hidden_layers": encoder.layers,
            "hidden_size": encoder.width,
            "num_attention_heads": encoder.heads,
            "intermediate_size": encoder.mlp_size,
            "max_position_embeddings": config.encoder_positions,
            "pad_token_id": encoder.pad_id,
            "bos_token_id": encoder.cls_id,
        }
        defaults = {**architecture.ROBERTA, "type_vocab_size": 1}
    else:
        row = embedder.width or config.block_decoder.width
        inner = common | {
            "hidden_size": row if embedder.kind == "projection" else config.context_width // length
        }
        defaults = {"model_type": "lookup"}
    projected = embedder.kind != "lookup" and not embedder.concatenate
    names = {"encoder": "roberta", "cls": "roberta_cls"}
    resolved = {
        "block_length": length,
        "n_embedding_tokens": 1,
        "embedder": {
            "cls": names.get(embedder.kind, "lookup"),
            "projection_method": "projection_layer" if projected else "concat",
            "n_cls_tokens": embedder.cls_tokens if embedder.kind == "cls" else None,
            "projection_hidden_size": config.block_decoder.width,
            "config": inner | defaults,
        },
        "block_decoder": {"cls": "gpt-neo-x", "config": _stack(config, "block_decoder")},
        "token_decoder": {
            "cls": "gpt-neo-x",
            "decoding_strategy": config.conditioning,
            "expansion_method": "expansion_layer",
            "expansion_ratio": config.prefix_length if is_prefix else length,
            "config": _stack(config, "token_decoder"),
        },
    }
    return resolved | {"official_yaml": _yaml(resolved, set(defaults), dtype)}


def _stack(config: BlockConfig, name: str) -> dict[str, Any]:
    return {
        **architecture.stack_to_json(getattr(config, name), config.vocab_size),
        "max_position_embeddings": config.context_length,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": 0,
    }


def _yaml(resolved: dict[str, Any], defaults: set[str], dtype: str) -> dict[str, Any]:
    """Of a configuration file of the authors what makes the model; the rest is about training."""
    embedder = dict(resolved["embedder"])
    del embedder["projection_hidden_size"]  # they take it from the block decoder
    is_lookup = embedder["cls"] == "lookup"
    inner = {name: value for name, value in embedder["config"].items() if name not in defaults}
    embedder |= {
        "model_name_or_path": None if is_lookup else "roberta-base",
        "n_embedding_tokens": 1,
        "use_pretrained_weights": False,
        "config": inner,
    }
    stacks = {
        name: resolved[name]
        | {
            "model_name_or_path": "EleutherAI/pythia-410m-deduped",
            "use_pretrained_weights": False,
            "attn_implementation": "eager",
            "config": {
                field: value
                for field, value in resolved[name]["config"].items()
                if field not in architecture.NEOX
            },
        }
        for name in ("block_decoder", "token_decoder")
    }
    return {
        "block_length": resolved["block_length"],
        "precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype],
        "tokenizer": {"embedder": "pythia", "token_decoder": "pythia"},
        "token_decoding_loss": {"enable": True},
        "block_decoding_loss": {"enable": False, "weight": 1.0},
        "auto_encoding_loss": {"enable": False, "weight": 1.0},
        "embedder": embedder,
        **stacks,
    }
