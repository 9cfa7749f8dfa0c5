"""Formulations compared with the plain ones on this device, in training and in decoding steps."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.config import BlockConfig, Formulations, LossConfig, ModelConfig
from blocktx.model import build, for_decoding, init_params

_ONLY_ON = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}
_DECODING = ("cached_attention", "token_cached_attention", "cached_rotary")
_NO_CHOICE = ("cache_dtype", "cache_write", "sampler", "pallas", "prefill_positions", "loss_tokens")


def choices() -> Iterator[tuple[str, str]]:
    """Yield every formulation that this platform can run but the plain ones, by field."""
    for field, hint in typing.get_type_hints(Formulations).items():
        if field in _NO_CHOICE:
            continue
        for value in typing.get_args(hint):
            here = _ONLY_ON.get(value, jax.default_backend()) == jax.default_backend()
            if here and value not in ("auto", getattr(Formulations.plain(), field)):
                yield field, value


def compare_formulations(config: BlockConfig, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Compare loss and gradient, or logits of decoding steps, with the plain formulations.

    The reference is the plain one in float32 with exact products. A formulation may differ from it
    twice as much as the plain one in the dtype of `config` does.
    """
    exact = _with(config, Formulations.plain(), "float32")
    params = init_params(build(exact), jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        reference = {kind: run(exact, params) for kind, run in _RUNS.items()}
    plain = {kind: run(_with(config, Formulations.plain()), params) for kind, run in _RUNS.items()}
    for field, value in choices():
        if fields and field not in fields:
            continue
        kind = "decoding" if field in _DECODING else "training"
        chosen = dataclasses.replace(Formulations.plain(), **{field: value})
        result = {"field": field, "value": value, "error": None, "ok": False, "message": ""}
        allowed = _distances(plain[kind], reference[kind])
        try:
            got = _distances(_RUNS[kind](_with(config, chosen), params), reference[kind])
        except Exception as error:  # a finding as well: the device cannot run it
            result["message"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            result |= {"error": got, "plain_error": allowed}
            result["ok"] = all(x <= 2 * y + 1e-4 for x, y in zip(got, allowed, strict=True))
        yield result


def _with(config: BlockConfig, formulations: Formulations, dtype: str | None = None) -> BlockConfig:
    dtype = dtype or config.compute_dtype
    return dataclasses.replace(config, formulations=formulations, compute_dtype=dtype)


def _gradient(config: BlockConfig, params: dict[str, Any]) -> list[np.ndarray]:
    """Return the loss, and its gradient as one vector."""
    from blocktx.train import training_sums  # heavy, and for these checks alone

    model = build(config)
    batch = random_batch(config, 2)

    @jax.jit
    def run(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        def loss(params: dict[str, Any]) -> jax.Array:
            tokens, mask = batch["tokens"], batch["mask"]
            return training_sums(model, params, tokens, mask, LossConfig())["loss"]

        value, gradient = jax.value_and_grad(loss)(params)
        return value[None], jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])

    return [np.asarray(x) for x in run(params)]


def _steps(config: BlockConfig, params: dict[str, Any]) -> list[np.ndarray]:
    """Return the logits of a block by a prefill, a block step and token steps on given tokens."""
    model, separate = for_decoding(build(config), params)
    tokens_BxNxK = random_batch(config, 4)["tokens"]
    rows, blocks, length = tokens_BxNxK.shape

    @jax.jit
    def run(params: dict[str, Any]) -> jax.Array:
        def apply(method: str, *args: Any) -> Any:
            return model.apply({"params": params}, *args, method=method)

        def extend(begin: int, end: int, cache: Any, seen_BxS: jax.Array | None) -> Any:
            part = tokens_BxNxK[:, begin:end]
            start_B = jnp.full(rows, begin)
            return apply("extend", part, np.ones_like(part), start_B, cache, begin, seen_BxS)

        last = blocks - 2
        _, cache = extend(0, last, model.create_cache(rows, blocks), None)
        seen_BxS = jnp.broadcast_to(jnp.arange(blocks) < last, (rows, blocks))
        context, _ = extend(last, last + 1, cache, seen_BxS)
        logits, cache = apply("start_block", context[:, 0], model.create_token_cache(rows))
        out = [logits]
        for index in range(length - 1):
            token_B = tokens_BxNxK[:, -1, index]
            logits, cache = apply("step_token", token_B, jnp.int32(index), cache)
            out.append(logits)
        return jnp.stack(out)

    return [np.asarray(run(separate))]


_RUNS = {"training": _gradient, "decoding": _steps}


def _distances(got: list[np.ndarray], wanted: list[np.ndarray]) -> list[float]:
    """Return the relative distance of each array."""

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return [distance(x, y) for x, y in zip(got, wanted, strict=True)]


def random_batch(config: ModelConfig, rows: int) -> dict[str, np.ndarray]:
    """Return a batch of random tokens; the last block of the first row is padding."""
    shape = (rows, config.blocks, config.block_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    mask = np.ones(shape, bool)
    mask[0, -1] = False
    return {"tokens": tokens.astype(np.int32), "mask": mask}
