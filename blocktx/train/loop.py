"""The training loop."""

import json
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from blocktx.checkpoint import Checkpoints, find_all
from blocktx.config import RunConfig, UserError, to_saved, user_errors
from blocktx.cost import count_params
from blocktx.data import PACKING, Corpus, sources_seen, training_batches
from blocktx.evaluate import heldout_evaluation
from blocktx.files import write_atomic
from blocktx.model import build
from blocktx.parallel import HostRows, create_mesh
from blocktx.train.agreement import of_first_process, opened_run, require_same_corpus_everywhere
from blocktx.train.interrupt import StopSignals, sigterm_raises
from blocktx.train.metrics import MetricsWriter
from blocktx.train.progress import Progress
from blocktx.train.report import complete_run, is_evaluated, plot_or_warn
from blocktx.train.run_lock import RunLock
from blocktx.train.start import (
    check_special_tokens,
    first_state,
    prepare_corpus,
    require_tokenizer_of_first_params,
    resumed_state,
)
from blocktx.train.step import TrainState, check_run, create_state, step_config, train_step
from blocktx.train.teacher import load_teacher
from blocktx.train.teacher_cache import TeacherCache
from blocktx.train.trace import StepTrace, require_matching_libtpu

__all__ = ["TrainState", "create_state", "train", "train_step"]


@sigterm_raises()
def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    *,
    resume: bool = False,
    step: int | None = None,
    profile: range = range(0),
) -> TrainState:
    """Train to step `config.training.steps`. Write all artifacts of the run to `workdir`.

    These are `checkpoints`, `tokenizer.json`, `config.json`, `metrics.jsonl`, `tensorboard` and
    `loss.png`. With `resume`, training continues from the newest whole checkpoint in `workdir`,
    exactly as if it had not been interrupted, on any devices; or begins if there is none. A new run
    begins with new parameters, or with those of `config.training.init_from`.

    With several processes (`jax.distributed`) all of them call this with the same arguments and a
    `workdir` that all see. Each reads its own rows of every batch. Process 0 reports.

    SIGINT (Ctrl-C) and SIGTERM, if this is the main thread, and preemption notices of a Google VM
    end training after the current step, with a checkpoint, in all processes if one gets it. Another
    SIGINT, or a signal before the first step, ends it without a new checkpoint.

    Args:
      config: the run.
      workdir: its folder: local, or gs://bucket/...
      resume: whether the folder may hold the run already.
      step: the checkpoint to resume from, in place of the newest whole one.
      profile: the steps, counted from 0, of which `jax.profiler` writes a trace to
        `workdir/profile`.

    Returns:
      The state after the last step.

    Raises:
      SystemExit: SIGINT or SIGTERM came before the last step; the code is 128 + signal.
      FileExistsError: `workdir` holds a run, and `resume` is false.
      NotADirectoryError, PermissionError: `workdir` cannot be created or written to.
      FileNotFoundError: the source or tokenizer of the data, the checkpoint of `step`, or what
        `init_from` names does not exist.
      UserError: any of these.
        `workdir` is neither local nor in a bucket of Google Cloud, or another run uses it.
        Mesh, model, batch and devices do not fit each other, or weights are bfloat16.
        The data cannot be used, or their tokens do not fit the model.
        The parameters of `init_from` do not fit the model or have another tokenizer.
        The run in `workdir` cannot be resumed with this `config` or these documents.
        All checkpoints in it are damaged.
        There is no space left for a checkpoint.
        Steps are to be traced, and the installed libtpu would crash the profiler.
        The processes have different arguments or see different folders.
      FloatingPointError: loss, gradient or parameters are not finite. They are never saved.
    """
    if profile:
        require_matching_libtpu()
    with opened_run(config, workdir, resume, step) as (workdir, lock):
        return _train(config, workdir, lock, step, profile)


def _train(
    config: RunConfig,
    workdir: epath.Path,
    lock: RunLock | None,
    from_step: int | None,
    profile: range,
) -> TrainState:
    mesh = create_mesh(config.mesh)
    check_run(config, mesh)
    begins = not find_all(workdir)
    if begins and from_step is not None:
        raise FileNotFoundError(f"{workdir}: no checkpoint of step {from_step}; there is none")
    if begins:
        require_tokenizer_of_first_params(config)
    corpus = prepare_corpus(config)
    if jax.process_count() > 1:
        require_same_corpus_everywhere(corpus)
    if begins:
        check_special_tokens(config, corpus.tokenizer)
    host_rows = HostRows(config.training.batch_size, mesh)
    with user_errors():
        cache = TeacherCache(config, corpus) if config.distill.cache else None
        batches = training_batches(corpus.train, config, corpus.tokenizer.pad_id, host_rows.rows)
    model, compiled_for = build(config.model), step_config(config)
    steps, is_primary = config.training.steps, jax.process_index() == 0

    with jax.set_mesh(mesh):
        start, state = 0, None
        teacher = load_teacher(config, corpus.tokenizer, mesh)
        if begins:  # an error here leaves no run behind
            state = first_state(config, model, corpus.tokenizer, mesh)
        with StopSignals() as stop, Checkpoints(workdir, config) as checkpoints:
            if state is None:
                state, pipeline_state = resumed_state(
                    config, corpus, checkpoints, workdir, mesh, from_step
                )
                batches.set_state(pipeline_state)
                start = int(state.step)
            if is_primary:
                if begins:  # digests in checkpoints are of this file
                    corpus.tokenizer.save(workdir / "tokenizer.json")
                write_atomic(workdir / "config.json", json.dumps(to_saved(config), indent=2) + "\n")
                _print_summary(config, corpus, mesh)
                if 0 < start < steps:
                    print(f"resumed  after step {start} of {steps}", flush=True)
            evaluate_heldout = heldout_evaluation(config, model, corpus, mesh)
            if start >= steps:
                if is_primary:
                    print(
                        f"the run is at step {start} of {steps} already: nothing is left to train"
                    )
                scalars = evaluate_heldout(start, state.params) if evaluate_heldout else None
                if is_primary:
                    complete_run(workdir, start, scalars)
                return state

            step = saved = start

            def save() -> int:
                if lock is not None:
                    lock.check()
                progress.flush()
                writer.flush()
                _require_finite(step, state.params)
                data = {
                    "batches": batches.get_state(),
                    "corpus": corpus.digest,
                    "packing": PACKING,
                }
                checkpoints.save(step, state.params, state.opt_state, data)
                return step

            def next_batch() -> dict[str, jax.Array]:
                rows = next(batches)
                _require_known_tokens(rows["tokens"], config)
                if cache is not None:
                    rows |= cache.read(step, rows, host_rows.rows)
                if jax.process_count() > 1:  # informs the other processes
                    rows["stop"] = np.full(len(host_rows.rows), stop.signal is not None)
                return host_rows.place(rows)

            def stopping() -> bool:
                return progress.stop or (jax.process_count() == 1 and stop.signal is not None)

            try:
                with (
                    MetricsWriter(workdir, after_step=start) as writer,
                    Progress(writer, config, start) as progress,
                    StepTrace(workdir / "profile", profile) as trace,
                ):
                    due = start > 0 and start % config.training.evaluate_every == 0
                    if due and evaluate_heldout is not None:
                        # The run may have ended between this step and its evaluation.
                        done = is_primary and is_evaluated(workdir, start)
                        if not of_first_process(done):
                            writer.write(start, evaluate_heldout(start, state.params))
                    while step < steps and not stopping():
                        trace.before(step, state)
                        with progress.input():
                            batch = next_batch()
                        stage = config.distill.stage_at(step)
                        bag = step < config.loss.bag_steps
                        state, metrics = train_step(
                            state, batch, compiled_for, model, teacher, stage, bag
                        )
                        step += 1
                        progress.add(step, metrics)
                        last = step == steps
                        if last or step % config.training.checkpoint_every == 0:
                            saved = save()
                        due = last or (
                            not stopping() and step % config.training.evaluate_every == 0
                        )
                        if due and evaluate_heldout is not None:
                            progress.flush()
                            writer.write(step, evaluate_heldout(step, state.params))
                    if saved < step:  # stopped by a signal
                        save()
            except FloatingPointError as error:
                last_good = checkpoints.latest_step()
                folder = checkpoints.directory
                where = "there is none" if last_good is None else f"{folder}/{last_good}"
                raise FloatingPointError(f"{error}; last good checkpoint: {where}") from error

    if is_primary and step > start:
        plot_or_warn(workdir)
        if len(corpus.train.names) > 1:
            pad_id = corpus.tokenizer.pad_id
            print(*sources_seen(corpus.train, config, pad_id, step), sep="\n", flush=True)
    if step < steps:
        where = f"and saved at step {step} of {steps}" if step else "before the first step"
        by = stop.signal or signal.SIGTERM  # another process got it
        if is_primary:
            print(
                f"stopped by {by.name} {where} in {workdir}; "
                "run the same command with --resume to go on",
                flush=True,
            )
        raise SystemExit(128 + by)
    return state


def _require_known_tokens(tokens_BxNxK: np.ndarray, config: RunConfig) -> None:
    least, most = int(tokens_BxNxK.min()), int(tokens_BxNxK.max())
    if least < 0 or most >= config.model.vocab_size:
        wrong = most if least >= 0 else least
        raise UserError(
            f"config.data: token id {wrong} is outside the vocabulary (config.model.vocab_size "
            f"{config.model.vocab_size}); the tokenized documents in config.data.cache_dir "
            f"{config.data.cache_dir!r} are damaged, or were prepared for another model"
        )


def _require_finite(step: int, params: dict[str, Any]) -> None:
    # A finite gradient can still overflow them.
    if not _all_finite(params):
        raise FloatingPointError(f"step {step}: the parameters are not finite")


@jax.jit
def _all_finite(params: dict[str, Any]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def _print_summary(config: RunConfig, corpus: Corpus, mesh: Mesh) -> None:
    counted = count_params(config.model)
    train, heldout = corpus.train, corpus.heldout
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    mixed = zip(train.names, train.weights, strict=True)
    weights = ", ".join(f"{name} {weight:.4f}" for name, weight in mixed)
    sources = f"sources  {weights}\n" if len(train.names) > 1 else ""
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"model    {config.model.kind}, {counted.total:,} parameters, "
        f"{counted.non_embedding:,} non-embedding\n"
        f"{_distillation(config)}"
        f"data     {train.token_count:,} tokens in {train.document_count:,} documents, held out "
        f"{heldout.token_count:,} in {len(heldout):,}\n{sources}"
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}{hosts}, mesh {shape}",
        flush=True,
    )


def _distillation(config: RunConfig) -> str:
    if not config.distill.teacher:
        return ""
    begins = ", ".join(f"{end + 1}" for end in (0, *config.distill.ends))
    how = f"cached in {config.distill.cache}" if config.distill.cache else "in the step"
    return f"teacher  {config.distill.teacher}, {how}; stages begin at steps {begins}\n"
