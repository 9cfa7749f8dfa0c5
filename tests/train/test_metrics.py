"""metrics.jsonl holds each step once, survives being cut off, and gives a readable plot."""

import json
import math
import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import blocktx.train.metrics as module
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


class Full:
    """A file on a disk without space."""

    def __init__(self, *_):
        pass

    def write(self, *_):
        raise OSError(28, "No space left on device")

    write_event = flush = close = write


def test_a_full_disk_is_a_warning_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 3.0})
        writer._log._file.close()
        writer._log._file = Full()
        writer.write(2, {"train/loss": 2.0})  # fails
        writer.write(3, {"train/loss": 1.0})
        writer.flush()
        assert [line["step"] for line in read(tmp_path)] == [1]
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    assert "warning: " in (err := capsys.readouterr().err)
    assert "metrics.jsonl: cannot be written: [Errno 28]" in err


def test_a_full_disk_under_tensorboard_blocks_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "EventsWriter", Full)
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 50):  # more than the queue of tensorboardX holds
            writer.write(step, {"train/loss": 1.0})
    assert len(read(tmp_path)) == 49
    assert capsys.readouterr().err.count("tensorboard: cannot be written") == 1


def test_a_bucket_that_does_not_answer_is_a_warning(tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise ConnectionError("reset")

    with MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(module.AppendLog, "flush", failing)
        writer.write(1, {"train/loss": 1.0})
        writer.flush()
    assert "cannot be written: reset" in capsys.readouterr().err
