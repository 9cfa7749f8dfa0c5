"""The studies of the paper's findings, at a tiny scale: run, interrupted, and reported."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx import cost
from blocktx.command_line import read_config
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.data import prepare
from blocktx.parallel import create_mesh
from blocktx.reproduce import asked, context_use, runner
from blocktx.reproduce.report import read_results, write_report, write_results
from blocktx.reproduce.scale import SCALES, Base
from blocktx.reproduce.studies import FURTHER, STUDIES
from blocktx.reproduce.study import Results, holds, lower
from blocktx.train.loop import train
from blocktx.train.metrics import MetricsWriter, read
from tests.helpers.tiny_run import run_config

ROOT = pathlib.Path(__file__).parents[2]
SHARED = dict(vocab_size=300, context_length=32)
HALF = StackConfig(layers=3, width=32, heads=4)
BLOCK = BlockConfig(**SHARED, block_decoder=HALF, token_decoder=HALF)
VANILLA = VanillaConfig(**SHARED, decoder=StackConfig(layers=6, width=32, heads=4))


@pytest.fixture
def base(data) -> Base:
    run = run_config(data, steps=10)
    megabyte = dataclasses.replace(BLOCK, conditioning="summation")
    scale = SCALES["cpu"]._replace(
        long_context=64,
        long_prompt=32,
        prompt_tokens=8,
        new_tokens=4,
        batch_size=2,
        frontier_settings={"prefill_heavy": (8, 4), "decode_heavy": (4, 8)},
    )
    small = dataclasses.replace(VANILLA, decoder=dataclasses.replace(HALF, layers=2))
    return Base(
        scale=scale,
        block=dataclasses.replace(run, model=BLOCK),
        vanilla=dataclasses.replace(run, model=VANILLA),
        smaller_block=dataclasses.replace(run, model=BLOCK),
        smaller_vanilla=dataclasses.replace(run, model=VANILLA),
        megabyte=dataclasses.replace(run, model=megabyte),
        equal_flops_vanilla=dataclasses.replace(run, model=VANILLA),
        equal_flops_blocks={"flops_block": dataclasses.replace(run, model=BLOCK)},
        frontier={
            "vanilla": dataclasses.replace(run, model=VANILLA),
            "small": dataclasses.replace(run, model=small),
            "block": dataclasses.replace(run, model=BLOCK),
        },
        fast_block=BLOCK,
        fast_vanilla=VANILLA,
        fast_megabyte=megabyte,
    )


class Trained:
    """Stands for `train`: counts, leaves what a run leaves, and stops when it is told to."""

    def __init__(self):
        self.names: list[str] = []
        self.stop_at: int | None = None
        self.fail = ""

    def install(self, monkeypatch):
        monkeypatch.setattr(runner, "train", self)
        monkeypatch.setattr(runner, "context_use", lambda *_, **__: {"fall": [0, 0]})

    def __call__(self, config, workdir, *, resume):
        assert resume
        if workdir.name == self.fail:
            raise FloatingPointError("step 3: the loss is nan")
        if len(self.names) == self.stop_at:
            raise SystemExit(130)
        self.names.append(workdir.name)
        loss = 5 - len(self.names) / 10
        positions = range(1, config.model.block_length + 1)
        values = {"heldout/loss": loss, "heldout/bits_per_byte": 2.0}
        with MetricsWriter(workdir) as writer:
            writer.write(
                config.training.steps, values | {f"heldout/loss_at_{k}": loss for k in positions}
            )
        return types.SimpleNamespace(params=None)


def test_nothing_finished_is_repeated_after_an_interruption(base, tmp_path, monkeypatch):
    trained = Trained()
    trained.install(monkeypatch)
    studies = [STUDIES["embedder"](base), STUDIES["conditioning"](base)]
    trained.stop_at = 5
    with pytest.raises(SystemExit):
        runner.run_all(studies, [0, 1], tmp_path)
    assert len(trained.names) == 5
    half = runner.collect(studies, tmp_path)
    assert sum(map(len, half.runs.values())) == 5
    page = write_report(tmp_path, studies, half, "--scale=cpu", [0, 1]).read_text()
    assert "## embedder" in page  # with one seed
    assert page.count("not finished") == 1

    trained.stop_at = None
    runner.run_all(studies, [0, 1], tmp_path)
    runs = {run.name for study in studies for run in study.runs}
    wanted = {f"{name}-seed{seed}" for name in runs for seed in (0, 1)}
    assert set(trained.names) == wanted
    assert len(trained.names) == len(wanted)  # what both studies ask for once, too
    runner.run_all(studies, [0, 1], tmp_path)
    assert len(trained.names) == len(wanted)


def test_report_is_made_from_results_alone(base, tmp_path, monkeypatch):
    Trained().install(monkeypatch)
    studies = [STUDIES["allocation"](base), STUDIES["position_loss"](base)]
    runner.run_all(studies, [0, 1], tmp_path / "runs")
    results = runner.collect(studies, tmp_path / "runs")
    write_results(tmp_path / "a", results, "--scale=cpu")
    first = write_report(tmp_path / "a", studies, results, "--scale=cpu", [0, 1])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_bytes((tmp_path / "a" / "results.json").read_bytes())
    read, scale = read_results(tmp_path / "b")
    again = write_report(tmp_path / "b", studies, read, scale, [0, 1])
    assert first.read_text() == again.read_text()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "README.md",
        "results.json",
        "allocation.png",
        "position_loss.png",
    }
    made = next(iter(results.runs["length_4"].values()))["made"]
    for link in ("](allocation.png)", "](position_loss.png)", "](#allocation)", made):
        assert link in first.read_text()


@pytest.mark.slow
def test_uptraining_begins_with_the_vanilla_run(base, tmp_path):
    study = STUDIES["uptraining"](base)
    runner.run_all([study], [0], tmp_path)
    results = runner.collect([study], tmp_path)
    assert all(results.values(run.name) for run in study.runs)
    assert results.values("scratch_tenth", "steps") == [1]
    # A step does not undo what it began with: far nearer to the vanilla model than a new one is.
    (vanilla,), (new,) = results.values("vanilla"), results.values("scratch_tenth")
    assert abs(results.values("uptrained_tenth")[0] - vanilla) < new - vanilla
    lines = read(tmp_path / "runs" / "uptrained_tenth-seed0")
    assert results.values("uptrained_tenth") == [lines[-1]["heldout/loss"]]
    assert write_report(tmp_path, [study], results, "--scale=cpu", [0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STUDIES, *FURTHER])
def test_every_study(name, base, tmp_path):
    study = (STUDIES | FURTHER)[name](base)
    runner.run_all([study], [0], tmp_path)
    results = runner.collect([study], tmp_path)
    page = write_report(tmp_path, [study], results, "--scale=cpu", [0]).read_text()
    assert "| not finished" not in page
    found = study.find(results)
    assert found.checks
    for check in found.checks:
        assert check.statement in page
    for chart in found.charts:
        assert (tmp_path / f"{chart.name}.png").exists()
    if study.runs:
        for result in results.runs[study.runs[0].name].values():
            assert len(result["fall"]) == len(result["exchange"]) == 2


def test_a_run_of_another_configuration_is_not_taken(base, tmp_path, monkeypatch):
    Trained().install(monkeypatch)
    (run, *_) = STUDIES["embedder"](base).runs
    study = STUDIES["embedder"](base)._replace(runs=[run])
    runner.run_all([study], [0], tmp_path)
    optimizer = dataclasses.replace(run.config.optimizer, learning_rate=1e-4)
    other = run._replace(config=dataclasses.replace(run.config, optimizer=optimizer))
    result = tmp_path / "runs" / f"{run.name}-seed0" / "result.json"
    failed = runner.run_all([study._replace(runs=[other])], [0], tmp_path)
    assert failed == {
        f"{run.name}, seed 0": f"{result.parent}: was made with another configuration "
        "(config.optimizer.learning_rate differs); remove it, or use another --workdir and --output"
    }
    with pytest.raises(ValueError, match="another configuration"):
        runner.collect([study._replace(runs=[other])], tmp_path)
    result.write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: is damaged"):
        runner.collect([study], tmp_path)


def test_a_field_with_a_default_that_is_added_or_removed_leaves_results_readable(base):
    """Of whichever config class; a value other than the default is another run."""
    (run, *_) = STUDIES["uptraining"](base).runs[2:3]  # uptrained: two configurations
    now = asked.of_run(run, 0)
    assert asked.difference(now, now) is None
    for section in ("", "model", "data", "optimizer", "training", "loss"):
        for path in ((), ("uptrained_from",)):
            old = json.loads(json.dumps(now))
            fields = old
            for name in (*path, "config", *([section] if section else [])):
                fields = fields[name]
            fields["new_field"] = "value"
            name = ".".join((*path, "config", *([section] if section else []), "new_field"))
            assert asked.difference(old, now) is None  # removed since, and was at its default
            assert asked.difference(now, old) is None  # added since, and is at its default
            changed = old | {"not_default": [*old["not_default"], name]}
            assert asked.difference(changed, now) == name
            assert asked.difference(now, changed) == name


def test_what_changes_no_result_is_not_compared(base):
    run = STUDIES["embedder"](base).runs[0]
    training = dataclasses.replace(run.config.training, log_every=7, checkpoint_every=3)
    data = dataclasses.replace(run.config.data, cache_dir="elsewhere")
    model = dataclasses.replace(run.config.model, remat="full")
    config = dataclasses.replace(run.config, training=training, data=data, model=model)
    assert (
        asked.difference(asked.of_run(run, 0), asked.of_run(run._replace(config=config), 0)) is None
    )
    other = asked.of_run(run, 1)
    assert asked.difference(asked.of_run(run, 0), other) == "config.seed"


def test_results_of_an_earlier_session_are_not_made_again(base, tmp_path, monkeypatch):
    trained = Trained()
    trained.install(monkeypatch)
    study = STUDIES["embedder"](base)
    runner.run_all([study], [0], tmp_path / "first")
    saved = runner.collect([study], tmp_path / "first")
    saved = json.loads(json.dumps(dataclasses.asdict(saved)))
    saved = Results(saved["runs"], saved["speeds"])
    made = len(trained.names)
    runner.run_all([study], [0], tmp_path / "second", saved)
    assert len(trained.names) == made
    assert runner.collect([study], tmp_path / "second", saved).runs == saved.runs
    runner.run_all([study], [0, 1], tmp_path / "second", saved)
    assert len(trained.names) == 2 * made
    assert {
        len(of) for of in runner.collect([study], tmp_path / "second", saved).runs.values()
    } == {2}


def test_killed_at_any_point_it_goes_on(base, tmp_path, monkeypatch):
    """What is on disk after SIGKILL: no result, a folder begun, or a result not yet collected."""
    trained = Trained()
    trained.install(monkeypatch)
    study = STUDIES["embedder"](base)
    collected = []

    def killed():
        collected.append(runner.collect([study], tmp_path))
        raise KeyboardInterrupt  # after the result is written, before anyone hears of it

    for finished in range(1, len(study.runs) + 1):
        with pytest.raises(KeyboardInterrupt):
            runner.run_all([study], [0], tmp_path, finished=killed)
        assert len(trained.names) == len(set(trained.names)) == finished
    runner.run_all([study], [0], tmp_path, finished=killed)  # nothing is left
    assert [sum(map(len, results.runs.values())) for results in collected] == [1, 2, 3]


def test_an_unfinished_run_of_another_configuration_is_not_gone_on_with(base, tmp_path):
    study = STUDIES["embedder"](base)
    (run, *_) = study.runs
    config = dataclasses.replace(run.config, seed=0)
    train(config, tmp_path / "runs" / f"{run.name}-seed0")  # not by a study
    (problem,) = runner.run_all([study._replace(runs=[run])], [0], tmp_path).values()
    assert problem.endswith("is not a run of a study; remove it")


def test_a_run_that_ended_before_its_last_evaluation(base, tmp_path):
    study = STUDIES["embedder"](base)
    study = study._replace(runs=study.runs[:1])
    name = study.runs[0].name
    runner.run_all([study], [0], tmp_path)
    wanted = runner.collect([study], tmp_path).values(name)
    folder = tmp_path / "runs" / f"{name}-seed0"
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"result": None}))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "heldout/loss" not in line]
    (folder / "metrics.jsonl").write_text("".join(kept))
    assert runner.run_all([study], [0], tmp_path) == {}
    results = runner.collect([study], tmp_path)
    assert results.values(name) == pytest.approx(wanted, rel=1e-6)
    assert results.values(name, "cpu_seconds") == [None]


def test_what_fails_is_named_and_the_rest_is_made(base, tmp_path, monkeypatch, capsys):
    trained = Trained()
    trained.fail = "embedder_cls-seed0"
    trained.install(monkeypatch)
    study = STUDIES["embedder"](base)
    assert runner.run_all([study], [0], tmp_path) == {
        "embedder_cls, seed 0": "step 3: the loss is nan"
    }
    assert "failed: embedder_cls, seed 0: step 3: the loss is nan" in capsys.readouterr().out
    assert len(trained.names) == len(study.runs) - 1


def made_up(study, losses, **values):
    """Results of a study whose runs have these losses, one a seed, and else what is given."""
    common = {"steps": 1, "tokens": 1, "flops": 1.0, "non_embedding": 1, "cpu_seconds": 1.0}
    made_for = {"config": {"model": {"vocab_size": 300, "context_length": 32}}}
    common |= {"bits_per_byte": 1.0, "made": "", "asked": made_for} | values
    runs = {
        name: {str(seed): common | {"loss": loss} for seed, loss in enumerate(of_seeds)}
        for name, of_seeds in losses.items()
    }
    return Results(runs, {})


def verdicts(found):
    return [check.verdict for check in found.checks]


def test_allocation_finds_a_u(base):
    study = STUDIES["allocation"](base)
    at = {"5_1": 3.3, "2_1": 3.1, "1_2": 3.15, "1_5": 3.4}
    losses = {f"ratio_{ratio}_length_4": [loss, loss + 0.1] for ratio, loss in at.items()}
    losses |= {"length_4": [3.0, 3.1]}
    found = study.find(made_up(study, losses))
    assert verdicts(found) == ["agrees"] * 6
    assert list(found.charts[0].ticks.values()) == ["5:1", "2:1", "1:1", "1:2", "1:5"]
    losses["length_4"] = [3.2, 3.3]  # worse than 2:1 and 1:2
    assert verdicts(study.find(made_up(study, losses)))[:4] == [
        "agrees",
        "disagrees",
        "disagrees",
        "agrees",
    ]


@pytest.mark.parametrize(("long_block", "verdict"), [(3.4, "agrees"), (2.9, "disagrees")])
def test_allocation_by_length_compares_leads(base, long_block, verdict):
    study = STUDIES["allocation_by_length"](base)
    losses = {f"length_{n}": [3.0, 3.1] for n in (2, 4, 8)}
    losses |= {f"ratio_{ratio}_length_4": [3.2, 3.3] for ratio in ("5_1", "1_5")}
    losses |= {"ratio_5_1_length_2": [3.1, 3.2], "ratio_1_5_length_2": [3.2, 3.3]}
    losses |= {"ratio_5_1_length_8": [long_block, long_block + 0.1]}
    losses |= {"ratio_1_5_length_8": [3.2, 3.3]}
    assert verdicts(study.find(made_up(study, losses))) == [verdict]


@pytest.mark.parametrize(
    ("lead", "verdict"), [(0.3, "agrees"), (0.1, "undecided"), (0, "disagrees")]
)
def test_growth_compares_leads_at_two_scales(base, lead, verdict):
    """1:1 leads by 0.1 in the smaller model."""
    study = STUDIES["growth"](base)
    losses = {run.name: [3.0, 3.1] for run in study.runs}
    losses["smaller_ratio_1_5_length_4"] = losses["smaller_ratio_5_1_length_4"] = [3.1, 3.2]
    losses["ratio_1_5_length_4"] = losses["ratio_5_1_length_4"] = [3.0 + lead, 3.1 + lead]
    values = {"loss_by_position": [3.0] * 8, "fall": [0.1, 0.01], "exchange": [0.1, 0.01]}
    found = study.find(made_up(study, losses, **values))
    assert verdicts(found)[:2] == [verdict] * 2
    assert verdicts(found)[2:] == ["undecided"] * 7


@pytest.mark.parametrize(
    ("uptrained", "scratch", "whole", "wanted"),
    [
        (3.05, 4.0, 3.0, ["agrees", "agrees"]),
        (3.5, 4.0, 3.0, ["agrees", "disagrees"]),
        (3.2, 3.0, 3.1, ["disagrees", "undecided"]),  # there is no gap to close
        (3.0, 3.0, 3.0, ["undecided", "undecided"]),
    ],
)
def test_uptraining_finds_the_share_of_the_gap(base, uptrained, scratch, whole, wanted):
    study = STUDIES["uptraining"](base)
    names = {"uptrained_tenth": uptrained, "scratch_tenth": scratch, "projection": whole}
    losses = {name: [loss, loss + 0.1] for name, loss in (names | {"vanilla": 2.9}).items()}
    assert verdicts(study.find(made_up(study, losses))) == wanted


@pytest.mark.parametrize(
    ("fall", "verdict"),
    [([0.1, 0.01], "agrees"), ([-0.1, 0.01], "disagrees"), ([0.1, 0.06], "undecided")],
)
def test_long_context_is_decided_by_standard_errors(base, fall, verdict):
    study = STUDIES["long_context"](base)
    values = {"loss_by_place": [[0, 5.0], [8, 4.9]], "fall": fall, "exchange": [0.1, 0.01]}
    found = study.find(made_up(study, {"long_context": [4.5]}, **values))
    assert verdicts(found) == [verdict, "agrees"]
    assert [row[0] for row in found.rows] == ["0-7", "8-15"]


@pytest.mark.parametrize(("exchange", "verdict"), [(0.1, "agrees"), (0.01, "undecided")])
def test_regime_asks_for_the_use_of_context(base, exchange, verdict):
    study = STUDIES["regime"](base)
    values = {"loss_by_place": [[0, 5.0], [8, 4.9]], "fall": [0.1, 0.01]}
    losses = {"vanilla": [3.0], "length_4": [3.0]}
    found = study.find(made_up(study, losses, exchange=[exchange, 0.01], **values))
    assert verdicts(found) == ["agrees", verdict] * 2
    assert found.rows[0][2:4] == ["300", "32"]  # of what was run, not of what would be


def test_learning_curve_compares_schedules_of_half_the_steps(base):
    study = STUDIES["learning_curve"](base)
    losses = {"vanilla": [3.0], "length_4": [3.0]}
    losses |= {"vanilla_half_steps": [3.05], "length_4_half_steps": [3.2]}
    assert verdicts(study.find(made_up(study, losses))) == ["agrees", "disagrees"]
    runs = {run.name: run.config for run in study.runs}
    assert runs["vanilla_half_steps"].training.steps * 2 == runs["vanilla"].training.steps


@pytest.mark.parametrize("seeds", [1, 2])
def test_block_length_is_undecided_by_one_seed(base, seeds):
    study = STUDIES["block_length"](base)
    losses = {"length_1": 3.0, "length_2": 3.1, "length_4": 3.2, "length_8": 3.3, "vanilla": 2.9}
    of_seeds = {name: [loss + seed for seed in range(seeds)] for name, loss in losses.items()}
    found = study.find(made_up(study, of_seeds))  # without a measurement of speed
    assert verdicts(found) == ["undecided" if seeds == 1 else "agrees"] * 4


def test_frontier_interpolates_vanilla(base):
    study = STUDIES["frontier"](base)
    results = made_up(study, {"vanilla": [3.0], "small": [4.0], "length_4": [3.5]})
    rates = {"vanilla": [100.0], "small": [400.0], "block": [800.0]}
    speeds = {
        speed.name: {"tokens_per_second": rates, "repeats": rates, "made": "", "load": 0.0}
        for speed in study.speeds
    }
    results = dataclasses.replace(results, speeds=speeds)
    found = study.find(results)
    # Halfway between two losses a line is, in logarithms, halfway between 100 and 400: at 200.
    assert [check.seen for check in found.checks[::2]] == ["block 4.0x"] * 2
    assert verdicts(found) == ["agrees", "undecided"] * 2  # no vanilla model is as fast


def test_context_use_of_a_model_without_context_is_nothing(base, data):
    """A model of which each block is predicted from the one before it has effects of exactly 0."""
    corpus = prepare(data, 300)
    mesh = create_mesh(base.block.mesh)

    class Local:
        """Stands for a model: its loss of a token is the value of the token before the block."""

        config = base.block.model

    def nats(model, params, tokens_BxNxK, mask_BxNxK):
        last = tokens_BxNxK[:, :-1, -1:] * params
        return jnp.broadcast_to(last, tokens_BxNxK[:, 1:].shape), mask_BxNxK[:, 1:]

    def remember(model, params, tokens_BxNxK, mask_BxNxK):
        seen = jnp.cumsum(tokens_BxNxK, 1)[:, :-1].mean(-1, keepdims=True) * params
        return jnp.broadcast_to(seen, tokens_BxNxK[:, 1:].shape), mask_BxNxK[:, 1:]

    for losses, used in ((nats, False), (remember, True)):
        with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
            patch.setattr(context_use, "token_losses", losses)
            jax.clear_caches()
            found = context_use.context_use(Local, 1.0, corpus.heldout, mesh, batch_size=4)
        assert (found["fall"] != [0, 0]) == used
        assert (found["exchange"] != [0, 0]) == used
        assert len(found["loss_by_place"]) == 14  # 2 bins, the first block, are never predicted


def test_noise_is_what_seeds_scatter_beside_what_they_share():
    losses = {"a": [3.0, 3.5], "b": [4.0, 4.5], "c": [5.0, 5.5]}  # seeds differ, and alike
    assert made_up(None, losses).noise() == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(0)
    many = {f"{i}": (i + np.arange(3) + 0.02 * rng.normal(size=3)).tolist() for i in range(400)}
    assert made_up(None, many).noise() == pytest.approx(0.02, rel=0.1)
    assert made_up(None, {"a": [3.0], "b": [4.0]}).noise() is None


def test_equal_flops_runs_of_the_cpu_scale_have_equal_flops():
    flops = []
    for name in ("vanilla", "flops_block", "flops_wide_block"):
        config = read_config(f"{ROOT}/configs/reproduce.py:{name}")
        flops.append(cost.training_run(config).flops)
    np.testing.assert_allclose(flops, flops[0], rtol=0.01)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.1], [1.2, 1.2], "agrees"),
        ([1.2, 1.2], [1.0, 1.1], "disagrees"),
        ([1.0, 1.3], [1.2, 1.2], "undecided"),
        ([1.0], [1.2], "agrees"),
        ([1.0], [1.0005], "undecided"),
        ([1.0, 1.0], [1.00001, 1.00002], "undecided"),
    ],
)
def test_seeds_that_contradict_each_other_decide_nothing(a, b, verdict):
    assert lower(a, b, "a is lower", noise=0.01).verdict == verdict
    assert lower(a, b, "a is lower", noise=0.2).verdict == "undecided"
    assert lower(a, b, "a is lower").verdict == "undecided"  # without an estimate of the noise


def test_holds():
    assert holds(True, "it is", "1").verdict == "agrees"
    assert holds(False, "it is", "0").verdict == "disagrees"


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the studies first"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"runs": {}}))
    with pytest.raises(ValueError, match="is not what studies leave"):
        read_results(tmp_path)


def test_report_by_the_script_is_of_all_that_is_there(base, tmp_path, monkeypatch):
    """And again from results.json, which says of which scale and seeds it is."""
    study = STUDIES["embedder"](base)
    results = made_up(study, {run.name: [3.0, 3.1] for run in study.runs})
    write_results(tmp_path, results, "--scale=cpu")
    done = launch("--study=all", "--report_only", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "README.md").read_text()
    assert "[embedder](#embedder)" in page
    assert page.count("not finished") == len(STUDIES | FURTHER) - 1
    refused = launch("--study=all", "--report_only", f"--output={tmp_path}", "--scale=paper")
    assert f"{tmp_path} has results of --scale=cpu, and --scale=paper is asked" in refused.stderr


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
        (["--study="], "--study: got ''; use all"),
        (["--study=blocks"], "--study: got 'blocks'; use all, or some of regime, "),
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
