"""The benchmark on models so small that its figures only have to be consistent."""

import dataclasses
import importlib
import json
import pathlib
import types

import jax
import matplotlib.image
import pytest

from blocktx import cost, plotting
from blocktx.benchmark import machine
from blocktx.benchmark.candidates import Candidate, random_model, with_room
from blocktx.benchmark.measure import Result
from blocktx.benchmark.report import _draw_by_batch, plot, table, write_json
from blocktx.command_line import read_config
from blocktx.config.model import BlockConfig, StackConfig

benchmark = importlib.import_module("blocktx.benchmark.measure")  # `measure` is a function too

STACK = StackConfig(layers=1, width=16, heads=2)
CONFIG = BlockConfig(vocab_size=53, context_length=32, block_decoder=STACK, token_decoder=STACK)
PAPER = pathlib.Path(__file__).parents[2] / "configs" / "paper.py"
MACHINE = machine.MeasuredPeaks("a device", 1e9, 1e8, matrix=2048, read_bytes=2**28)


@pytest.fixture(scope="module")
def candidate():
    config = with_room(CONFIG, 128)
    return Candidate("tiny", *random_model(config))


@pytest.fixture(scope="module")
def results(candidate):
    shape = dict(prompt_tokens=64, new_tokens=64)
    return benchmark.measure([candidate], MACHINE, batch_sizes=[2], repeats=3, **shape)


def test_figures_are_consistent(results, candidate):
    (result,) = results
    config = candidate.model.config
    assert result.tokens_per_second == pytest.approx(2 * 64 / result.seconds)
    assert min(result.prefill_seconds, result.seconds_to_first_token) > 0
    assert result.counted_bytes_per_sample == cost.cache_bytes(config, 32) + 4 * 53
    assert result.bytes_per_sample > result.counted_bytes_per_sample
    prefill, block = cost.extend(config, 2, 16, 16), cost.decode_block(config, 2, 32)
    roofline = MACHINE.seconds(prefill) + 16 * MACHINE.seconds(block)
    assert result.roofline_share == pytest.approx(roofline / result.seconds)


def test_roofline_is_the_longer_time():
    assert MACHINE.seconds(cost.Cost(flops=2 * 10**9, bytes=10**8)) == 2
    assert MACHINE.seconds(cost.Cost(flops=10**9, bytes=3 * 10**8)) == 3


def test_room_for_prompt_and_answer():
    config = with_room(CONFIG, 33, "bfloat16")
    assert (config.context_length, config.compute_dtype) == (36, "bfloat16")
    assert config.param_dtype == "bfloat16"
    assert with_room(CONFIG, 20).context_length == 32


def test_largest_batch_is_the_last_that_fits(candidate, monkeypatch):
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(candidate.params))
    # More than what is counted, so that the first guess is too large.
    monkeypatch.setattr(benchmark, "program_bytes", lambda _, rows, *__: 5000 + 9000 * rows)
    shape = dict(prompt_tokens=64, new_tokens=64)
    limit = held + 5000 + 9000 * 37 + 4000
    assert benchmark.largest_batch(candidate, limit, **shape) == 32
    with pytest.raises(ValueError, match=r"memory_limit: tiny needs .* GiB for a batch of 1"):
        benchmark.largest_batch(candidate, held + 13_999, **shape)


def result(model, batch_size, tokens_per_second, loss=None):
    numbers = dict.fromkeys((f.name for f in dataclasses.fields(Result)), 1)
    return Result(
        **numbers
        | dict(model=model, batch_size=batch_size, loss=loss, tokens_per_second=tokens_per_second)
    )


def test_table_json_and_plot(tmp_path):
    several = [
        result("block", 1, 50.0, 2.8),
        result("vanilla", 1, 20.0, 2.5),
        result("block", 8, 400.0, 2.8),
        result("vanilla", 8, 40.0, 2.5),
    ]
    text = table(several, MACHINE)
    assert "a device: 1 GFLOP/s in a product of 2048^3, 0.1 GB/s in a sum of 256 MB" in text
    assert "batch 1: block is 2.5x vanilla" in text
    assert "batch 8: block is 10.0x vanilla" in text
    path = write_json(tmp_path / "new" / "out.json", several, MACHINE)
    out = json.loads(path.read_text())
    assert out["machine"]["flops_per_second"] == 1e9
    assert [r["tokens_per_second"] for r in out["results"]] == [50, 20, 400, 40]
    # By batch size and by loss; the second only where the loss of several models is known.
    for name, shown in {"two.png": several, "one.png": [result("tiny", 1, 1.0)]}.items():
        assert plot(tmp_path / name, shown).read_bytes().startswith(b"\x89PNG")
    assert _width(tmp_path / "two.png") > 1.5 * _width(tmp_path / "one.png")


def test_a_roofline_that_is_exceeded_is_explained():
    half, most, above = (
        dataclasses.replace(result("tiny", 1, 1.0), roofline_share=share)
        for share in (0.5, 1, 1.75)
    )
    for results, explained in [([half, most], False), ([half, above], True)]:
        assert ("more than 100%: " in table(results, MACHINE)) is explained
        axes = plotting.new_figure()[1]
        _draw_by_batch(axes, results, {"tiny": plotting.BLOCK})
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert any("(of reads from memory)" in text for text in texts) is explained


def test_the_roofline_of_one_batch_size_is_visible():
    axes = plotting.new_figure()[1]
    _draw_by_batch(axes, [result("tiny", 1, 1.0)], {"tiny": plotting.BLOCK})
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    (bound,) = [line for line in dotted if len(line.get_xdata())]  # not that of the legend
    assert bound.get_marker() not in ("", "None", None)


def _width(path):
    return matplotlib.image.imread(path).shape[1]


def test_results_grow_by_rounds_that_count(candidate, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ticks) ** 2)
    bar = types.SimpleNamespace(update=lambda: counted.append(1))
    counted = []
    shape = dict(batch_sizes=[1], prompt_tokens=8, new_tokens=4, repeats=2, bar=bar)
    first, second = benchmark.running_measure([candidate], MACHINE, **shape)
    assert len(counted) == 3 * benchmark.runs_per_round([candidate])
    # Run r takes 4r + 1: round 1 has runs 3 to 5, round 2 has runs 6 to 8.
    assert first[0].seconds == 4 * 5 + 1
    assert second[0].seconds == (4 * 5 + 1 + 4 * 8 + 1) / 2


def test_machine_is_measured():
    measured = machine.measure_machine("float32", 64, 2**16)
    assert measured.flops_per_second > 0
    assert measured.bytes_per_second > 0
    assert measured.device == jax.devices()[0].device_kind


def test_memory_of_a_row_is_that_of_its_cache_and_logits():
    # What a step needs beside the cache, such as a copy of one head of one layer, is little beside
    # several layers of many slots.
    stack = StackConfig(4, width=64, heads=8)
    config = dataclasses.replace(CONFIG, block_decoder=stack, vocab_size=16)
    config = with_room(config, 1024 + 64)
    wide = Candidate("wide", *random_model(config))
    shape = (1024, 64)
    few, many = (benchmark.program_bytes(wide, rows, *shape) for rows in (256, 512))
    counted = benchmark.counted_bytes(config, *shape) + 4 * sum(shape)  # and tokens
    assert (many - few) / 256 == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
def test_memory_of_a_row_at_full_size():
    config = with_room(read_config(f"{PAPER}:block_170m").model, 2176, "float32")
    candidate = Candidate("block_170m", *random_model(config))
    few, many = (benchmark.program_bytes(candidate, rows, 2048, 128) for rows in (32, 64))
    counted = benchmark.counted_bytes(config, 2048, 128)
    assert (many - few) / 32 == pytest.approx(counted, rel=0.05)
