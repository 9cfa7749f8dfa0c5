"""The studies of the paper's findings, at a tiny scale: run, interrupted, and reported."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_run import run_config

from blocktx import metrics
from blocktx.model_config import BlockConfig, StackConfig, VanillaConfig
from blocktx.reproduce import runner
from blocktx.reproduce.report import read_results, write_report, write_results
from blocktx.reproduce.scale import SCALES, Base
from blocktx.reproduce.studies import STUDIES
from blocktx.reproduce.study import holds, lower

ROOT = pathlib.Path(__file__).parents[1]
FACTS = {"hardware": "a test", "date": "today"}
SHARED = dict(vocab_size=300, context_length=32)
HALF = StackConfig(layers=3, width=32, heads=4)
BLOCK = BlockConfig(**SHARED, block_decoder=HALF, token_decoder=HALF)
VANILLA = VanillaConfig(**SHARED, decoder=StackConfig(layers=6, width=32, heads=4))


@pytest.fixture
def base(data) -> Base:
    run = run_config(data, steps=10)
    megabyte = dataclasses.replace(BLOCK, conditioning="summation")
    scale = SCALES["cpu"]._replace(
        long_context=64, curve_bin=8, long_prompt=32, prompt_tokens=8, new_tokens=4, batch_size=2
    )
    return Base(
        scale=scale,
        block=dataclasses.replace(run, model=BLOCK),
        vanilla=dataclasses.replace(run, model=VANILLA),
        megabyte=dataclasses.replace(run, model=megabyte),
        equal_flops_vanilla=dataclasses.replace(run, model=VANILLA),
        equal_flops_blocks={"block": dataclasses.replace(run, model=BLOCK)},
        fast_block=BLOCK,
        fast_vanilla=VANILLA,
        fast_megabyte=megabyte,
    )


class Trained:
    """Stands for `train`: counts, leaves what a run leaves, and stops when it is told to."""

    def __init__(self):
        self.names: list[str] = []
        self.stop_at: int | None = None

    def __call__(self, config, workdir, *, resume):
        assert resume
        if len(self.names) == self.stop_at:
            raise SystemExit(130)
        self.names.append(workdir.name)
        loss = 5 - len(self.names) / 10
        positions = range(1, config.model.block_length + 1)
        values = {"heldout/loss": loss, "heldout/bits_per_byte": 2.0}
        with metrics.MetricsWriter(workdir) as writer:
            writer.write(
                config.training.steps, values | {f"heldout/loss_at_{k}": loss for k in positions}
            )


def test_nothing_finished_is_repeated_after_an_interruption(base, tmp_path, monkeypatch):
    trained = Trained()
    monkeypatch.setattr(runner, "train", trained)
    studies = [STUDIES["embedder"](base), STUDIES["conditioning"](base)]
    trained.stop_at = 5
    with pytest.raises(SystemExit):
        runner.run_all(studies, [0, 1], tmp_path)
    assert len(trained.names) == 5
    half = runner.collect(studies, [0, 1], tmp_path)
    assert sum(map(len, half.runs.values())) == 5
    page = write_report(tmp_path, studies, half, FACTS, [0, 1]).read_text()
    assert page.count("not run") == 2

    trained.stop_at = None
    runner.run_all(studies, [0, 1], tmp_path)
    runs = {run.name for study in studies for run in study.runs}
    wanted = {f"{name}-seed{seed}" for name in runs for seed in (0, 1)}
    assert set(trained.names) == wanted
    assert len(trained.names) == len(wanted)  # what both studies ask for once, too
    runner.run_all(studies, [0, 1], tmp_path)
    assert len(trained.names) == len(wanted)


def test_report_is_made_from_results_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", Trained())
    studies = [STUDIES["allocation"](base), STUDIES["position_loss"](base)]
    runner.run_all(studies, [0, 1], tmp_path / "runs")
    results = runner.collect(studies, [0, 1], tmp_path / "runs")
    write_results(tmp_path / "a", results, FACTS)
    first = write_report(tmp_path / "a", studies, results, FACTS, [0, 1])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_bytes((tmp_path / "a" / "results.json").read_bytes())
    again = write_report(tmp_path / "b", studies, *read_results(tmp_path / "b"), [0, 1])
    assert first.read_text() == again.read_text()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "README.md",
        "results.json",
        "allocation.png",
        "position_loss.png",
    }
    for link in ("](allocation.png)", "](position_loss.png)", "](#allocation)", "a test"):
        assert link in first.read_text()


def test_uptraining_begins_with_the_vanilla_run(base, tmp_path):
    study = STUDIES["uptraining"](base)
    runner.run_all([study], [0], tmp_path)
    results = runner.collect([study], [0], tmp_path)
    assert all(results.losses(run.name) for run in study.runs)
    assert results.losses("scratch_tenth", "steps") == [1]
    # A step does not undo what it began with: far nearer to the vanilla model than a new one is.
    vanilla, new = results.loss("vanilla"), results.loss("scratch_tenth")
    assert abs(results.loss("uptrained_tenth") - vanilla) < new - vanilla
    lines = metrics.read(tmp_path / "runs" / "uptrained_tenth-seed0")
    assert results.losses("uptrained_tenth") == [lines[-1]["heldout/loss"]]
    assert write_report(tmp_path, [study], results, FACTS, [0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study(name, base, tmp_path):
    study = STUDIES[name](base)
    runner.run_all([study], [0], tmp_path)
    results = runner.collect([study], [0], tmp_path)
    page = write_report(tmp_path, [study], results, FACTS, [0]).read_text()
    assert "not run" not in page
    found = study.find(results)
    assert found.checks
    for check in found.checks:
        assert check.statement in page
    for chart in found.charts:
        assert (tmp_path / f"{chart.name}.png").exists()


def test_a_run_of_another_configuration_is_not_taken(base, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", Trained())
    (run, *_) = STUDIES["embedder"](base).runs
    study = STUDIES["embedder"](base)._replace(runs=[run])
    runner.run_all([study], [0], tmp_path)
    longer = dataclasses.replace(run.config.training, steps=11)
    other = run._replace(config=dataclasses.replace(run.config, training=longer))
    with pytest.raises(ValueError, match="another configuration; use another --workdir"):
        runner.run_all([study._replace(runs=[other])], [0], tmp_path)
    (tmp_path / "runs" / f"{run.name}-seed0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: is damaged"):
        runner.run_all([study], [0], tmp_path)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.1], [1.2, 1.2], "agrees"),
        ([1.2, 1.2], [1.0, 1.1], "disagrees"),
        ([1.0, 1.3], [1.2, 1.2], "undecided"),
        ([1.0], [1.2], "agrees"),
        ([1.0], [1.0005], "undecided"),
    ],
)
def test_seeds_that_contradict_each_other_decide_nothing(a, b, verdict):
    assert lower(a, b, "a is lower").verdict == verdict


def test_holds():
    assert holds(True, "it is", "1").verdict == "agrees"
    assert holds(False, "it is", "0").verdict == "disagrees"


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the studies first"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"runs": {}}))
    with pytest.raises(ValueError, match="is not what studies leave"):
        read_results(tmp_path)


def launch(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/reproduce.py", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # libtpu, if there, has much to say
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("scale", SCALES)
def test_launch_lists_the_runs_of_each_scale(scale, tmp_path):
    done = launch("--study=all", f"--scale={scale}", "--dry_run", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("ratio_5_1_length_4", "length_8", "embedder_cls", "uptrained_tenth", "megabyte"):
        assert f"\n{name} " in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--study=blocks"], "--study: got 'blocks'; use all, or some of allocation, "),
        (["--study=all", "--seeds=a"], "--seeds: got 'a', expected numbers"),
        (["--study=all", "--report_only", "--output=nowhere"], "run the studies first"),
        ([], "--study is missing"),
    ],
)
def test_launch_refuses(flags, message):
    done = launch(*flags)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
