r"""Try the paper's findings: train and measure what each of them needs, and write a report.

    python launch/reproduce.py --study=block_length --scale=cpu --workdir=runs/reproduce

--study=all makes all of the paper's; a run that several studies share is trained once. Further
studies, of what the paper leaves open, are made if they are named. --dry_run lists the runs. The
results, results.json, are written to --output after each finished run, and the report, README.md
with pictures, at the end; --report_only makes the report again from results.json alone.

After Ctrl-C or SIGKILL the same command resumes: finished runs, in --workdir or in the results.json
of --output, are not repeated. Several processes can share both folders if their studies or seeds
differ.

--scale=cpu is for a laptop; --scale=paper has the paper's sizes and 300B tokens a run, and reads
configs/paper.py: set its data up first. On a pod, start this on every host; then once more in a
single process with a device, which makes what takes one: speeds, and the uptrained run.
"""

import pathlib

import jax
from absl import flags
from etils import epath

from blocktx import command_line, cost
from blocktx.config import RunConfig
from blocktx.parallel import initialize
from blocktx.reproduce import (
    FURTHER,
    RESULTS,
    SCALES,
    STUDIES,
    Base,
    Results,
    Study,
    collect,
    read_results,
    read_run,
    read_speed,
    run_all,
    write_report,
    write_results,
)

_ROOT = pathlib.Path(__file__).parents[1]

_STUDY = flags.DEFINE_list(
    "study", None, f"all, or some of {', '.join(STUDIES)}; further: {', '.join(FURTHER)}."
)
_SCALE = flags.DEFINE_enum("scale", "cpu", [*SCALES], "How large the models are.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "The folder of the runs.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder of the report; None: --workdir.")
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "Of the block model; others in proportion. None: as the scale has.",
    lower_bound=10,
)
_SEEDS = flags.DEFINE_list("seeds", None, "As in 0,1,2; None: those of the scale.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs, and whether they are finished.")
_SPEEDS = flags.DEFINE_bool("speeds", True, "Measure decoding, too. It takes an idle machine.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Make the report from its results.json.")


def _chosen(studies: dict[str, Study]) -> list[Study]:
    names = list(STUDIES) if _STUDY.value == ["all"] else _STUDY.value
    for name in names or [""]:
        if name not in studies:
            raise ValueError(f"--study: got {name!r}; use all, or some of {', '.join(studies)}")
    return [studies[name] for name in names]


def _seeds(default: tuple[int, ...]) -> list[int]:
    if _SEEDS.value is None:
        return list(default)
    if not (_SEEDS.value and all(seed.isdecimal() for seed in _SEEDS.value)):
        raise ValueError(f"--seeds: got {','.join(_SEEDS.value)!r}, expected numbers, as in 0,1")
    return sorted({int(seed) for seed in _SEEDS.value})


def _list(studies: list[Study], seeds: list[int], saved: Results) -> None:
    print(f"{'run':36} {'seed':>4} {'steps':>8} {'tokens':>16} {'FLOPs':>8}")
    for run in {run.name: run for study in studies for run in study.runs}.values():
        training, model = run.config.training, run.config.model
        tokens = training.steps * training.batch_size * model.context_length
        flops = cost.training_run(run.config).flops
        for seed in seeds:
            result = read_run(run, seed, _WORKDIR.value, saved)
            done = "" if result is None else "  finished"
            print(f"{run.name:36} {seed:>4} {training.steps:>8} {tokens:>16,} {flops:8.1e}{done}")
    for speed in {speed.name: speed for study in studies for speed in study.speeds}.values():
        done = "" if read_speed(speed, _WORKDIR.value, saved) is None else "  finished"
        print(f"speed of {', '.join(speed.models)}: batch {speed.batch_size}{done}")


def _read_config(spec: str) -> RunConfig:
    return command_line.read_config(str(_ROOT / spec))


def _saved(output: str, flags_: str, required: bool) -> Results:
    """Return the results in `output`; if they are not required, perhaps none."""
    if not required and not (epath.Path(output) / RESULTS).exists():
        return Results({}, {})
    results, made_with = read_results(output)
    if made_with != flags_:
        raise ValueError(f"{output} has results of {made_with}, and {flags_} is asked for")
    return results


def main() -> None:
    scale = SCALES[_SCALE.value]
    base = Base.read(scale, _read_config, _STEPS.value)
    studies = {name: study(base) for name, study in (STUDIES | FURTHER).items()}
    chosen, seeds = _chosen(studies), _seeds(scale.seeds)
    flags_ = f"--scale={_SCALE.value}" + (f" --steps={_STEPS.value}" if _STEPS.value else "")
    output, failed = _OUTPUT.value or _WORKDIR.value, {}
    results = _saved(output, flags_, required=_REPORT_ONLY.value)
    if _DRY_RUN.value:
        _list(chosen, seeds, results)
        return
    if not _REPORT_ONLY.value:
        initialize("auto")

        def save() -> None:  # other processes may have written since
            everything = collect(
                studies.values(), _WORKDIR.value, _saved(output, flags_, required=False)
            )
            if jax.process_index() == 0:
                write_results(output, everything, flags_)

        if not _SPEEDS.value:
            chosen = [study._replace(speeds=[]) for study in chosen]
        failed = run_all(chosen, seeds, _WORKDIR.value, results, save)
        if jax.process_index():
            return
        save()
        results = _saved(output, flags_, required=True)
    print(write_report(output, studies.values(), results, flags_, seeds))
    if failed:
        raise ValueError(f"{len(failed)} failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    command_line.run(main, required=("study",))
