"""metrics.jsonl holds each step once, survives being cut off, and gives a readable plot."""

import json
import math
import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blocktx.train.loss_plot import plot_loss
from blocktx.train.metrics import MetricsWriter, read


def write(workdir, steps, after_step=0):
    with MetricsWriter(workdir, after_step=after_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 10.0 / step})


def test_lines_are_json_and_in_tensorboard(tmp_path):
    write(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    now = time.time()
    assert all(now - 60 < line.pop("time") <= now for line in lines)
    assert lines == [{"step": 1, "train/loss": 10.0}, {"step": 2, "train/loss": 5.0}]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 10.0), (2, 5.0)]


def test_lines_are_there_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 1.0})
        (line,) = read(tmp_path)
        assert line == {"step": 1, "time": line["time"], "train/loss": 1.0}


def test_resuming_drops_later_steps(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], after_step=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]


def test_resuming_after_a_line_was_cut_off(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    write(tmp_path, [3], after_step=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_line_that_is_no_metric(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 .*'hello'"):
        read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": "one"}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 .*one"):
        read(tmp_path)


def test_value_that_is_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"heldout/perplexity": math.inf})
    (line,) = read(tmp_path)
    assert line["heldout/perplexity"] is None


def test_plot_is_a_picture(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 10, 100):
            writer.write(step, {"train/loss": 9.0 - math.log(step)})
            writer.write(step, {"heldout/loss": math.nan if step == 1 else 5.0})
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.path.getsize(path) > 10_000
    assert set(os.listdir(tmp_path)) == {"loss.png", "metrics.jsonl", "tensorboard"}


@pytest.mark.filterwarnings("error")
def test_plot_of_one_step(tmp_path):
    write(tmp_path, [1])
    assert plot_loss(tmp_path).exists()


def test_nothing_to_plot(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        plot_loss(tmp_path)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"other": 1.0})
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no loss"):
        plot_loss(tmp_path)
