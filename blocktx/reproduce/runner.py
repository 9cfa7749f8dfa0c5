"""Makes what studies ask for, once: each run and each measurement leaves a file when it is done."""

import dataclasses
import datetime
import json
import time
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath

from blocktx.benchmark import decode_throughput, random_model, with_room
from blocktx.checkpoint import has_checkpoint, load_params, save_params, tokenizer_file
from blocktx.config import RunConfig, to_dict
from blocktx.convert import uptrain
from blocktx.cost import count_params
from blocktx.data import prepare
from blocktx.evaluate import heldout_evaluation, position_curve, text_sums
from blocktx.files import write_atomic
from blocktx.model import build
from blocktx.parallel import create_mesh
from blocktx.reproduce.study import Results, Run, Speed, Study
from blocktx.train import TrainState, read, train

_FAILURES = (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError)


_REPEATS = 3  # of each measurement of speed, whose median counts


def run_all(
    studies: Iterable[Study], seeds: Iterable[int], workdir: epath.PathLike
) -> dict[str, str]:
    """Makes all that is missing, and prints what it is at; can be interrupted and called again.

    What fails is left out, and the rest is made.

    Args:
      studies: what to make; what several ask for is made once.
      seeds: of each run.
      workdir: a folder in which each run has its own, `runs/NAME-seedN`, as of `launch/train.py`
        and with a `result.json`; and measurements of speed theirs, `speeds/NAME.json`.

    Returns:
      What has failed, and why.
    """
    studies, seeds, workdir = list(studies), list(seeds), epath.Path(workdir)
    runs = {(run.name, seed): run for s in studies for run in s.runs for seed in seeds}
    # What others begin with comes first.
    order = sorted(runs, key=lambda key: runs[key].uptrained_from is not None)
    failed = {}
    for number, (name, seed) in enumerate(order, 1):
        run = runs[name, seed]
        try:
            if read_run(run, seed, workdir) is None:
                print(f"\nrun {number} of {len(order)}: {name}, seed {seed}", flush=True)
                _train(run, seed, workdir)
                # Else the programs of dozens of runs use up the mappings that a process can have.
                jax.clear_caches()
        except _FAILURES as error:
            failed[f"{name}, seed {seed}"] = str(error)
    for speed in {speed.name: speed for s in studies for speed in s.speeds}.values():
        try:
            if read_speed(speed, workdir) is None:
                print(f"\nspeed {speed.name}: {', '.join(speed.models)}", flush=True)
                _measure(speed, workdir)
        except _FAILURES as error:
            failed[f"speed {speed.name}"] = str(error)
    for what, why in failed.items():
        print(f"failed: {what}: {why}", flush=True)
    return failed


def collect(studies: Iterable[Study], seeds: Iterable[int], workdir: epath.PathLike) -> Results:
    """All results that are there.

    Raises:
      ValueError: as of `read_run`.
    """
    results, seeds = Results({}, {}), list(seeds)
    for study in studies:
        for run in study.runs:
            of_seeds = {str(seed): read_run(run, seed, workdir) for seed in seeds}
            results.runs[run.name] = {seed: found for seed, found in of_seeds.items() if found}
        for speed in study.speeds:
            if measured := read_speed(speed, workdir):
                results.speeds[speed.name] = measured
    return results


def read_run(run: Run, seed: int, workdir: epath.PathLike) -> dict[str, Any] | None:
    """The result of a run, if it is finished.

    It has `loss` (nats a token), `bits_per_byte`, `loss_by_position` in the block, `loss_by_place`
    in the context where the run asks for it (first token of a bin, loss), `steps`, `non_embedding`
    parameters, `seconds` (None if it was resumed), and `made`: on what and when.

    Raises:
      ValueError: it is of another configuration.
    """
    return _read(_folder(run.name, seed, workdir) / "result.json", _asked(run, seed))


def read_speed(speed: Speed, workdir: epath.PathLike) -> dict[str, Any] | None:
    """What was measured, if it was: `tokens_per_second` by model, `seconds` it took, and `made`.

    Raises:
      ValueError: it is of another configuration.
    """
    return _read(_speed_file(speed, workdir), _plain(speed._asdict()))


def _folder(name: str, seed: int, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "runs" / f"{name}-seed{seed}"


def _speed_file(speed: Speed, workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "speeds" / f"{speed.name}.json"


def _asked(run: Run, seed: int) -> dict[str, Any]:
    config = to_dict(dataclasses.replace(run.config, seed=seed))
    return _plain(run._asdict() | {"config": config})


def _plain(asked: Any) -> dict[str, Any]:
    """As it is read back from JSON."""
    return json.loads(json.dumps(asked, default=dataclasses.asdict))


def _read(path: epath.Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        made_for, result = saved["asked"], saved["result"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is damaged ({error}); remove it to make it again") from None
    if made_for != asked:
        what = path if path.parent.name == "speeds" else path.parent
        raise ValueError(
            f"{what}: was made with another configuration; remove it, or use another --workdir"
        )
    return result


def _write(path: epath.Path, asked: dict[str, Any], result: dict[str, Any] | None) -> None:
    if result is not None:
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        result = result | {"made": f"{datetime.date.today()}, {device}, jax {jax.__version__}"}
    if jax.process_index() == 0:
        write_atomic(path, json.dumps({"result": result, "asked": asked}, indent=2) + "\n")


def _train(run: Run, seed: int, workdir: epath.Path) -> None:
    folder, asked = _folder(run.name, seed, workdir), _asked(run, seed)
    config = dataclasses.replace(run.config, seed=seed)
    if config.data.holdout_every == 0:
        raise ValueError("config.data.holdout_every: got 0, but studies compare held-out losses")
    fresh, begin = not has_checkpoint(folder), time.monotonic()
    if run.uptrained_from is not None:
        start = folder.with_name(f"{folder.name}-start")
        training = dataclasses.replace(config.training, init_from=str(start))
        config = dataclasses.replace(config, training=training)
        if fresh:
            _make_start(_folder(run.uptrained_from.name, seed, workdir), config, start)
    if fresh:  # from now on the folder says what it is for
        _write(folder / "result.json", asked, None)
    elif not (folder / "result.json").exists():
        raise ValueError(f"{folder}: is not a run of a study; remove it")
    state = train(config, folder, resume=True)
    seconds = time.monotonic() - begin if fresh else None
    heldout = _heldout(config, state, folder)
    positions = range(1, config.model.block_length + 1)
    result = {
        "loss": heldout["heldout/loss"],
        "bits_per_byte": heldout["heldout/bits_per_byte"],
        "loss_by_position": [heldout[f"heldout/loss_at_{position}"] for position in positions],
        "steps": config.training.steps,
        "non_embedding": count_params(config.model).non_embedding,
        "seconds": seconds,
    }
    if run.curve_bin is not None:
        result["loss_by_place"] = _curve(config, state, run.curve_bin)
    _write(folder / "result.json", asked, result)


def _heldout(config: RunConfig, state: TrainState, folder: epath.Path) -> dict[str, float]:
    """The evaluation after the last step, made again if the run ended before it was written."""
    for line in reversed(read(folder)):
        if line["step"] == config.training.steps and line.get("heldout/loss") is not None:
            return line
    mesh = create_mesh(config.mesh)
    corpus = prepare(config.data, config.model.vocab_size)
    with jax.set_mesh(mesh):
        evaluate = heldout_evaluation(config, build(config.model), corpus, mesh)
        if evaluate is None:
            raise ValueError(f"{config.data.source}: no held-out text; studies compare its loss")
        return evaluate(config.training.steps, state.params)


def _make_start(vanilla: epath.Path, config: RunConfig, start: epath.Path) -> None:
    """What uptraining begins with, made from a vanilla run."""
    if jax.process_count() > 1:
        raise ValueError("a run that begins with another's parameters takes a single process")
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


def _curve(config: RunConfig, state: TrainState, bin_tokens: int) -> list[tuple[int, float]]:
    mesh = create_mesh(config.mesh)
    corpus = prepare(config.data, config.model.vocab_size)
    with jax.set_mesh(mesh):
        sums = text_sums(
            build(config.model),
            state.params,
            corpus.heldout,
            corpus.tokenizer.pad_id,
            mesh,
            batch_size=config.training.batch_size,
        )
    return [(found.begin, found.loss) for found in position_curve(sums, bin_tokens) if found.tokens]


def _measure(speed: Speed, workdir: epath.Path) -> None:
    if jax.process_count() > 1:
        raise ValueError("speed is measured by a single process")
    models, begin = [], time.monotonic()
    for name, config in speed.models.items():
        tokens = speed.prompt_tokens[name] + speed.new_tokens
        models.append(random_model(with_room(config, tokens, _dtype())))
    rates = decode_throughput(
        models,
        batch_size=speed.batch_size,
        prompt_tokens=[speed.prompt_tokens[name] for name in speed.models],
        new_tokens=speed.new_tokens,
        repeats=_REPEATS,
    )
    result = {
        "tokens_per_second": dict(zip(speed.models, rates, strict=True)),
        "seconds": time.monotonic() - begin,
    }
    _write(_speed_file(speed, workdir), _plain(speed._asdict()), result)


def _dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
