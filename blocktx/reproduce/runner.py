"""Make the runs and measurements of studies; each leaves a file when it is finished."""

import dataclasses
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from etils import epath

from blocktx import benchmark
from blocktx.checkpoint import has_checkpoint, load_params, save_params, tokenizer_file
from blocktx.config import RunConfig
from blocktx.convert import uptrain
from blocktx.cost import count_params, training_run
from blocktx.data import Corpus, prepare
from blocktx.evaluate import heldout_evaluation
from blocktx.files import write_atomic
from blocktx.model import Model, build
from blocktx.parallel import create_mesh
from blocktx.reproduce import asked
from blocktx.reproduce.context_use import context_use
from blocktx.reproduce.study import Results, Run, Speed, Study
from blocktx.train import TrainState, read, train

_FAILURES = (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError)
_REPEATS = 3  # of each measurement of speed
_NONE = Results({}, {})


def run_all(
    studies: Iterable[Study],
    seeds: Iterable[int],
    workdir: epath.PathLike,
    saved: Results = _NONE,
    finished: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Make all missing results, and print progress. It can be interrupted and called again.

    Studies are made in the given order, each with one seed after the other. A result that fails is
    skipped, and the others are made.

    Args:
      studies: what to make; a run that several studies share is made once.
      seeds: the seeds of each run.
      workdir: a folder with a run folder for each run, `runs/NAME-seedN`, as of `launch/train.py`
        and with a `result.json`, and a file for each measurement, `speeds/NAME.json`.
      saved: results of an earlier session, which are not made again.
      finished: called after each new result.

    Returns:
      The reason for each failure, by the name of what failed.
    """
    studies, seeds, workdir = list(studies), list(seeds), epath.Path(workdir)
    runs: dict[tuple[str, int], Run] = {}
    for study in studies:
        for seed in seeds:
            # Runs that others start from come first.
            for run in sorted(study.runs, key=lambda run: run.uptrained_from is not None):
                runs.setdefault((run.name, seed), run)
    failed = {}
    for number, ((name, seed), run) in enumerate(runs.items(), 1):
        try:
            if read_run(run, seed, workdir, saved) is None:
                print(f"\nrun {number} of {len(runs)}: {name}, seed {seed}", flush=True)
                _train(run, seed, workdir)
                # Programs of dozens of runs would exhaust the memory mappings of a process.
                jax.clear_caches()
                finished()
        except _FAILURES as error:
            failed[f"{name}, seed {seed}"] = str(error)
    for speed in {speed.name: speed for s in studies for speed in s.speeds}.values():
        try:
            if read_speed(speed, workdir, saved) is None:
                print(f"\nspeed {speed.name}: {', '.join(speed.models)}", flush=True)
                _measure(speed, workdir)
                finished()
        except _FAILURES as error:
            failed[f"speed {speed.name}"] = str(error)
    for what, why in failed.items():
        print(f"failed: {what}: {why}", flush=True)
    return failed


def collect(studies: Iterable[Study], workdir: epath.PathLike, saved: Results = _NONE) -> Results:
    """Return all finished results of the studies, of all seeds: in `workdir` or `saved`.

    Raises:
      ValueError: as of `read_run`.
    """
    results, workdir = Results({}, {}), epath.Path(workdir)
    for study in studies:
        for run in study.runs:
            folders = (workdir / "runs").glob(f"{run.name}-seed*")
            seeds = {int(seed) for seed in saved.runs.get(run.name, {})}
            seeds |= {
                int(seed) for f in folders if (seed := f.name.rpartition("seed")[2]).isdigit()
            }
            found = {str(seed): read_run(run, seed, workdir, saved) for seed in sorted(seeds)}
            results.runs[run.name] = {seed: result for seed, result in found.items() if result}
        for speed in study.speeds:
            if measured := read_speed(speed, workdir, saved):
                results.speeds[speed.name] = measured
    return results


def read_run(
    run: Run, seed: int, workdir: epath.PathLike, saved: Results = _NONE
) -> dict[str, Any] | None:
    """Return the result of a run, or None if it is not finished.

    It has `loss` (nats per token), `bits_per_byte`, `loss_by_position` in the block, `steps`,
    `tokens`, `flops` (counted, of training), `non_embedding` parameters, `cpu_seconds` of the
    process in training (None if the run was resumed), `made` (date and device), `asked` (the
    description of the run), and what `context_use` returns.

    Raises:
      ValueError: it was made with another configuration.
    """
    found = saved.runs.get(run.name, {}).get(str(seed))
    path = _folder(run.name, seed, workdir) / "result.json"
    return _read(path, found, f"run {run.name}, seed {seed}", asked.of_run(run, seed))


def read_speed(
    speed: Speed, workdir: epath.PathLike, saved: Results = _NONE
) -> dict[str, Any] | None:
    """Return a measurement, or None if it is not finished.

    It has `tokens_per_second` by model (medians), `repeats` by model (each tokens per second),
    `load` (mean number of runnable processes beside it), `made` and `asked`.

    Raises:
      ValueError: it was made with another configuration.
    """
    found = saved.speeds.get(speed.name)
    path = _speed_file(speed, workdir)
    return _read(path, found, f"speed {speed.name}", asked.of_speed(speed))


def _folder(name: str, seed: int, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "runs" / f"{name}-seed{seed}"


def _speed_file(speed: Speed, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "speeds" / f"{speed.name}.json"


def _read(
    path: epath.Path, saved: dict[str, Any] | None, what: str, description: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the result at `path`, else `saved`; checks that it is of the description."""
    result, where = saved, f"results.json: {what}"
    if path.exists():
        where = str(path if path.parent.name == "speeds" else path.parent)
        try:
            content = json.loads(path.read_text())
            made_for = content["asked"]
            if content["result"] is not None:
                result = content["result"] | {"asked": made_for}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: is damaged ({error}); remove it to make it again") from None
    elif saved is not None:
        made_for = saved["asked"]
    else:
        return None
    if field := asked.difference(made_for, description):
        raise ValueError(
            f"{where}: was made with another configuration ({field} differs); remove it, or use "
            "another --workdir and --output"
        )
    return result


def _write(path: epath.Path, description: dict[str, Any], result: dict[str, Any] | None) -> None:
    if result is not None:
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        result = result | {"made": f"{datetime.date.today()}, {device}, jax {jax.__version__}"}
    if jax.process_index() == 0:
        write_atomic(path, json.dumps({"result": result, "asked": description}, indent=2) + "\n")


def _train(run: Run, seed: int, workdir: epath.Path) -> None:
    folder, description = _folder(run.name, seed, workdir), asked.of_run(run, seed)
    config = dataclasses.replace(run.config, seed=seed)
    if config.data.holdout_every == 0:
        raise ValueError("config.data.holdout_every: got 0, but studies compare held-out losses")
    fresh = not has_checkpoint(folder)
    if run.uptrained_from is not None:
        start = folder.with_name(f"{folder.name}-start")
        training = dataclasses.replace(config.training, init_from=str(start))
        config = dataclasses.replace(config, training=training)
        if fresh:
            source = _folder(run.uptrained_from.name, seed, workdir)
            if not has_checkpoint(source):  # its result may be of an earlier session
                _train(run.uptrained_from, seed, workdir)
            _make_start(source, config, start)
    if fresh:  # the description makes the folder resumable
        _write(folder / "result.json", description, None)
    elif not (folder / "result.json").exists():
        raise ValueError(f"{folder}: is not a run of a study; remove it")
    begin = time.process_time()
    state = train(config, folder, resume=True)
    seconds = time.process_time() - begin if fresh else None
    heldout, used = _evaluate(config, state, folder)
    positions = range(1, config.model.block_length + 1)
    training = config.training
    result = {
        "loss": heldout["heldout/loss"],
        "bits_per_byte": heldout["heldout/bits_per_byte"],
        "loss_by_position": [heldout[f"heldout/loss_at_{position}"] for position in positions],
        "steps": training.steps,
        "tokens": training.steps * training.batch_size * config.model.context_length,
        "flops": training_run(config).flops,
        "non_embedding": count_params(config.model).non_embedding,
        "cpu_seconds": seconds,
    }
    _write(folder / "result.json", description, result | used)


def _evaluate(
    config: RunConfig, state: TrainState, folder: epath.Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the last evaluation, made again if the run ended before it, and the context's use."""
    mesh, model = create_mesh(config.mesh), build(config.model)
    corpus = prepare(config.data, config.model.vocab_size)
    with jax.set_mesh(mesh):
        used = context_use(
            model, state.params, corpus.heldout, mesh, batch_size=config.training.batch_size
        )
        for line in reversed(read(folder)):
            if line["step"] == config.training.steps and line.get("heldout/loss") is not None:
                return line, used
        return _heldout(config, model, corpus, state, mesh), used


def _heldout(
    config: RunConfig, model: Model, corpus: Corpus, state: TrainState, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    evaluate = heldout_evaluation(config, model, corpus, mesh)
    if evaluate is None:
        raise ValueError(f"{config.data.source}: no held-out text; studies compare its loss")
    return evaluate(config.training.steps, state.params)


def _make_start(vanilla: epath.Path, config: RunConfig, start: epath.Path) -> None:
    """Write the parameters that uptraining starts from, made from a vanilla run."""
    if jax.process_count() > 1:
        raise ValueError("a run that starts from another's parameters takes a single process")
    if start.exists():  # perhaps of another vanilla run
        start.rmtree()
    saved = load_params(vanilla)
    model, params = uptrain(
        saved.config.model,
        saved.params,
        method="partition",
        block_length=config.model.block_length,
        prefix_length=config.model.prefix_length,
    )
    save_params(
        start,
        dataclasses.replace(saved.config, model=model),
        params,
        tokenizer=tokenizer_file(vanilla),
    )


def _measure(speed: Speed, workdir: epath.Path) -> None:
    if jax.process_count() > 1:
        raise ValueError("speed is measured by a single process")
    models, loads = [], []
    for name, config in speed.models.items():
        tokens = speed.prompt_tokens[name] + speed.new_tokens
        models.append(benchmark.random_model(benchmark.with_room(config, tokens, _dtype())))
    repeats: dict[str, list[float]] = {name: [] for name in speed.models}
    for _ in range(_REPEATS):
        rates = benchmark.decode_throughput(
            models,
            batch_size=speed.batch_size,
            prompt_tokens=[speed.prompt_tokens[name] for name in speed.models],
            new_tokens=speed.new_tokens,
            repeats=1,
        )
        loads.append(os.getloadavg()[0])
        for name, rate in zip(speed.models, rates, strict=True):
            repeats[name].append(rate)
    result = {
        "tokens_per_second": {name: statistics.median(rates) for name, rates in repeats.items()},
        "repeats": repeats,
        "load": statistics.mean(loads),
    }
    _write(_speed_file(speed, workdir), asked.of_speed(speed), result)


def _dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
