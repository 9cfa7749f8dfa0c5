"""A run that commit 695d344 has written (format 1, step 4): its model loads and does the same."""

import dataclasses
import re
import tarfile

import jax
import numpy as np
import pytest

from blocktx.checkpoint.manager import Checkpoints
from blocktx.checkpoint.metadata import read_json
from blocktx.checkpoint.params import load_params, load_tokenizer
from blocktx.config.saved import from_saved
from blocktx.data.corpus import read_in_memory
from blocktx.evaluate.heldout import summary, text_sums
from blocktx.model.build import build
from blocktx.parallel.sharding import create_mesh
from blocktx.train.loop import train
from blocktx.train.metrics import read
from blocktx.train.step import abstract_state


@pytest.fixture(scope="module")
def old(request, tmp_path_factory):
    """The folder of the run, with its corpus beside it."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(request.path.with_name("run_695d344.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run_695d344" / "run"


@pytest.fixture(scope="module")
def config(old):
    """Its configuration, with the corpus where it is now: another path is no other corpus."""
    saved = from_saved(read_json(old / "config.json"), 1)
    corpus, cache = old.with_name("corpus"), old.with_name("cache")
    data = dataclasses.replace(saved.data, source=str(corpus), cache_dir=str(cache))
    return dataclasses.replace(saved, data=data)


def test_the_held_out_loss_is_what_it_was(old):
    loaded = load_params(old)
    assert loaded.step == 4
    model, tokenizer = build(loaded.config.model), load_tokenizer(loaded)
    documents = read_in_memory(str(old.with_name("corpus") / "b.txt"), "text", tokenizer)
    mesh = create_mesh(loaded.config.mesh)
    with jax.set_mesh(mesh):
        sums = text_sums(model, loaded.params, documents, tokenizer.pad_id, mesh, batch_size=4)
    wanted = read(old)[-1]["heldout/loss"]
    np.testing.assert_allclose(summary(sums, 1.0).loss, wanted, rtol=1e-5)


def test_the_whole_training_state_is_read(old, config):
    wanted = abstract_state(config, create_mesh(config.mesh))
    with Checkpoints(old, config) as checkpoints:
        resumed = checkpoints.restore(wanted.params, wanted.opt_state)
    assert resumed.step == 4
    (count,) = {int(x) for x in jax.tree.leaves(resumed.opt_state) if x.ndim == 0}
    assert count == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.params, load_params(old).params)


def test_training_refuses_another_packing_and_begins_with_its_parameters(old, config, tmp_path):
    with pytest.raises(ValueError, match="another packing") as refused:
        train(config, old, resume=True)
    # The flags in the message, as they stand there.
    flags = dict(re.findall(r"--config\.(\S+)=(\S+)", str(refused.value)))
    assert flags.keys() == {"training.init_from", "data.tokenizer"}
    training = dataclasses.replace(config.training, steps=1, init_from=flags["training.init_from"])
    data = dataclasses.replace(config.data, tokenizer=flags["data.tokenizer"])
    new = dataclasses.replace(config, training=training, data=data)
    assert train(new, tmp_path / "run").step == 1
