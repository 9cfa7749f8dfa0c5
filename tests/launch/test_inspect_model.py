"""`launch/inspect_model.py` as a user runs it, from a clone."""

import pathlib
import re
import subprocess
import sys

from matplotlib.image import imread

from blocktx import load
from blocktx.inspect_model import in_blocks, nearest_tokens

ROOT = pathlib.Path(__file__).parents[2]


def launch(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/inspect_model.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_pictures_and_tokens(finished, tmp_path):
    _, run, _ = finished
    output = tmp_path / "new" / "pictures"
    done = launch(
        f"--checkpoint={run}",
        "--prompt=token cache block prefix lookup context",
        f"--output={output}",
        "--count=3",
    )
    assert done.returncode == 0, done.stderr
    for name in ("block_attention.png", "token_attention.png"):
        assert imread(output / name).std() > 0.05
        assert f": {output / name}\n" in done.stdout
    engine = load(run)
    text = in_blocks(
        engine.tokenizer.encode("token cache block prefix lookup context"),
        engine.model,
        engine.tokenizer.pad_id,
    )
    found, _ = nearest_tokens(engine.model, engine.params, *text, count=3)
    shares = re.findall(r"^  layer 0: \d+% on the first block ", done.stdout, re.MULTILINE)
    assert len(shares) == engine.config.model.block_decoder.layers
    rows = re.findall(r"^  prefix \d: (.*)$", done.stdout, re.MULTILINE)
    assert len(rows) == found.shape[0] * found.shape[1]
    for row, tokens in zip(rows, found.reshape(-1, 3).tolist(), strict=True):
        assert [part[: part.rindex(" ")] for part in re.split(r"(?<=\d), ", row)] == [
            repr(engine.tokenizer.decode([token])) for token in tokens
        ]


def test_mistake_is_one_line(finished, tmp_path):
    done = launch(f"--checkpoint={finished[1]}", "--prompt=", f"--output={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: text: got 0 tokens, must be 1 to 32 (context_length)\n"
