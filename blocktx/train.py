"""Training: the state, one compiled step, and the loop around it."""

import functools
import json
import os
import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from blocktx.checkpoint import Checkpoints, load_params, tokenizer_file
from blocktx.checkpoint_folder import has_checkpoint, local_workdir
from blocktx.config import RunConfig, to_dict
from blocktx.data.corpus import Corpus, prepare
from blocktx.data.pipeline import training_batches
from blocktx.data.tokenizer import Tokenizer
from blocktx.evaluate import heldout_evaluation
from blocktx.interrupt import StopSignals, sigterm_unwinds
from blocktx.loss import training_counts, training_sums
from blocktx.metrics import MetricsWriter, Progress, plot_loss
from blocktx.model import Model, build, count_params, init_params
from blocktx.optimizer import optimizer, schedule


@flax.struct.dataclass
class TrainState:
    """All that a step changes."""

    step: jax.Array  # int32, the number of steps taken
    params: dict[str, Any]
    opt_state: optax.OptState


@functools.partial(jax.jit, static_argnames=("config", "model"))
def create_state(config: RunConfig, model: Model) -> TrainState:
    """The state before the first step, which follows from `config` (its `seed` above all)."""
    params = init_params(model, jax.random.key(config.seed))
    return TrainState(jnp.int32(0), params, optimizer(config).init(params))


@functools.partial(jax.jit, static_argnames=("config", "model"), donate_argnames="state")
def train_step(
    state: TrainState, batch: dict[str, jax.Array], config: RunConfig, model: Model
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update by one batch; `state` is donated.

    The gradient is accumulated over `config.training.microbatches` parts of the batch. Each loss is
    divided by what is scored in all of them, so it is that of the undivided batch (but the
    contrastive loss of `config.loss`, whose choices are within a part).

    Args:
      state: the state before the step.
      batch: `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`.
      config: the run's; static.
      model: the module that `config.model` describes; static.

    Returns:
      The state after the step, and the scalars `loss` (nats a token, before the update), the
      others that `config.loss` adds to it (unweighted), `grad_norm` (before clipping),
      `learning_rate` and `tokens` (real ones in the batch).
    """
    counts = training_counts(batch["mask"], config.loss)
    weights = {"loss": 1.0, **config.loss.weights}

    def objective(params: dict[str, Any], part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        sums = training_sums(model, params, part["tokens"], part["mask"], config.loss)
        return sum(weights[name] * sums[name] / counts[name] for name in weights), sums

    def accumulate(total: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(state.params, part)
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    def split(x: jax.Array) -> jax.Array:
        # Each part takes every M-th row, so that it is spread over all devices that hold the batch.
        parts = config.training.microbatches
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    zeros = jax.tree.map(jnp.zeros_like, (counts, state.params))
    (sums, grads), _ = jax.lax.scan(accumulate, zeros, jax.tree.map(split, batch))

    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        **{name: sums[name] / counts[name] for name in sums},
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(schedule(config)(state.step), jnp.float32),
        "tokens": batch["mask"].sum(dtype=jnp.int32),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


@sigterm_unwinds()
def train(
    config: RunConfig, workdir: str | os.PathLike[str], *, resume: bool = False
) -> TrainState:
    """Trains to step `config.training.steps`, and leaves in `workdir` all that a run is.

    That is `checkpoints`, `tokenizer.json`, `config.json`, `metrics.jsonl`, `tensorboard` and
    `loss.png`. With `resume`, training goes on from the newest checkpoint in `workdir`, exactly as
    if it had not been interrupted, or begins if there is none. It begins with new parameters or, of
    `config.training.init_from`, with those of another checkpoint; that is read only then.

    SIGINT (Ctrl-C) and SIGTERM, if this is the main thread, end training after the step under way
    and with a checkpoint; a second one, or one before the first step, stops at once.

    Raises:
      SystemExit: after SIGINT or SIGTERM with steps left to take, with the code 128 + signal.
      FileExistsError: `workdir` holds a run, and `resume` is false.
      NotADirectoryError, PermissionError: `workdir` cannot be made or written to.
      FileNotFoundError: the data's source or tokenizer is not there, or what `init_from` names.
      ValueError: `workdir` is not local, weights are to be bfloat16, the data do not do, the
        parameters of `init_from` are not those of this model or know another tokenizer, or the run
        in `workdir` cannot be resumed with this `config` or with other documents.
      FloatingPointError: loss, gradient or parameters are not finite. They are never saved.
    """
    workdir = local_workdir(workdir)
    _require_float32(config)
    if not resume:
        _require_no_run(workdir)
    begins = not has_checkpoint(workdir)
    if begins:
        _require_tokenizer_of_first_params(config)
    steps = config.training.steps
    corpus = prepare(config.data, config.model.vocab_size)
    batches = training_batches(corpus.train, config, corpus.tokenizer.pad_id)
    model = build(config.model)
    start, state = 0, None
    if begins:  # what fails here leaves no run behind
        state = _first_state(config, model, corpus.tokenizer)

    with StopSignals() as stop, Checkpoints(workdir, config) as checkpoints:
        if state is None:
            _require_same_tokenizer(workdir, corpus.tokenizer, config)
            resumed = checkpoints.restore(*_abstract_state(config, model))
            start = resumed.step
            state = TrainState(jnp.int32(start), resumed.params, resumed.opt_state)
            _require_same_corpus(workdir, resumed.data, corpus, config)
            batches.set_state(resumed.data["batches"])
        corpus.tokenizer.save(workdir / "tokenizer.json")
        _write_json(workdir / "config.json", to_dict(config))
        _print_summary(config, corpus)
        evaluate_heldout = heldout_evaluation(config, model, corpus)
        if start >= steps:
            print(f"the run is at step {start} of {steps} already: nothing is left to train")
            if evaluate_heldout is not None:
                evaluate_heldout(start, state.params)
            return state

        step = saved = start

        def save() -> int:
            progress.flush()
            _require_finite(step, state.params)
            data = {"batches": batches.get_state(), "corpus": corpus.digest}
            checkpoints.save(step, state.params, state.opt_state, data)
            return step

        try:
            with (
                MetricsWriter(workdir, after_step=start) as writer,
                Progress(writer, config.training, start) as progress,
            ):
                while step < steps and not stop.signal:
                    state, metrics = train_step(state, next(batches), config, model)
                    step += 1
                    progress.add(step, metrics)
                    last = step == steps
                    if last or step % config.training.checkpoint_every == 0:
                        saved = save()
                    due = last or (not stop.signal and step % config.training.evaluate_every == 0)
                    if due and evaluate_heldout is not None:
                        progress.flush()
                        writer.write(step, evaluate_heldout(step, state.params))
                if saved < step:  # a signal has come
                    save()
        except FloatingPointError as error:
            last_good = checkpoints.latest_step()
            where = "there is none" if last_good is None else f"{checkpoints.directory}/{last_good}"
            raise FloatingPointError(f"{error}; last good checkpoint: {where}") from error

    if step > start:
        plot_loss(workdir)
    if step < steps:
        where = f"and saved at step {step} of {steps}" if step else "before the first step"
        print(
            f"stopped by {stop.signal.name} {where} in {workdir}; "
            "run the same command with --resume to go on",
            flush=True,
        )
        raise SystemExit(128 + stop.signal)
    return state


def _require_finite(step: int, params: dict[str, Any]) -> None:
    # A finite gradient can still make them overflow.
    if not _all_finite(params):
        raise FloatingPointError(f"step {step}: the parameters are not finite")


@jax.jit
def _all_finite(params: dict[str, Any]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def _require_float32(config: RunConfig) -> None:
    if config.model.param_dtype != "float32":
        raise ValueError(
            "config.model.param_dtype: bfloat16 weights are for decoding; training keeps float32 "
            "weights; use config.model.compute_dtype=bfloat16"
        )


def _require_no_run(workdir: pathlib.Path) -> None:
    found = [n for n in ("checkpoints", "config.json", "metrics.jsonl") if (workdir / n).exists()]
    if found:
        raise FileExistsError(
            f"{workdir}: there is a run in it ({', '.join(found)}); pass --resume to go on with "
            "it, or choose another workdir"
        )


def _require_tokenizer_of_first_params(config: RunConfig) -> None:
    path = config.training.init_from
    if path and config.data.tokenizer == "train" and not tokenizer_file(path).exists():
        raise ValueError(
            f"config.training.init_from: there is no {tokenizer_file(path)}, and a newly "
            "trained tokenizer cannot be the one that the parameters know; pass that one, as "
            "--config.data.tokenizer=..."
        )


def _first_state(config: RunConfig, model: Model, tokenizer: Tokenizer) -> TrainState:
    """The state of step 0: new, or with the parameters of `config.training.init_from`."""
    path = config.training.init_from
    if not path:
        return create_state(config, model)
    checkpoint = load_params(path, model=config.model)
    beside = tokenizer_file(path)
    if beside.exists():
        known = Tokenizer.load(beside, config.data.end_token, config.data.pad_token)
        if known.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"config.training.init_from: the parameters in {path} know another tokenizer than "
                f"config.data gives (tokenizer {config.data.tokenizer!r}); pass "
                f"--config.data.tokenizer={beside}"
            )
    opt_state = jax.jit(optimizer(config).init)(checkpoint.params)
    return TrainState(jnp.int32(0), checkpoint.params, opt_state)


def _require_same_tokenizer(workdir: pathlib.Path, now: Tokenizer, config: RunConfig) -> None:
    path = workdir / "tokenizer.json"
    saved = Tokenizer.load(path, config.data.end_token, config.data.pad_token)
    if saved.fingerprint != now.fingerprint:
        raise ValueError(
            f"{path}: the run was trained with another tokenizer than config.data gives now "
            f"(source {config.data.source!r}, tokenizer {config.data.tokenizer!r}); restore what "
            "has changed there, or choose another workdir"
        )


def _require_same_corpus(
    workdir: pathlib.Path, saved: dict[str, Any], now: Corpus, config: RunConfig
) -> None:
    if saved.get("corpus") != now.digest:
        raise ValueError(
            f"config.data.source: {config.data.source!r} has other documents than when the run in "
            f"{workdir} was saved; restore them, or choose another workdir"
        )


def _abstract_state(config: RunConfig, model: Model) -> tuple[dict[str, Any], Any]:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = jax.eval_shape(functools.partial(create_state, config, model))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (state.params, state.opt_state),
    )


def _write_json(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def _print_summary(config: RunConfig, corpus: Corpus) -> None:
    total, inner = count_params(config.model)
    train, heldout = corpus.train, corpus.heldout
    count = len(jax.devices())
    others = f" (of {count})" if count > 1 else ""
    print(
        f"model    {config.model.kind}, {total:,} parameters, {inner:,} non-embedding\n"
        f"data     {len(train.tokens):,} tokens in {len(train):,} documents, held out "
        f"{len(heldout.tokens):,} in {len(heldout):,}\n"
        f"devices  1 x {jax.local_devices()[0].device_kind}{others}",
        flush=True,
    )
