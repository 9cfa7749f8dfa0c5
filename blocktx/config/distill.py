"""Frozen dataclasses of distillation, and learning-rate multipliers by parameter pattern."""

import dataclasses
import re

from blocktx.config.fields import check_fields, not_negative, positive, require

# (regular expression of whole parameter names, factor of the learning rate); 0 freezes.
Multipliers = tuple[tuple[str, float], ...]


def check_multipliers(multipliers: Multipliers, field: str) -> None:
    """Raise a FieldError that names `field` on an invalid expression or a negative factor."""
    for pattern, factor in multipliers:
        try:
            re.compile(pattern)
        except re.error as error:
            require(False, field, f"{pattern!r} is not a regular expression: {error}")
        require(factor >= 0, field, f"got {factor} for {pattern!r}, must be 0 or greater")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stage of distillation: weights of the losses, and which parameters are trained how fast."""

    steps: int | None = None  # None, in the last stage only: all remaining steps
    cross_entropy_weight: float = 1.0  # of the data's tokens
    kl_weight: float = 1.0  # of the teacher's distribution, times the square of the temperature
    hidden_weight: float = 0.0  # of the context embeddings against the teacher's hidden states
    multipliers: Multipliers = ()  # on top of optimizer.multipliers

    def __post_init__(self):
        check_fields(self)
        if self.steps is not None:
            positive(self, "steps")
        weights = ("cross_entropy_weight", "kl_weight", "hidden_weight")
        not_negative(self, *weights)
        require(
            any(getattr(self, weight) for weight in weights),
            "cross_entropy_weight",
            f"all of {', '.join(weights)} are 0; give one of them a weight",
        )
        check_multipliers(self.multipliers, "multipliers")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation from a frozen vanilla model, in stages (`blocktx.train.distill`)."""

    teacher: str = ""  # run or checkpoint of a vanilla model with this run's tokenizer; empty: off
    temperature: float = 1.0  # of both distributions in the KL divergence
    hidden_layer: int | None = None  # of the teacher, from 1; None: as deep as the block decoder
    cache: str = ""  # folder of launch/cache_teacher.py, in place of running the teacher
    stages: tuple[StageConfig, ...] = (StageConfig(),)

    def __post_init__(self):
        check_fields(self)
        positive(self, "temperature")
        if self.hidden_layer is not None:
            positive(self, "hidden_layer")
        require(bool(self.stages), "stages", "is empty; give at least one stage")
        for i, stage in enumerate(self.stages[:-1]):
            require(
                stage.steps is not None,
                f"stages[{i}].steps",
                "is unset; only the last stage may take all remaining steps",
            )
        if not self.teacher:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                require(
                    value == field.default,
                    field.name,
                    f"got {value!r} without a teacher; set teacher, or leave {field.name} alone",
                )
        if self.cache:
            for i, stage in enumerate(self.stages):
                require(
                    stage.hidden_weight == 0,
                    f"stages[{i}].hidden_weight",
                    f"got {stage.hidden_weight}; a cache holds no hidden states: use 0, or no "
                    "cache",
                )

    @property
    def ends(self) -> tuple[int, ...]:
        """The step after the last one of each stage but the last."""
        ends, step = [], 0
        for stage in self.stages[:-1]:
            step += stage.steps
            ends.append(step)
        return tuple(ends)

    def stage_at(self, step: int) -> int:
        """Return the index of the stage of a step, counted from 0."""
        return sum(step >= end for end in self.ends)

    def check_steps(self, steps: int) -> None:
        """Raise a FieldError unless the stages take exactly `steps` steps."""
        last = self.stages[-1].steps
        before = self.ends[-1] if self.ends else 0
        name = f"stages[{len(self.stages) - 1}].steps"
        require(
            before < steps,
            "stages",
            f"all but the last take {before} steps, which leaves none of training.steps {steps} "
            "for the last",
        )
        require(
            last is None or before + last == steps,
            name,
            f"the stages take {before + (last or 0)} steps, training.steps is {steps}; leave it "
            f"unset or use {steps - before}",
        )


NO_DISTILLATION = DistillConfig()
