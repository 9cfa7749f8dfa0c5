"""Learning-rate schedules and optimizers."""

import re
from typing import Any

import jax
import optax

from blocktx.config import Multipliers, OptimizerConfig, RunConfig, UserError

_DECAYED = {"kernel": True, "embedding": True, "bias": False, "scale": False}


def schedule(config: RunConfig) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    Warm-up is linear from `peak / (warmup_steps + 1)` to the peak at step `warmup_steps`. The decay
    reaches `final_fraction * peak` at step `training.steps`, one after the last: neither the first
    nor the last step has rate 0.
    """
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    final = config.optimizer.final_fraction
    steps = max(config.training.steps - warmup, 1)  # optax allows no decay over 0 steps
    decay = {
        "linear": lambda: optax.linear_schedule(peak, final * peak, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, alpha=final),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.optimizer.schedule]()
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(config: RunConfig) -> optax.GradientTransformation:
    """An optimizer after clipping by the norm of the whole gradient; only matrices are decayed.

    adamw: as in the paper.
    lion: the sign of a mix of gradient and first moment; wants a learning rate 3 to 10 times lower.
    adafactor: second moments by rows and columns, no first moment: almost no memory.
    muon: orthogonal updates of the matrices inside layers, as large as AdamW's, at whose learning
      rate it runs; AdamW with Nesterov momentum for tables, classifier and vectors.

    The state's structure depends on `name` and `moment_dtype` alone: all else may be changed when a
    run is resumed.
    """
    settings = config.optimizer
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(clip, _OPTIMIZERS[settings.name](settings, schedule(config)))


def _adamw(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.eps,
        mu_dtype=settings.moment_dtype,
        weight_decay=settings.weight_decay,
        mask=decayed,
    )


def _lion(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(
        rate,
        b1=settings.beta1,
        b2=settings.beta2,
        mu_dtype=settings.moment_dtype,
        weight_decay=settings.weight_decay,
        mask=decayed,
    )


def _adafactor(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    # optax.adafactor decays weights by a rate that the learning rate does not scale.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(rate),
    )


def _muon(settings: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    descent = optax.contrib.muon(
        1.0,
        beta=settings.beta2,
        mu_dtype=settings.moment_dtype,
        adam_b1=settings.beta1,
        adam_b2=settings.beta2,
        eps=settings.eps,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,  # the size of AdamW's updates (Liu et al. 2025, arXiv 2502.16982)
    )
    # Its own weight decay would reach the vectors too. What it returns has its sign already.
    decay = optax.add_decayed_weights(-settings.weight_decay, mask=decayed)
    return optax.chain(descent, decay, optax.scale_by_learning_rate(rate, flip_sign=False))


_OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


# Axes that a matrix maps from and to, counted from the last; others, as the layers and the three of
# query, key and value, are of matrices side by side.
_MATRICES = {
    "qkv": ((4,), (2, 1)),
    "kv": ((4,), (2, 1)),
    "q": ((3,), (2, 1)),
    "out": ((3, 2), (1,)),
    "up": ((2,), (1,)),
    "down": ((2,), (1,)),
    "expansion": ((3,), (2, 1)),
    "projection": ((3, 2), (1,)),
}


def _muon_axes(params: optax.Params) -> optax.Params:
    """Return the matrix dimensions of each parameter for muon; None where it is AdamW."""

    def axes(path: tuple[jax.tree_util.DictKey, ...], x: jax.Array) -> Any:
        names = _MATRICES.get(path[-2].key) if path[-1].key == "kernel" else None
        if names is None:
            return None
        reduced, output = (tuple(x.ndim - axis for axis in side) for side in names)
        return optax.contrib.MuonDimensionNumbers(reduced, output)

    return jax.tree.map_with_path(axes, params)


def decayed(params: optax.Params) -> optax.Params:
    """Return for each parameter whether weight decay applies: to matrices, by their names.

    The number of axes is no criterion: stacked layers have one more.

    Raises:
      ValueError: the name of a parameter is unknown.
    """

    def by_name(path: tuple[jax.tree_util.DictKey, ...], _: jax.Array) -> bool:
        name = path[-1].key
        if name not in _DECAYED:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: its name "
                f"does not tell whether to decay it; call it one of {', '.join(_DECAYED)}"
            )
        return _DECAYED[name]

    return jax.tree_util.tree_map_with_path(by_name, params)


def multipliers(params: optax.Params, config: RunConfig, stage: int = 0) -> optax.Params:
    """Return the learning-rate multiplier of each parameter, a float; 0 for frozen ones.

    It is the product of those of `optimizer.multipliers` and of the stage of `distill`. In each,
    the first pattern that matches a parameter's whole name counts, and a parameter that none
    matches has 1.

    Raises:
      UserError: a pattern matches no parameter, or only parameters of earlier patterns; or all
        parameters are frozen.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    overall = _factors(names, config.optimizer.multipliers, "config.optimizer.multipliers")
    field = f"config.distill.stages[{stage}].multipliers"
    of_stage = _factors(names, config.distill.stages[stage].multipliers, field)
    found = [a * b for a, b in zip(overall, of_stage, strict=True)]
    if not any(found):
        raise UserError(f"{field}: all parameters are frozen; nothing is left to train")
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _factors(names: list[str], multipliers: Multipliers, field: str) -> list[float]:
    """Return the factor of each name."""
    chosen: list[int | None] = [None] * len(names)
    for number, (pattern, _) in enumerate(multipliers):
        matched = [i for i, name in enumerate(names) if re.fullmatch(pattern, name)]
        free = [i for i in matched if chosen[i] is None]
        if not free:
            why = "its parameters all match earlier patterns" if matched else "it matches nothing"
            raise UserError(
                f"{field}: {pattern!r} has no effect, {why}; the parameters are {', '.join(names)}"
            )
        for i in free:
            chosen[i] = number
    return [1.0 if number is None else multipliers[number][1] for number in chosen]
