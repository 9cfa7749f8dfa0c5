"""A run on a mixture says what it saw, and runs of another packing are refused by name."""

import dataclasses

import pytest

from blocktx.train import start
from blocktx.train.loop import train


def test_a_mixture_says_how_often_each_source_was_seen(finished, tmp_path, capsys):
    config, _, _ = finished
    folder = config.data.source
    data = dataclasses.replace(config.data, source=f"{folder}/a.txt@3,{folder}/b.txt@1")
    train(dataclasses.replace(config, data=data), tmp_path / "run")
    out = capsys.readouterr().out
    assert f"sources  {folder}/a.txt 0.7500, {folder}/b.txt 0.2500\n" in out
    seen = out.split("sources")[-1].splitlines()[-2:]
    assert seen[0].startswith(f"{folder}/a.txt: weight 0.7500, 12 contexts, seen ")
    assert seen[1].startswith(f"{folder}/b.txt: weight 0.2500, 4 contexts, seen ")


def test_runs_of_another_packing_are_refused(finished, monkeypatch):
    config, workdir, _ = finished
    monkeypatch.setattr(start, "PACKING", 3)
    with pytest.raises(ValueError, match=rf"another packing of documents.*init_from={workdir}"):
        train(config, workdir, resume=True)
