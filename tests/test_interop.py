"""Checkpoints in other JAX code: `plain_jax.py` computes our logits and knows nothing of us."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from blocktx.checkpoint.params import load_params, save_params
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.config.run import RunConfig
from blocktx.model.build import build
from tests.helpers.random_weights import random_params

HELPERS = pathlib.Path(__file__).parent / "helpers"
STACK = StackConfig(layers=2, width=32, heads=2, rotary_fraction=0.5, rotary_base=100.0)
BLOCK = BlockConfig(
    vocab_size=50,
    context_length=32,
    block_decoder=STACK,
    token_decoder=StackConfig(layers=3, width=24, heads=3, mlp_width=40),
    prefix_length=3,
)
VANILLA = VanillaConfig(vocab_size=50, context_length=32, decoder=STACK)

ALONE = """
import sys
sys.modules["blocktx"] = sys.modules["flax"] = None  # to import them is an error
import jax, numpy as np, plain_jax
for run in sys.argv[1:]:
    config, params = plain_jax.restore(run)
    model = config["model"]
    logits = plain_jax.block_logits if model["kind"] == "block" else plain_jax.vanilla_logits
    given = np.load(run + "/given.npz")
    compute = jax.jit(lambda tokens, mask: logits(model, params, tokens, mask))
    np.save(run + "/logits.npy", compute(given["tokens"], given["mask"]))
"""


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Run folders with `given.npz` and what plain_jax.py, in a process of its own, made of it."""
    folder = tmp_path_factory.mktemp("interop")
    runs = {"trained": finished[1], "block": folder / "block", "vanilla": folder / "vanilla"}
    for model in (BLOCK, VANILLA):
        save_params(runs[model.kind], RunConfig(model=model), random_params(build(model)), step=1)
    rng = np.random.default_rng(0)
    for run in runs.values():
        config = load_params(run).config.model
        shape = (8, config.block_length)[: 2 if config.kind == "block" else 1]
        tokens, mask = rng.integers(0, config.vocab_size, shape), np.ones(shape, bool)
        mask.reshape(-1)[:3] = False  # in front of a text, between texts, and after the last one
        mask.reshape(-1)[-6:] = False
        mask.reshape(-1)[[5, 6]] = False
        np.savez(run / "given.npz", tokens=tokens, mask=mask)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, runs.values())],
        env=os.environ | {"PYTHONPATH": str(HELPERS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.parametrize("name", ["trained", "block", "vanilla"])
def test_logits_without_blocktx(runs, name):
    checkpoint = load_params(runs[name])
    given = np.load(runs[name] / "given.npz")
    model = build(checkpoint.config.model)
    variables = {"params": checkpoint.params}
    (ours,) = jax.jit(model.apply)(variables, given["tokens"][None], given["mask"][None])
    theirs = np.load(runs[name] / "logits.npy")
    assert theirs.shape == ours.shape
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=1e-5)


def test_plain_jax_is_a_short_read():
    text = (HELPERS / "plain_jax.py").read_text()
    assert "import blocktx" not in text
    assert "from blocktx" not in text
    assert len(text.splitlines()) < 100
