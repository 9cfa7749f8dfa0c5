"""The learning-rate schedule and the optimizer: clipped AdamW (paper, tables 1 and 3)."""

import jax
import optax

from blocktx.config import RunConfig

_DECAYED = {"kernel": True, "embedding": True, "bias": False, "scale": False}


def schedule(config: RunConfig) -> optax.Schedule:
    """The learning rate of every step, as a function of the number of steps before it.

    Warm-up is the straight line from `peak / (warmup_steps + 1)` at the first step (0 would waste
    it) to the peak after `warmup_steps` steps. The decay then reaches `final_fraction * peak` at
    `training.steps`, one step after the last one taken, so that the last one is not wasted either.
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
    """AdamW after clipping by the norm of the whole gradient; only matrices are decayed.

    The state's structure is the same for every `config.optimizer`, so that all of it may be changed
    when a run is resumed.
    """
    settings = config.optimizer
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            schedule(config),
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: optax.Params) -> optax.Params:
    """For each parameter whether weight decay applies to it: to matrices, told by their name.

    The number of axes does not tell, because stacked layers have one more.

    Raises:
      ValueError: on a parameter whose name says neither matrix nor vector.
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
