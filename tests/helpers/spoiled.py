"""Copies of the authors' checkpoints, to be spoiled, and what refuses them."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from blocktx.convert import load_official
from tests.helpers import golden

UNUSED = "block_decoder.gpt_neox.embed_in.weight"


def bytes_of(tensors):
    return {
        name: (array.dtype, array.shape, array.tobytes())
        for name, array in tensors.items()
        if name != UNUSED
    }


def copy_of_golden(tmp_path):
    """A copy of a golden case, to be spoiled."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(golden.path("cls_sum"), copy)
    return copy


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refusal(*args, error=ValueError, load=load_official):
    with pytest.raises(error) as caught:
        load(*args)
    return str(caught.value)
