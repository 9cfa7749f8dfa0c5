"""Settings for GPUs: set where the environment leaves them open, and only there."""

import os

import jax
import pytest

from blocktx.parallel import gpu

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_DEVICE_MAX_CONNECTIONS")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (*NAMES, "JAX_OPTIMIZATION_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "UNKNOWN")
    yield
    jax.config.update("jax_optimization_level", level)


def with_gpus(monkeypatch, *models):
    monkeypatch.setattr(gpu, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(gpu, "gpu_models", lambda: list(models))


def test_nothing_is_set_without_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "has_nvidia_gpu", lambda: False)
    assert gpu.prepare_gpu(training=True) == {}
    assert not any(name in os.environ for name in NAMES)
    assert jax.config.jax_optimization_level == "UNKNOWN"


@pytest.mark.parametrize(
    ("models", "training", "wanted"),
    [
        (["NVIDIA H100 80GB HBM3"] * 8, True, {"CUDA_DEVICE_MAX_CONNECTIONS", "O1"}),
        (["NVIDIA H100 80GB HBM3"] * 8, False, set()),
        (["NVIDIA H100 80GB HBM3"], True, {"O1"}),
        (["NVIDIA A100-SXM4-80GB"] * 8, True, {"O1"}),
        ([], True, {"O1"}),  # a driver without these files
    ],
)
def test_what_is_set(monkeypatch, models, training, wanted):
    with_gpus(monkeypatch, *models)
    found = gpu.prepare_gpu(training=training)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in os.environ) == (
        "CUDA_DEVICE_MAX_CONNECTIONS" in wanted
    )
    assert jax.config.jax_optimization_level == ("O1" if "O1" in wanted else "UNKNOWN")
    assert len(found) == 1 + len(wanted)


def test_the_environment_is_kept(monkeypatch):
    with_gpus(monkeypatch, *["NVIDIA H200"] * 2)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "UNKNOWN")
    assert gpu.prepare_gpu(training=True) == {}
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert jax.config.jax_optimization_level == "UNKNOWN"
