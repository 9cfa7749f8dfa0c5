"""Losses by place, from one pass, against one forward for each context."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from blocktx import plotting
from blocktx.checkpoint.params import load_params, load_tokenizer
from blocktx.config.run import MeshConfig
from blocktx.data.corpus import Documents, read_in_memory
from blocktx.evaluate.heldout import summary, text_sums
from blocktx.evaluate.position_curve import default_bin, plot_losses, position_curve
from blocktx.model.build import build
from blocktx.parallel.sharding import create_mesh
from blocktx.train.metrics import read
from tests.helpers.eight_devices import run as on_eight_devices
from tests.helpers.scored_models import BLOCK, VANILLA, log_probabilities, random_model, save_run

ROOT = pathlib.Path(__file__).parents[2]
MODELS = {
    kind: dataclasses.replace(config, context_length=32)
    for kind, config in {"block": BLOCK, "vanilla": VANILLA}.items()
}
LENGTHS = [70, 3, 25]


def documents(lengths=LENGTHS):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(2, 300, offsets[-1])
    return Documents(tokens.astype(np.uint16), offsets, 400)


DOCUMENTS = documents()


def sums(kind, batch_size=3, stride=None, texts=DOCUMENTS):
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    options = dict(batch_size=batch_size, stride=stride)
    with jax.set_mesh(mesh):
        return text_sums(*random_model(MODELS[kind]), texts, 1, mesh, **options)


def brute_force(kind, stride):
    """Nats and counts by place, context by context and token by token."""
    config = MODELS[kind]
    block, length = config.block_length, config.context_length
    stream = []
    for begin, end in zip(DOCUMENTS.offsets, DOCUMENTS.offsets[1:], strict=False):
        tokens = DOCUMENTS.tokens[begin:end].tolist()
        stream += tokens + [None] * (-len(tokens) % block)
    found = np.zeros((2, length))
    done, start = block, 0  # the first block is not predicted
    while done < len(stream):
        window = stream[start : start + length]
        known = forward(kind, window)
        for place in range(done - start, len(window)):
            if window[place] is not None:
                found[:, place] += -known[place, window[place]], 1
        done, start = start + len(window), start + stride
    return found


def forward(kind, window):
    """Log-probabilities of a context with padding inside, in the full forward."""
    model, params = random_model(MODELS[kind])
    length = MODELS[kind].context_length
    window = window + [None] * (length - len(window))
    mask = np.array([token is not None for token in window])
    tokens = np.array([1 if token is None else token for token in window])
    return log_probabilities(model, params, tokens, mask=mask)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stride", [None, 8])
def test_places_against_brute_force(kind, stride):
    config = MODELS[kind]
    wanted = brute_force(kind, stride or config.context_length - config.block_length)
    found = sums(kind, stride=stride)
    flat = found[:2].reshape(2, -1)
    np.testing.assert_array_equal(flat[1], wanted[1, config.block_length :])
    np.testing.assert_allclose(flat[0], wanted[0, config.block_length :], rtol=1e-4)
    for size in (4, 5, 32, 1000):
        nats, count = wanted
        for begin, end, loss, tokens, _ in position_curve(found, size):
            assert tokens == count[begin:end].sum()
            if tokens:
                np.testing.assert_allclose(loss, nats[begin:end].sum() / tokens, rtol=1e-4)
        assert end == 32


@pytest.mark.parametrize("kind", MODELS)
def test_means_by_position_and_place_average_back(kind):
    found = sums(kind)
    evaluation = summary(found, bytes_per_token=4.0)
    by_position = np.average(evaluation.loss_by_position, weights=found[1].sum(0))
    np.testing.assert_allclose(by_position, evaluation.loss, rtol=1e-14)
    bins = [bin_ for bin_ in position_curve(found, 7) if bin_.tokens]
    by_place = np.average([b.loss for b in bins], weights=[b.tokens for b in bins])
    np.testing.assert_allclose(by_place, evaluation.loss, rtol=1e-14)


def test_perplexity_depends_on_neither_batch_size_nor_devices():
    one = sums("block", batch_size=1)
    np.testing.assert_allclose(sums("block", batch_size=5), one, rtol=1e-6)
    np.testing.assert_allclose(on_eight_devices("text_sums"), one, rtol=1e-6)


def test_held_out_text_of_a_run_has_the_loss_that_training_told(finished):
    config, workdir, _ = finished
    loaded = load_params(workdir)
    tokenizer = load_tokenizer(loaded)
    texts = read_in_memory(str(pathlib.Path(config.data.source) / "b.txt"), "text", tokenizer)
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = build(loaded.config.model)
        found = text_sums(model, loaded.params, texts, tokenizer.pad_id, mesh, batch_size=3)
    found = summary(found, texts.text_bytes / len(texts.tokens)).scalars()
    told = [line for line in read(workdir) if "heldout/loss" in line][-1]
    for name, value in found.items():
        assert value == pytest.approx(told[f"heldout/{name}"], rel=1e-6), name


def test_every_stride_scores_the_same_tokens():
    counts = {stride: sums("block", stride=stride)[1].sum() for stride in (4, 12, 28)}
    assert len(set(counts.values())) == 1


def test_sliding_sees_all_of_a_text_that_fits():
    text = documents([30])
    np.testing.assert_allclose(sums("block", stride=4, texts=text), sums("block", texts=text))


@pytest.mark.parametrize("stride", [0, -4, 5, 32])
def test_stride_that_does_not_fit(stride):
    with pytest.raises(ValueError, match=f"stride: got {stride}, must be a multiple of .* 4 to 28"):
        sums("block", stride=stride)


def test_text_of_a_block():
    with pytest.raises(ValueError, match=r"the text is 3 tokens long .* use more than 4 tokens"):
        sums("block", texts=documents([3]))
    with pytest.raises(ValueError, match="the text is 1 token long"):
        sums("vanilla", texts=documents([1]))


def test_bad_bins(tmp_path):
    with pytest.raises(ValueError, match="bin: got 0 tokens"):
        position_curve(np.ones((3, 7, 4)), 0)
    with pytest.raises(ValueError, match="no token was scored"):
        plot_losses([("loss", np.zeros((3, 7, 4)))], 8, tmp_path / "curve.png")


def test_both_panels_have_one_axis_of_losses(monkeypatch):
    figures = []
    monkeypatch.setattr(plotting, "save", lambda figure, _: figures.append(figure))
    loss = np.linspace(5, 3, 28).reshape(7, 4)  # falls along the context, not in a block
    plot_losses([("loss", np.stack([loss, np.ones((7, 4)), loss**2]))], 8, "unused.png")
    by_position, by_place = figures[0].axes
    assert by_position.get_ylim() == by_place.get_ylim()
    low, high = by_position.get_ylim()
    assert low < 3.1
    assert high > 4.9


def test_default_bins_are_whole_blocks():
    assert default_bin(256, 4) == 16
    assert default_bin(2048, 4) == 128
    assert default_bin(24, 8) == 8
    assert default_bin(10, 1) == 1


def test_error_of_a_bin_is_the_standard_error_of_its_mean():
    losses = np.random.default_rng(0).random((50, 3, 2))  # rows, blocks, positions
    sums = np.stack([losses.sum(0), np.full((3, 2), 50), np.square(losses).sum(0)])
    (bin_,) = position_curve(sums, 8)
    wanted = losses.std(ddof=1) / np.sqrt(losses.size)
    assert bin_.error == pytest.approx(wanted)
    assert np.isnan(position_curve(np.stack([[[1.0]], [[1]], [[1.0]]]), 8)[0].error)


def launch(*flags):
    command = [sys.executable, "launch/evaluate.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command(tmp_path):
    run = save_run(tmp_path, MODELS["block"])
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 12)
    flags = [f"--checkpoint={run}", f"--data={tmp_path / 'text.txt'}", "--bin=8", "--stride=16"]
    flags += [f"--plot={tmp_path / 'curve.png'}", f"--json={tmp_path / 'found.json'}"]
    done = launch(*flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"loss            {found['loss']:.4f} nats per token\n" in done.stdout
    assert [place["end"] for place in found["loss_by_place"]] == [8, 16, 24, 32]
    assert sum(place["tokens"] for place in found["loss_by_place"]) == found["tokens"]
    assert len(found["loss_by_position"]) == 4
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_mistakes_are_one_line(tmp_path):
    run = pathlib.Path(save_run(tmp_path, MODELS["block"]))
    (tmp_path / "blank.txt").write_text(" \n")
    (run / "tokenizer.json").unlink()
    done = launch(f"--checkpoint={run}", f"--data={tmp_path / 'blank.txt'}")
    assert done.returncode == 1
    assert "tokenizer.json: not found; a run's tokenizer stands beside" in done.stderr
    assert done.stderr.count("\n") == 1
