"""config.json of the authors' models: resolved hyperparameters in the authors' words."""

from collections.abc import Mapping
from typing import Any

from blocktx.config import BlockConfig, EmbedderConfig, EncoderConfig, StackConfig
from blocktx.convert import hf_config
from blocktx.convert.fields import Fields

SECTIONS = ("embedder", "block_decoder", "token_decoder")
_CONTEXT = 2048  # tokens, if config.json does not say
_SUPPORTED = {"n_embedding_tokens": (None, 1)}
_SUPPORTED_DECODER = {"cls": (None, "gpt-neo-x"), "expansion_method": (None, "expansion_layer")}
_SUPPORTED_NEOX = {"model_type": (None, "gpt_neox"), "tie_word_embeddings": (None, False)}
_SUPPORTED_ROBERTA = {
    "model_type": (None, "roberta"),
    "hidden_act": (None, "gelu"),
    "layer_norm_eps": (None, 1e-5),
    "position_embedding_type": (None, "absolute"),
    "type_vocab_size": (None, 1),
}


def read(config: Mapping[str, Any]) -> tuple[BlockConfig | None, list[str]]:
    """Return the configuration that a config.json describes, and all that is wrong with it.

    With problems, it is one whose tensors have the same names and shapes; None if there is none.
    """
    fields = Fields(config, "config.json: ")
    lacking = [name for name in SECTIONS if not fields.section(name)]
    if lacking:
        problem = f"config.json: not one of a Block Transformer: no {', '.join(lacking)}"
        return None, [*fields.problems, problem]
    inner = {name: Fields(*_inner(fields, name)) for name in SECTIONS}
    fields.only(_SUPPORTED)
    length = fields.integer("block_length")
    vocab = fields.agreed(*(f"{name}.config.vocab_size" for name in SECTIONS), kind=int)
    stacks = {name: _read_stack(fields, name, inner[name]) for name in SECTIONS[1:]}
    context = inner["block_decoder"].integer("max_position_embeddings", _CONTEXT)
    embedder = _read_embedder(fields, inner["embedder"], stacks["block_decoder"], length)
    rest = _read_conditioning(fields, inner["token_decoder"])
    scale = inner["block_decoder"].number("initializer_range", 0.02)
    problems = [*fields.problems, *(line for part in inner.values() for line in part.problems)]
    if vocab is None:
        problems.append("config.json: token_decoder.config.vocab_size: absent")
    if None in (length, vocab, embedder, *stacks.values()):
        return None, problems
    try:
        config = BlockConfig(
            vocab_size=vocab,
            context_length=max(context // max(length, 1), 2) * length,
            block_length=length,
            embedder=embedder,
            initializer_range=scale,
            **stacks,
            **rest,
        )
    except ValueError as error:
        return None, [*problems, f"config.json: {error}"]
    return config, problems


def _inner(fields: Fields, name: str) -> tuple[Mapping[str, Any], str]:
    """Return the `config` of a section, and the prefix of problems with it."""
    config = fields.get(f"{name}.config")
    if not isinstance(config, Mapping | None):
        fields.problem(f"{name}.config", f"got {config!r:.100}, must be an object")
    return config if isinstance(config, Mapping) else {}, f"config.json: {name}.config."


def _read_stack(fields: Fields, name: str, inner: Fields) -> StackConfig | None:
    fields.only({f"{name}.{field}": values for field, values in _SUPPORTED_DECODER.items()})
    inner.only(_SUPPORTED_NEOX)
    return hf_config.read_stack(inner, "gpt_neox", None)


def _read_embedder(
    fields: Fields, inner: Fields, block_decoder: StackConfig | None, length: int | None
) -> EmbedderConfig | None:
    width = block_decoder and block_decoder.width
    said = fields.agreed("embedder.projection_hidden_size", kind=int)
    if None not in (said, width) and said != width:
        fields.problem(
            "embedder.projection_hidden_size", f"got {said}, but block_decoder has {width}"
        )
    cls, method = fields.get("embedder.cls"), fields.get("embedder.projection_method")
    if method not in (None, "concat", "projection_layer"):
        fields.problem("embedder.projection_method", f"got {method!r}, unknown")
        return None
    if cls == "lookup":
        row = inner.integer("hidden_size", None)
        if method == "projection_layer":
            return _build(
                inner, EmbedderConfig, kind="projection", width=row if row != width else None
            )
        if None not in (row, width, length) and row * length != width:
            inner.problem(
                "hidden_size", f"got {row}; {length} of it must be the block decoder's {width}"
            )
        return EmbedderConfig()
    if cls not in ("roberta", "roberta_cls") or (cls == "roberta" and method == "concat"):
        fields.problem(
            "embedder.cls",
            f"got {cls!r} with projection_method {method!r}; only lookup, roberta (projected) and "
            "roberta_cls are supported",
        )
        return None
    inner.only(_SUPPORTED_ROBERTA)
    encoder = _build(
        inner,
        EncoderConfig,
        layers=inner.integer("num_hidden_layers"),
        width=inner.integer("hidden_size"),
        heads=inner.integer("num_attention_heads"),
        mlp_width=inner.integer("intermediate_size", None),
        positions=inner.integer("max_position_embeddings", None),
        pad_id=inner.integer("pad_token_id", 1),
        cls_id=inner.integer("bos_token_id", 0),
    )
    if encoder is None or cls == "roberta":
        return encoder and EmbedderConfig(kind="encoder", encoder=encoder)
    tokens = fields.agreed("embedder.n_cls_tokens", kind=int)
    if tokens is None:
        fields.problem("embedder.n_cls_tokens", "absent")
        return None
    concatenate = method == "concat"
    return _build(
        inner,
        EmbedderConfig,
        kind="cls",
        encoder=encoder,
        cls_tokens=tokens,
        concatenate=concatenate,
    )


def _build(fields: Fields, configuration: type, **values: Any) -> Any:
    """Return a configuration; None, and a problem in `fields`, if it is impossible."""
    if any(values.get(name) is None for name in ("layers", "width", "heads") if "layers" in values):
        return None
    if "layers" in values and values["mlp_width"] == 4 * values["width"]:
        values["mlp_width"] = None
    try:
        return configuration(**values)
    except ValueError as error:
        fields.problem("", str(error))
        return None


def _read_conditioning(fields: Fields, inner: Fields) -> dict[str, Any]:
    """Return the fields of a BlockConfig that say how contexts condition the token decoder."""
    strategy = fields.get("token_decoder.decoding_strategy")
    vectors = fields.agreed("token_decoder.expansion_ratio", kind=int)
    if strategy == "summation":
        length = fields.get("block_length")
        if vectors is not None and vectors != length:
            fields.problem(
                "token_decoder.expansion_ratio",
                f"got {vectors}; summation needs one vector for each of {length} tokens",
            )
        end = inner.integer("eos_token_id", 0)
        return {"conditioning": "summation", "bos_id": inner.integer("bos_token_id", end)}
    if strategy != "prefix":
        fields.problem(
            "token_decoder.decoding_strategy",
            f"got {strategy!r}, only prefix and summation are supported",
        )
    if vectors is None:
        fields.problem("token_decoder.expansion_ratio", "absent")
    return {"prefix_length": 1 if vectors is None else vectors}


def write(config: BlockConfig, dtype: str) -> dict[str, Any]:
    """Return what `read` reads as `config`; its `official_yaml` is for the authors' loader."""
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
        defaults = {name: values[-1] for name, values in _SUPPORTED_ROBERTA.items()}
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
    """Return the fields of GPT-NeoX of transformers 4.39, which the authors' code uses."""
    fields = hf_config.write_stack(getattr(config, name), "gpt_neox")
    for newer in ("partial_rotary_factor", "rope_theta", "rope_parameters"):
        del fields[newer]
    return {
        "vocab_size": config.vocab_size,
        **fields,
        "tie_word_embeddings": False,
        "max_position_embeddings": config.context_length,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_id,
        "eos_token_id": 0,
    }


def _yaml(resolved: dict[str, Any], defaults: set[str], dtype: str) -> dict[str, Any]:
    """Return the part of a configuration file of the authors that describes the model."""
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
                if field not in _PYTHIA or value != _PYTHIA[field]
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


# Fields of the Pythia that the authors' file starts from; only other values are written.
_PYTHIA = {
    "model_type": "gpt_neox",
    "use_parallel_residual": True,
    "attention_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
