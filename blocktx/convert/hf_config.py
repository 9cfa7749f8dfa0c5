"""config.json of decoder-only models of transformers <-> our configuration of a vanilla model.

Both styles are read, and both are written: that of transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blocktx.config import RotaryScaling, StackConfig, VanillaConfig
from blocktx.convert.fields import Fields
from blocktx.convert.hf_rotary import read_rotary, write_scaling

_MOST_LAYERS = 1000  # a larger number is a mistake, and would make a huge table


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of transformers: its class, its stack, and what an absent field means."""

    architecture: str
    stack: Mapping[str, Any]  # fields of StackConfig, other than sizes and rotary positions
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_LLAMA = dict(
    norm="rms",
    residual="sequential",
    mlp="swiglu",
    biases="none",
    qk_norm=False,
)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA),
    "mistral": Family(
        "MistralForCausalLM", _LLAMA, {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA | {"biases": "qkv"}, {"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3ForCausalLM", _LLAMA | {"qk_norm": True}, {"num_key_value_heads": 32, "head_dim": 128}
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", {"norm": "layer", "mlp": "gelu", "qk_norm": False}),
}

# Fields that change the computation, with the values that leave it as it is here.
_SUPPORTED = {
    "quantization_config": (None,),
    "text_config": (None,),
    "vision_config": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_sliding_window": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
_SUPPORTED_LLAMA = {
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
_SUPPORTED_NEOX = {"hidden_act": (None, "gelu")}


def read(config: Mapping[str, Any]) -> tuple[VanillaConfig | None, list[str]]:
    """Return the configuration that a config.json describes, and all that is wrong with it.

    With problems, it is one whose tensors have the same names and shapes; None if there is none.
    """
    fields = Fields(config, "config.json: ")
    model_type = config.get("model_type")
    fields.only(_SUPPORTED)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        fields.problems.insert(
            0, f"config.json: model_type: got {model_type!r}; use one of {', '.join(FAMILIES)}"
        )
        return None, fields.problems
    fields.defaults = FAMILIES[model_type].defaults
    context = fields.integer("max_position_embeddings")
    vocab = fields.integer("vocab_size")
    stack = read_stack(fields, model_type, context)
    rest = dict(
        tied_classifier=fields.boolean("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
        context_length=context,
    )
    if None in (stack, vocab, context):
        return None, fields.problems
    try:
        return VanillaConfig(vocab_size=vocab, decoder=stack, **rest), fields.problems
    except ValueError as error:
        fields.problems.append(f"config.json: {error}")
        return None, fields.problems


def read_stack(fields: Fields, model_type: str, context: int | None) -> StackConfig | None:
    """Return the stack that `fields` describe; None, and a problem in them, if there is none."""
    stack = dict(FAMILIES[model_type].stack)
    if model_type == "gpt_neox":
        fields.only(_SUPPORTED_NEOX)
        parallel = fields.boolean("use_parallel_residual", True)
        stack["residual"] = "parallel" if parallel else "sequential"
        stack["biases"] = "all" if fields.boolean("attention_bias", True) else "mlp"
        stack["norm_epsilon"] = fields.number("layer_norm_eps", 1e-5)
    else:
        fields.only(_SUPPORTED_LLAMA)
        stack["norm_epsilon"] = fields.number("rms_norm_eps", 1e-6)
        stack["key_value_heads"] = fields.integer("num_key_value_heads", None)
        stack["head_width"] = fields.integer("head_dim", None)
        _check_windows(fields, model_type, context)
    for ours, theirs in (
        ("layers", "num_hidden_layers"),
        ("width", "hidden_size"),
        ("heads", "num_attention_heads"),
        ("mlp_width", "intermediate_size"),
    ):
        stack[ours] = fields.integer(theirs)
    stack |= read_rotary(fields, model_type, context)
    if None in (stack["layers"], stack["width"], stack["heads"]):
        return None
    if stack["layers"] > _MOST_LAYERS:
        fields.problem("num_hidden_layers", f"got {stack['layers']}, more than {_MOST_LAYERS}")
        return None
    try:
        return StackConfig(**simplify(stack))
    except ValueError as error:
        fields.problem("", str(error))
        return None


def simplify(stack: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stack without sizes that are the defaults of StackConfig."""
    stack = dict(stack)
    width, heads = stack["width"], stack["heads"]
    if stack.get("key_value_heads") == heads:
        stack["key_value_heads"] = None
    if stack.get("head_width") is not None and stack["head_width"] * heads == width:
        stack["head_width"] = None
    if stack.get("mlp_width") == 4 * width:
        stack["mlp_width"] = None
    return stack


def _check_windows(fields: Fields, model_type: str, context: int | None) -> None:
    if model_type == "mistral":
        window = fields.integer("sliding_window", None)
        if window is not None and (context is None or window < context):
            fields.problem(
                "sliding_window", f"got {window}; sliding windows are not supported, only null"
            )
    types = fields.values.get("layer_types") or []
    other = {str(kind) for kind in types if kind != "full_attention"}
    if other:
        named = ", ".join(sorted(other)[:3])
        fields.problem("layer_types", f"got {named}; only full_attention is supported")


def family_of(config: VanillaConfig) -> tuple[str | None, list[str]]:
    """Return the `model_type` that computes what `config` describes; None with the reasons."""
    name, problems = stack_family(config.decoder)
    return name, [f"decoder.{problem}" for problem in problems]


def stack_family(stack: StackConfig) -> tuple[str | None, list[str]]:
    """Return the `model_type` whose layers are those of `stack`; None with the reasons."""
    if stack.norm == "layer":
        wanted = dict(FAMILIES["gpt_neox"].stack)
        wanted |= {"key_value_heads": None, "head_width": None, "rotary_scaling": RotaryScaling()}
        name = "gpt_neox"
        supported = {"biases": ("all", "mlp")}
    else:
        name = "qwen3" if stack.qk_norm else "qwen2" if stack.biases == "qkv" else "llama"
        wanted = dict(FAMILIES[name].stack) | {"rotary_fraction": 1.0}
        supported = {}
    supported |= {field: (value,) for field, value in wanted.items()}
    problems = [
        f"{field}: got {getattr(stack, field)!r}, which {name} of transformers lacks; it "
        f"has {', '.join(map(repr, values))}"
        for field, values in supported.items()
        if getattr(stack, field) not in values
    ]
    return (None if problems else name), problems


def write(config: VanillaConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that `family_of` finds a `model_type` for."""
    name, _ = family_of(config)
    token = 0 if name == "gpt_neox" else None
    return {
        "architectures": [FAMILIES[name].architecture],
        "vocab_size": config.vocab_size,
        **write_stack(config.decoder, name),
        "max_position_embeddings": config.context_length,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_classifier,
        "bos_token_id": token,
        "eos_token_id": token,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def write_stack(stack: StackConfig, model_type: str) -> dict[str, Any]:
    """Return the fields that `read_stack` reads as `stack`."""
    common = {
        "model_type": model_type,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp_size,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "rope_theta": stack.rotary_base,
    }
    base = {"rope_theta": stack.rotary_base}
    if model_type == "gpt_neox":
        fraction = {"partial_rotary_factor": stack.rotary_fraction}
        return common | {
            "hidden_act": "gelu",
            "layer_norm_eps": stack.norm_epsilon,
            "use_parallel_residual": stack.residual == "parallel",
            "attention_bias": stack.biases == "all",
            "rotary_pct": stack.rotary_fraction,
            "rotary_emb_base": stack.rotary_base,
            **fraction,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default"} | base | fraction,
        }
    scaling = write_scaling(stack.rotary_scaling)
    special = {"mlp_bias": False} if model_type == "llama" else {"use_sliding_window": False}
    return common | {
        "hidden_act": "silu",
        "rms_norm_eps": stack.norm_epsilon,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_size,
        "attention_bias": False,
        **special,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | base,
    }
