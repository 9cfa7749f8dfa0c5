"""Two models token by token against full forwards, greedy continuations, and the command."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from blocktx.data.corpus import Documents
from blocktx.evaluate import next_logits
from blocktx.evaluate.compare import comparison_rows, running_comparison
from blocktx.evaluate.compare_report import Report, plot_report
from blocktx.evaluate.continuations import common_prefix, repetition, running_continuations
from tests.helpers.scored_models import BLOCK, VANILLA, log_probabilities, random_model, save_run

ROOT = pathlib.Path(__file__).parents[2]
MODELS = {
    "block": dataclasses.replace(BLOCK, context_length=32),
    "pairs": dataclasses.replace(BLOCK, context_length=24, block_length=2),
    "vanilla": dataclasses.replace(VANILLA, context_length=16),
    "smaller": dataclasses.replace(VANILLA, context_length=40, vocab_size=290),
}


def documents(lengths=(70, 1, 3, 25)):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(2, 290, offsets[-1])
    return Documents(tokens.astype(np.uint16), offsets, 400)


DOCUMENTS = documents()


def compare(first, second, placement="pad", batch_size=3):
    models, params = zip(*(random_model(MODELS[name]) for name in (first, second)), strict=True)
    options = dict(placement=placement, pad_id=1, batch_size=batch_size)
    *_, last = running_comparison(models, params, DOCUMENTS, **options)
    return last


def known(name, row, placement, vocabulary):
    model, params = random_model(MODELS[name])
    padding = model.config.block_length - 1 if placement == "pad" else 0
    found = log_probabilities(model, params, row, padding)[:, :vocabulary]
    return found - np.log(np.exp(found).sum(-1, keepdims=True))


def brute_force(names, placement, room):
    """Means over tokens, window by window, from log-probabilities of each token alone."""
    lengths = [MODELS[name].block_length for name in names]
    vocabulary = min(MODELS[name].vocab_size for name in names)
    unit = int(np.lcm(*lengths))
    first = 1 if placement == "pad" or unit == 1 else unit
    size = first + (room - first) // unit * unit
    rows = []
    for begin, end in zip(DOCUMENTS.offsets, DOCUMENTS.offsets[1:], strict=False):
        for start in range(begin, end - first, size - first):
            row = DOCUMENTS.tokens[start : min(start + size, end)].tolist()
            one, other = (known(name, row, placement, vocabulary)[first:] for name in names)
            labels = row[first:]
            place = np.arange(len(labels))
            kl = (np.exp(other) * (other - one)).sum(-1)
            agree = one.argmax(-1) == other.argmax(-1)
            rows += zip(-one[place, labels], -other[place, labels], kl, agree, place, strict=True)
    return np.array(rows, float)


@pytest.mark.parametrize(
    ("names", "placement", "room"),
    [
        (("block", "vanilla"), "pad", 17),
        (("block", "vanilla"), "force", 17),
        (("block", "pairs"), "force", 24),
        (("block", "pairs"), "pad", 23),
        (("vanilla", "block"), "pad", 17),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_means_against_full_forwards(names, placement, room, chunk_bytes, monkeypatch):
    monkeypatch.setattr(next_logits, "_CHUNK_BYTES", chunk_bytes)
    from blocktx.evaluate.compare import _sums

    _sums.clear_cache()  # the size of a chunk is not part of the key
    found, rows = compare(*names, placement)
    wanted = brute_force(names, placement, room)
    assert found.tokens == len(wanted)
    assert rows == comparison_rows(
        [random_model(MODELS[name])[0] for name in names], DOCUMENTS, placement
    )
    np.testing.assert_allclose(found.loss, wanted[:, :2].mean(0), rtol=1e-4)
    bytes_per_token = DOCUMENTS.text_bytes / len(DOCUMENTS.tokens)
    np.testing.assert_allclose(
        found.bits_per_byte, np.array(found.loss) / np.log(2) / bytes_per_token
    )
    np.testing.assert_allclose(found.kl, wanted[:, 2].mean(), rtol=1e-4)
    np.testing.assert_allclose(found.agreement, wanted[:, 3].mean(), rtol=1e-6)
    length = MODELS[names[0]].block_length
    for position in range(length):
        here = wanted[wanted[:, 4] % length == position]
        np.testing.assert_allclose(found.kl_by_position[position], here[:, 2].mean(), rtol=1e-4)
        for i in (0, 1):
            nats, count = found.sums[i][:2].sum(1)[:, position]
            np.testing.assert_allclose(nats / count, here[:, i].mean(), rtol=1e-4)


def test_a_model_beside_itself():
    found, _ = compare("block", "block")
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.loss[0] == found.loss[1]


def test_vocabularies_of_two_sizes_are_compared_on_the_tokens_of_both():
    found, _ = compare("smaller", "vanilla")
    wanted = brute_force(("smaller", "vanilla"), "pad", 17)
    np.testing.assert_allclose(found.loss, wanted[:, :2].mean(0), rtol=1e-4)


def test_bad_input():
    models, params = zip(*(random_model(MODELS[n]) for n in ("block", "vanilla")), strict=True)
    options = dict(placement="pad", pad_id=1, batch_size=2)
    with pytest.raises(ValueError, match="no document has more than 1 tokens"):
        running_comparison(models, params, documents([1, 1]), **options)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        running_comparison(models, params, DOCUMENTS, **options | {"batch_size": 0})
    short = dataclasses.replace(VANILLA, context_length=3)
    models = (models[0], random_model(short)[0])
    with pytest.raises(ValueError, match="no room for 5 tokens of which 4 are predicted"):
        running_comparison(models, params, DOCUMENTS, **options)


class Writes:
    """An engine that continues every prompt with the same tokens."""

    def __init__(self, tokens):
        self.tokens = tokens
        model = types.SimpleNamespace(context_length=32)
        self.config = types.SimpleNamespace(model=model)

    def generate(self, prompts, *, max_new_tokens, temperature, return_logprobs):
        assert (max_new_tokens, temperature, return_logprobs) == (8, 0.0, True)
        assert all(len(prompt) == 12 for prompt in prompts)
        return [types.SimpleNamespace(tokens=self.tokens) for _ in prompts]


def test_continuations_side_by_side():
    engines = (Writes([1, 2, 3, 4, 1, 2, 3, 4]), Writes([1, 2, 3, 9, 9, 9, 9, 9]))
    options = dict(count=3, prompt_tokens=12, new_tokens=8, batch_size=2)
    first, last = running_continuations(engines, DOCUMENTS, **options)
    assert (first.prompts, last.prompts) == (2, 3)
    assert last.exact == 0
    assert last.matched == 3 / 8
    assert last.repetition[:2] == pytest.approx((1 / 5, 1 / 5))
    same = (engines[0], engines[0])
    *_, last = running_continuations(same, DOCUMENTS, **options)
    assert (last.exact, last.matched) == (1, 1)
    with pytest.raises(ValueError, match="no document has the 20 tokens"):
        running_continuations(engines, documents([19, 4]), **options)
    with pytest.raises(ValueError, match="do not fit the context of 32"):
        running_continuations(engines, DOCUMENTS, **options | {"new_tokens": 30})


def test_prefix_and_repetition():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
    assert repetition([7] * 10) == 1 - 1 / 7
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0


def test_unfinished_report():
    report = Report(("one", "other"), (1_000_000, 2_000_000))
    assert report.table().splitlines()[1].split() == [
        *("non-embedding", "parameters", "1.0M", "2.0M")
    ]
    assert report.numbers()["tokens_per_second"] == {}
    with pytest.raises(ValueError, match="the comparison was not finished"):
        plot_report(report, 8, "nowhere.png")


@pytest.mark.slow
def test_command(tmp_path):
    runs = []
    for name in ("block", "vanilla"):
        (tmp_path / name).mkdir()
        runs.append(save_run(tmp_path / name, MODELS[name]))
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 12)
    flags = [f"--checkpoint={runs[0]}", f"--against={runs[1]}", f"--data={tmp_path / 'text.txt'}"]
    flags += ["--prompts=3", "--new=4", "--prompt=8", "--speed_batches=1,2"]
    flags += [f"--plot={tmp_path / 'plot.png'}", f"--json={tmp_path / 'found.json'}"]
    command = [sys.executable, "launch/evaluate.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{found['kl']:.4f}" in done.stdout
    assert list(found["tokens_per_second"]) == ["1", "2"]
    assert found["continuations"]["prompts"] == 3
    assert len(found["loss_by_position"][0]) == len(found["kl_by_position"]) == 4
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
