"""Makes what studies ask for, once: each run and each measurement leaves a file when it is done."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath

from blocktx import benchmark, checkpoint, metrics
from blocktx.checkpoint_folder import has_checkpoint
from blocktx.config import RunConfig, to_dict
from blocktx.convert.uptrain import uptrain
from blocktx.cost import count_params
from blocktx.data.corpus import prepare
from blocktx.evaluate import text_sums
from blocktx.model import build
from blocktx.position_curve import position_curve
from blocktx.reproduce.study import Results, Run, Speed, Study
from blocktx.run_folder import write_whole
from blocktx.sharding import create_mesh
from blocktx.step import TrainState
from blocktx.train import train

_REPEATS = 3  # of each measurement of speed, whose median counts


def run_all(studies: Iterable[Study], seeds: Iterable[int], workdir: epath.PathLike) -> None:
    """Makes all that is missing, and prints what it is at; can be interrupted and called again.

    Args:
      studies: what to make; what several ask for is made once.
      seeds: of each run.
      workdir: a folder in which each run has its own, `runs/NAME-seedN`, as of `launch/train.py`
        and with a `result.json`; and measurements of speed theirs, `speeds/NAME.json`.

    Raises:
      ValueError: what is there was made with another configuration.
      All that `blocktx.train.train` raises.
    """
    studies, seeds = list(studies), list(seeds)
    runs = {(run.name, seed): run for s in studies for run in s.runs for seed in seeds}
    # What others begin with comes first.
    order = sorted(runs, key=lambda key: runs[key].uptrained_from is not None)
    for number, (name, seed) in enumerate(order, 1):
        if read_run(runs[name, seed], seed, workdir) is None:
            print(f"\nrun {number} of {len(order)}: {name}, seed {seed}", flush=True)
            _train(runs[name, seed], seed, epath.Path(workdir))
            # Else the programs of dozens of runs use up the mappings that a process can have.
            jax.clear_caches()
    for speed in {speed.name: speed for s in studies for speed in s.speeds}.values():
        if read_speed(speed, workdir) is None:
            if jax.process_count() > 1:
                print(f"speed {speed.name}: left out, is measured in a single process only")
                continue
            print(f"\nspeed {speed.name}: {', '.join(speed.models)}", flush=True)
            _measure(speed, epath.Path(workdir))


def collect(studies: Iterable[Study], seeds: Iterable[int], workdir: epath.PathLike) -> Results:
    """All results that are there."""
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
    in the context where the run asks for it, `steps`, `non_embedding` parameters, `seconds`.

    Raises:
      ValueError: it is of another configuration.
    """
    return _read(_folder(run.name, seed, workdir) / "result.json", _asked(run, seed))


def read_speed(speed: Speed, workdir: epath.PathLike) -> dict[str, float] | None:
    """Generated tokens a second of each model, if they are measured.

    Raises:
      ValueError: they are of another configuration.
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
        found, made_for = saved["result"], saved["asked"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is damaged ({error}); remove it to make it again") from None
    if made_for != asked:
        raise ValueError(
            f"{path.parent}: what {path.name} holds was made with another configuration; use "
            "another --workdir, or remove it"
        )
    return found


def _write(path: epath.Path, asked: dict[str, Any], result: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(path, json.dumps({"result": result, "asked": asked}, indent=2) + "\n")


def _train(run: Run, seed: int, workdir: epath.Path) -> None:
    folder = _folder(run.name, seed, workdir)
    config = dataclasses.replace(run.config, seed=seed)
    if run.uptrained_from is not None:
        config = _begin_with(_folder(run.uptrained_from, seed, workdir), config, folder)
    fresh, begin = not has_checkpoint(folder), time.monotonic()
    state = train(config, folder, resume=True)
    seconds = time.monotonic() - begin if fresh else None  # of the whole run, or not known
    last = next(line for line in reversed(metrics.read(folder)) if "heldout/loss" in line)
    positions = range(1, config.model.block_length + 1)
    result = {
        "loss": last["heldout/loss"],
        "bits_per_byte": last["heldout/bits_per_byte"],
        "loss_by_position": [last[f"heldout/loss_at_{position}"] for position in positions],
        "steps": config.training.steps,
        "non_embedding": count_params(config.model).non_embedding,
        "seconds": seconds,
    }
    if run.curve_bin is not None:
        result["loss_by_place"] = _curve(config, state, run.curve_bin)
    _write(folder / "result.json", _asked(run, seed), result)


def _begin_with(vanilla: epath.Path, config: RunConfig, folder: epath.Path) -> RunConfig:
    """`config` from the parameters that uptraining begins with, made from a vanilla run's."""
    start = folder.with_name(f"{folder.name}-start")
    if not has_checkpoint(start):
        if jax.process_count() > 1:
            raise ValueError(
                f"{start}: not found, and is made by a single process only: python "
                f"launch/convert.py uptrain --from={vanilla} --method=partition "
                f"--block-length={config.model.block_length} --output={start}"
            )
        saved = checkpoint.load_params(vanilla)
        model, params = uptrain(
            saved.config.model,
            saved.params,
            method="partition",
            block_length=config.model.block_length,
            prefix_length=config.model.prefix_length,
        )
        checkpoint.save_params(
            start,
            dataclasses.replace(saved.config, model=model),
            params,
            tokenizer=checkpoint.tokenizer_file(vanilla),
        )
    training = dataclasses.replace(config.training, init_from=str(start))
    return dataclasses.replace(config, training=training)


def _curve(config: RunConfig, state: TrainState, bin_tokens: int) -> list[float]:
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
    return [found.loss for found in position_curve(sums, bin_tokens) if math.isfinite(found.loss)]


def _measure(speed: Speed, workdir: epath.Path) -> None:
    models = []
    for name, config in speed.models.items():
        tokens = speed.prompt_tokens[name] + speed.new_tokens
        models.append(benchmark.random_model(benchmark.with_room(config, tokens, _dtype())))
    rates = benchmark.decode_throughput(
        models,
        batch_size=speed.batch_size,
        prompt_tokens=[speed.prompt_tokens[name] for name in speed.models],
        new_tokens=speed.new_tokens,
        repeats=_REPEATS,
    )
    result = dict(zip(speed.models, rates, strict=True))
    _write(_speed_file(speed, workdir), _plain(speed._asdict()), result)


def _dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
