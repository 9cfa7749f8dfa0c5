"""Published peaks, and how a chip is found by what JAX calls it."""

import jax
import pytest

from blocktx.chips import CHIPS, find_chip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_chip_is_found_by_its_kind(kind, name):
    assert find_chip(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v4 lite", "NVIDIA H100 PCIe", "Radeon"])
def test_chip_of_unknown_peaks_is_none(kind):
    assert find_chip(kind) is None


def test_cpu_has_no_published_peaks():
    assert find_chip(jax.devices("cpu")[0].device_kind) is None


def test_seconds_of_each_resource():
    chip = CHIPS["v5e"]
    seconds = chip.seconds(flops=197e12, hbm=2 * 819e9, sent=0.5 * 200e9)
    assert seconds == {"matrix unit": 1, "HBM": 2, "interconnect": 0.5}
