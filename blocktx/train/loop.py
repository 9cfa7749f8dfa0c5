"""Training: the loop around the compiled step, and all that a run leaves in its folder."""

import json
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blocktx.checkpoint import Checkpoints, has_checkpoint
from blocktx.config import RunConfig, to_dict
from blocktx.cost import count_params
from blocktx.data import PACKING, Corpus, prepare, sources_seen, training_batches
from blocktx.evaluate import heldout_evaluation
from blocktx.files import run_folder, write_atomic
from blocktx.model import build
from blocktx.parallel import HostRows, create_mesh
from blocktx.train.interrupt import StopSignals, sigterm_unwinds
from blocktx.train.loss_plot import plot_loss
from blocktx.train.metrics import MetricsWriter
from blocktx.train.progress import Progress
from blocktx.train.start import (
    first_state,
    require_no_run,
    require_same_corpus_everywhere,
    require_tokenizer_of_first_params,
    resumed_state,
)
from blocktx.train.step import TrainState, check_run, create_state, train_step
from blocktx.train.trace import StepTrace

__all__ = ["TrainState", "create_state", "train", "train_step"]


@sigterm_unwinds()
def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    *,
    resume: bool = False,
    profile: range = range(0),
) -> TrainState:
    """Trains to step `config.training.steps`, and leaves in `workdir` all that a run is.

    That is `checkpoints`, `tokenizer.json`, `config.json`, `metrics.jsonl`, `tensorboard` and
    `loss.png`. With `resume`, training goes on from the newest checkpoint in `workdir`, exactly as
    if it had not been interrupted, on whatever devices there are now; or begins if there is none.
    It begins with new parameters or, of `config.training.init_from`, with those of another
    checkpoint; that is read only then.

    With several processes (`jax.distributed`) all call this, with the same arguments and a
    `workdir` that all see; each reads its own rows of every batch, and the first reports.

    SIGINT (Ctrl-C) and SIGTERM, if this is the main thread, and notices that a Google VM will be
    stopped, end training after the step under way and with a checkpoint, in all processes if one
    gets it. SIGINT after that, or a signal before the first step, stops at once.

    Args:
      config: the run.
      workdir: its folder, on a disk or gs://bucket/...
      resume: whether the folder may hold the run already.
      profile: of which steps, counted from 0, `jax.profiler` writes a trace to `workdir/profile`.

    Raises:
      SystemExit: after SIGINT or SIGTERM with steps left to take, with the code 128 + signal.
      FileExistsError: `workdir` holds a run, and `resume` is false.
      NotADirectoryError, PermissionError: `workdir` cannot be made or written to.
      FileNotFoundError: the data's source or tokenizer is not there, or what `init_from` names.
      ValueError: `workdir` is neither local nor in a bucket of Google Cloud, weights are to be
        bfloat16, mesh, model, batch and devices do not fit each other, the data do not do, the
        parameters of `init_from` are not those of this model or know another tokenizer, or the run
        in `workdir` cannot be resumed with this `config` or with other documents.
      FloatingPointError: loss, gradient or parameters are not finite. They are never saved.
    """
    mesh = create_mesh(config.mesh)
    check_run(config, mesh)
    workdir = run_folder(workdir)
    if not resume:
        require_no_run(workdir)
    begins = not has_checkpoint(workdir)
    if begins:
        require_tokenizer_of_first_params(config)
    corpus = prepare(config.data, config.model.vocab_size)
    if jax.process_count() > 1:
        require_same_corpus_everywhere(corpus)
    host_rows = HostRows(config.training.batch_size, mesh)
    batches = training_batches(corpus.train, config, corpus.tokenizer.pad_id, host_rows.rows)
    model = build(config.model)
    steps, chief = config.training.steps, jax.process_index() == 0

    with jax.set_mesh(mesh):
        start, state = 0, None
        if begins:  # what fails here leaves no run behind
            state = first_state(config, model, corpus.tokenizer, mesh)
        with StopSignals() as stop, Checkpoints(workdir, config) as checkpoints:
            if state is None:
                state, pipeline_state = resumed_state(config, corpus, checkpoints, workdir, mesh)
                batches.set_state(pipeline_state)
                start = int(state.step)
            if chief:
                corpus.tokenizer.save(workdir / "tokenizer.json")
                write_atomic(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
                _print_summary(config, corpus, mesh)
            evaluate_heldout = heldout_evaluation(config, model, corpus, mesh)
            if start >= steps:
                if chief:
                    print(
                        f"the run is at step {start} of {steps} already: nothing is left to train"
                    )
                if evaluate_heldout is not None:
                    evaluate_heldout(start, state.params)
                return state

            step = saved = start

            def save() -> int:
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
                if jax.process_count() > 1:  # how the others hear of it
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
                    while step < steps and not stopping():
                        trace.before(step, state)
                        with progress.input():
                            batch = next_batch()
                        state, metrics = train_step(state, batch, config, model)
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
                    if saved < step:  # a signal has come
                        save()
            except FloatingPointError as error:
                last_good = checkpoints.latest_step()
                folder = checkpoints.directory
                where = "there is none" if last_good is None else f"{folder}/{last_good}"
                raise FloatingPointError(f"{error}; last good checkpoint: {where}") from error

    if chief and step > start:
        plot_loss(workdir)
        if len(corpus.train.names) > 1:
            pad_id = corpus.tokenizer.pad_id
            print(*sources_seen(corpus.train, config, pad_id, step), sep="\n", flush=True)
    if step < steps:
        where = f"and saved at step {step} of {steps}" if step else "before the first step"
        by = stop.signal or signal.SIGTERM  # another process got it
        if chief:
            print(
                f"stopped by {by.name} {where} in {workdir}; "
                "run the same command with --resume to go on",
                flush=True,
            )
        raise SystemExit(128 + by)
    return state


def _require_finite(step: int, params: dict[str, Any]) -> None:
    # A finite gradient can still make them overflow.
    if not _all_finite(params):
        raise FloatingPointError(f"step {step}: the parameters are not finite")


@jax.jit
def _all_finite(params: dict[str, Any]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def _print_summary(config: RunConfig, corpus: Corpus, mesh: Mesh) -> None:
    counted = count_params(config.model)
    train, heldout = corpus.train, corpus.heldout
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"model    {config.model.kind}, {counted.total:,} parameters, "
        f"{counted.non_embedding:,} non-embedding\n"
        f"data     {train.token_count:,} tokens in {train.document_count:,} documents, held out "
        f"{heldout.token_count:,} in {len(heldout):,}\n"
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}{hosts}, mesh {shape}",
        flush=True,
    )
