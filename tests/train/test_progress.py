"""Metrics of a step are read once the next is under way; times count what they should."""

import math
import time

import jax.numpy as jnp
import pytest

from blocktx.config.run import RunConfig, TrainingConfig
from blocktx.train.metrics import MetricsWriter, read
from blocktx.train.progress import Progress
from tests.helpers.tiny_run import MODEL

MEASURED = ["step_seconds", "tokens_per_second", "input_fraction", "productive_seconds", "goodput"]


def run_of(**training):
    return RunConfig(model=MODEL, training=TrainingConfig(**training))


def progress_metrics(loss=1.0, grad_norm=2.0, tokens=50):
    values = dict(loss=loss, grad_norm=grad_norm, learning_rate=0.1)
    return {k: jnp.float32(v) for k, v in values.items()} | {"tokens": jnp.int32(tokens)}


def test_progress_reads_a_step_when_the_next_is_added(tmp_path):
    run = run_of(steps=5, log_every=2)
    with MetricsWriter(tmp_path) as writer, Progress(writer, run, 0) as progress:
        for step, logged in [(1, []), (2, [1]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2, 4])]:
            progress.add(step, progress_metrics())
            assert [line["step"] for line in read(tmp_path)] == logged
        progress.flush()
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    names = {"step", "time", "train/loss", "train/grad_norm", "train/learning_rate"}
    assert set(lines[0]) == names  # it compiled, which says nothing of speed
    assert set(lines[1]) == names | {f"train/{name}" for name in MEASURED}
    assert lines[1]["train/tokens_per_second"] > 0


def test_step_that_is_flushed_does_not_count_for_speed(tmp_path, monkeypatch):
    """Each step takes a second, on a device that makes the host wait for it when it is given."""
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    run = run_of(steps=9, log_every=3)
    with MetricsWriter(tmp_path) as writer, Progress(writer, run, 0) as progress:
        for step in range(1, 10):
            clock += 1.0
            progress.add(step, progress_metrics(tokens=50))
            if step in (3, 5, 9):
                progress.flush()
                clock += 100.0
    speeds = {line["step"]: line.get("train/tokens_per_second") for line in read(tmp_path)}
    assert speeds == {1: None, 3: 50.0, 6: None, 9: 50.0}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_progress_stops_at_a_step_that_is_not_finite(tmp_path, name, value):
    with MetricsWriter(tmp_path) as writer, Progress(writer, run_of(), 0) as progress:
        progress.add(1, progress_metrics())
        progress.add(2, progress_metrics(**{name: value}))
        with pytest.raises(FloatingPointError, match=r"step 2: .*(nan|inf)"):
            progress.flush()
    assert [line["step"] for line in read(tmp_path)] == [1]


def test_time_lost_to_input_and_between_restarts(tmp_path, monkeypatch):
    """Steps of a second each, of which 0.2 are spent on waiting for data; a pause of 4 s."""
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(time, "time", lambda: 1000 + clock)
    run = run_of(steps=10, log_every=5)
    for start, stop in [(0, 5), (5, 10)]:
        with (
            MetricsWriter(tmp_path, after_step=start) as writer,
            Progress(writer, run, start) as progress,
        ):
            for step in range(start + 1, stop + 2):
                with progress.input():
                    clock += 0.2
                progress.add(step, progress_metrics())
                clock += 0.8
        clock += 4
    lines = {line["step"]: line for line in read(tmp_path)}
    assert lines[5]["train/input_fraction"] == pytest.approx(0.2)
    assert lines[5]["train/step_seconds"] == pytest.approx(1.0)
    assert lines[10]["train/productive_seconds"] == pytest.approx(8.0)
    assert lines[10]["train/goodput"] == pytest.approx(8 / 14)


def test_a_request_to_stop_is_in_the_metrics(tmp_path):
    with MetricsWriter(tmp_path) as writer, Progress(writer, run_of(), 0) as progress:
        for step, stop in [(1, False), (2, True)]:
            progress.add(step, progress_metrics() | {"stop": jnp.bool(stop)})
            assert not progress.stop
        progress.flush()
        assert progress.stop
