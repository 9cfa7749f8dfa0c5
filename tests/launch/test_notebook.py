"""`launch/decode.ipynb` runs from top to bottom, and says what it promises."""

import pathlib
import re

import nbclient
import nbformat
import pytest

import blocktx
from blocktx.checkpoint.params import save_params
from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import RunConfig
from blocktx.data.corpus import prepare
from blocktx.model.build import build
from tests.helpers.random_weights import random_params

NOTEBOOK = pathlib.Path(__file__).parents[2] / "launch" / "decode.ipynb"
STACK = StackConfig(layers=1, width=32, heads=4)
MODEL = BlockConfig(vocab_size=300, context_length=128, block_decoder=STACK, token_decoder=STACK)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> pathlib.Path:
    """A run with random weights and the tokenizer of its corpus."""
    folder = tmp_path_factory.mktemp("notebook")
    prepare(data, MODEL.vocab_size).tokenizer.save(folder / "tokenizer.json")
    config, params = RunConfig(model=MODEL, data=data), random_params(build(MODEL))
    save_params(folder / "run", config, params, tokenizer=folder / "tokenizer.json")
    return folder / "run"


@pytest.mark.slow
def test_runs_top_to_bottom(run, monkeypatch):
    monkeypatch.setenv("BLOCKTX_CHECKPOINT", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": run}})
    client.execute()

    outputs = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs[cell.source] = cell.outputs

    def cell(part):
        (found,) = (outputs[source] for source in outputs if part in source)
        printed = "".join(output.text for output in found if output.output_type == "stream")
        pictures = [output for output in found if "image/png" in output.get("data", {})]
        return printed, len(pictures)

    engine = blocktx.load(run)
    streamed = engine.generate(
        "The state of the Union is", max_new_tokens=64, temperature=0.7, seed=2
    )
    assert cell("stream=True")[0].strip() == streamed.strip()
    header, *rows = cell("decode_throughput")[0].splitlines()
    assert re.fullmatch(r"batch +block \(0\.0M\) +vanilla \(0\.0M\) +ratio", header)
    assert [row.split()[0] for row in rows] == ["1", "32"]
    assert cell("plot_attention")[1] == 1
    printed, pictures = cell("loss_by_position")
    assert printed.startswith("loss=")
    assert pictures == 1


def test_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
