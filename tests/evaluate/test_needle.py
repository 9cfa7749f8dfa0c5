"""Where the needle is, what counts as found, and the command."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from blocktx.data.tokenizer import Tokenizer
from blocktx.evaluate.needle import PROMPTS, answers, needle_accuracy, needle_samples
from tests.helpers.scored_models import BLOCK, save_run

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = Tokenizer.train(["the cat sat"], 300, "<|endoftext|>", "<|padding|>")
CONTEXT = 400
HAYSTACK = TOKENIZER.encode("The hay is dry. " * 60)


class ReadsTheFirstHalf:
    """An engine that finds what stands in the first half of its prompt."""

    tokenizer = TOKENIZER
    config = types.SimpleNamespace(
        model=types.SimpleNamespace(context_length=CONTEXT, block_length=4)
    )

    def generate(self, prompts, *, max_new_tokens, temperature):
        assert (max_new_tokens, temperature) == (20, 0.0)
        texts = [TOKENIZER.decode(prompt[: len(prompt) // 2]) for prompt in prompts]
        return [text.partition("number is:")[2] or " 1234567" for text in texts]


ENGINE = ReadsTheFirstHalf()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_prompt_fills_the_context_and_holds_the_needle_at_its_depth(prompt, depth):
    samples = needle_samples(ENGINE, HAYSTACK, prompt=prompt, depth=depth, count=3, seed=0)
    assert len({sample.number for sample in samples}) == 3
    for tokens, number in samples:
        assert len(tokens) == CONTEXT - 20
        text = TOKENIZER.decode(tokens)
        assert len(number) == 7
        assert text.count(number) == 1
        assert text.startswith("<context>\n")
        assert text.endswith(":")
        before, _, rest = text.removeprefix("<context>\n").partition(" The special magic ")
        city, _, rest = rest.partition(" number is: ")
        after = rest.partition("\n</context>")[0].removeprefix(f"{number}.")
        hay = len(TOKENIZER.encode(before)) + len(TOKENIZER.encode(after))
        assert abs(len(TOKENIZER.encode(before)) - hay * depth / 100) <= 1
        assert f"What is the special magic {city} number?" in text
        assert (f"The special magic {city} number is:" in text[-80:]) == (prompt == "verbatim")


def test_accuracy_by_depth():
    found = needle_accuracy(ENGINE, HAYSTACK, count=5, batch_size=2)
    assert found.shape == (2, 11)
    np.testing.assert_array_equal(found[:, :5], 1)
    np.testing.assert_array_equal(found[:, -3:], 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" 1234567.", True),
        ("it is 1234567, not 7", True),
        (" 12345678", False),
        (" 7654321 or 1234567", False),
        (" none", False),
        ("", False),
    ],
)
def test_first_number_counts(text, found):
    assert answers(text, "1234567") == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["ask"]}, "prompt: got 'ask', use one of gemini, verbatim"),
        ({"depths": [101]}, "depth: got 101"),
        ({"count": 0}, "count: got 0"),
        ({"haystack": HAYSTACK[:50]}, "haystack of 50 tokens does not fill a context of 400"),
    ],
)
def test_bad_input(options, message):
    settings = {"haystack": HAYSTACK} | options
    with pytest.raises(ValueError, match=message):
        needle_accuracy(ENGINE, **settings)


def test_command(tmp_path):
    run = save_run(tmp_path, dataclasses.replace(BLOCK, context_length=256))
    (tmp_path / "hay.txt").write_text("The hay is dry. " * 40)
    flags = [f"--checkpoint={run}", f"--haystack={tmp_path / 'hay.txt'}", "--count=1"]
    flags += [f"--plot={tmp_path / 'needle.png'}", f"--json={tmp_path / 'needle.json'}"]
    command = [sys.executable, "launch/needle.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["depth", "gemini", "verbatim"]
    assert "mean" in done.stdout
    assert (tmp_path / "needle.png").stat().st_size > 1000
    found = json.loads((tmp_path / "needle.json").read_text())
    assert found["depths"] == list(range(0, 101, 10))
    assert [len(shares) for shares in found["accuracy"].values()] == [11, 11]
