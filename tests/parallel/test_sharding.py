"""Where arrays lie does not change what is computed; what cannot lie anywhere is refused."""

import dataclasses
import json
import os
import types

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, PartitionSpec

from blocktx.config.model import BlockConfig, EmbedderConfig, StackConfig, VanillaConfig
from blocktx.config.run import MeshConfig
from blocktx.model.build import abstract_params
from blocktx.parallel import sharding
from blocktx.train.loop import train
from blocktx.train.metrics import read
from blocktx.train.step import check_run
from tests.helpers import eight_devices
from tests.helpers.tiny_run import MODEL, run_config

STACK = StackConfig(layers=2, width=64, heads=4)


def mesh(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES)


@pytest.mark.parametrize(
    "kind",
    [
        "block",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "vanilla", "bag")),
    ],
)
def test_losses_are_those_of_one_device(kind):
    losses = eight_devices.run("losses", kind)
    expected = losses.pop("one device")
    assert expected[0] != expected[-1]
    assert losses.keys() == eight_devices.MESHES.keys()
    for name, values in losses.items():
        np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", [pytest.param("neox", marks=pytest.mark.slow), "llama"])
def test_formulations_for_tpu_are_the_plain_ones_on_every_mesh(family):
    """Kernels are sharded by hand; XLA shards everything else."""
    found = eight_devices.run("kernels", family)
    plain = found.pop("plain")
    assert set(found) == {"fsdp", "mixed", "one device"}
    for name, values in found.items():
        np.testing.assert_allclose(values, plain, rtol=2e-4, err_msg=name)


def test_fewer_key_value_heads_than_tensor_are_refused_by_name():
    stack = StackConfig.llama(1, 64, 4, key_value_heads=2)
    model = VanillaConfig(vocab_size=64, context_length=8, decoder=stack)
    sharding.check_model_fits(model, mesh(tensor=2))
    with pytest.raises(ValueError, match=r"tensor: 4 does not divide .*decoder\.key_value_heads 2"):
        sharding.check_model_fits(model, mesh(tensor=4))


def test_engine_on_a_mesh(finished):
    found = eight_devices.run("engine", str(finished[1]))
    assert found["mesh"] == found["one device"]
    assert any(found["mesh"])
    # Not by fsdp, from which they would be gathered for every token.
    assert found["pieces, mesh"] == eight_devices.MESHES["mixed"]["tensor"] == 2
    assert found["pieces, one device"] == 1


@pytest.mark.slow
def test_a_run_goes_on_from_mesh_to_mesh(data, tmp_path):
    """One device -> eight by fsdp -> by tensor and fsdp -> one device, as if nothing had been."""
    settings = dict(steps=8, batch_size=8, checkpoint_every=2)
    config = run_config(data, optimizer=dict(schedule="constant"), **settings)
    train(config, tmp_path / "alone")
    moved = tmp_path / "moved"
    train(stop_at(config, 2), moved)
    (tmp_path / "moved.json").write_text(json.dumps(dataclasses.asdict(config)))
    eight_devices.run("train", str(moved), "4:fsdp", "6:mixed")
    train(config, moved, resume=True)

    def losses_of(workdir):
        return {line["step"]: line["train/loss"] for line in read(workdir) if "train/loss" in line}

    alone, moved = losses_of(tmp_path / "alone"), losses_of(moved)
    assert list(alone) == list(range(1, 9)) == list(moved)
    np.testing.assert_allclose(list(moved.values()), list(alone.values()), rtol=1e-5)


def stop_at(config, steps):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))


EVERY_MODULE = [
    VanillaConfig(vocab_size=64, context_length=32, decoder=STACK),
    BlockConfig(vocab_size=64, context_length=32, block_decoder=STACK, token_decoder=STACK),
    BlockConfig(
        vocab_size=64,
        context_length=32,
        block_decoder=STACK,
        token_decoder=STACK,
        embedder=EmbedderConfig(kind="cls"),
        conditioning="cross_attention",
        scan_layers=False,
    ),
]


@pytest.mark.parametrize("config", EVERY_MODULE)
def test_every_axis_of_every_parameter_has_a_name_with_a_rule(config, monkeypatch):
    seen = set()
    monkeypatch.setattr(sharding, "RULES", Watched(seen))
    params = abstract_params(config, mesh(fsdp=2, tensor=2))
    assert seen <= set(Watched.rules)
    for path, x in jax.tree.leaves_with_path(params):
        assert len(x.sharding.spec) == x.ndim, path  # `spec` zips names and shape strictly


class Watched(dict):
    rules = sharding.RULES

    def __init__(self, seen):
        super().__init__(self.rules)
        self.seen = seen

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)


def test_each_matrix_is_cut_by_fsdp_and_tensor_and_no_vector_by_fsdp():
    params = abstract_params(EVERY_MODULE[1], mesh(fsdp=4, tensor=2))
    for path, x in jax.tree.leaves_with_path(params):
        axes = {cut for cut in x.sharding.spec if cut}
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if path[-1].key in ("kernel", "embedding"):
            assert axes == ({"fsdp"} if "expansion" in name else {"fsdp", "tensor"}), name
        else:
            assert "fsdp" not in axes, name


@pytest.mark.parametrize(
    ("names", "shape", "sizes", "expected"),
    [
        (("batch", "positions", None), (8, 3, 5), (2, 2, 2), (("data", "fsdp"), None, None)),
        (("width", "positions", "width"), (8, 2, 8), (1, 4, 1), (("fsdp",), None, None)),
        (("width", "positions", "width"), (6, 2, 8), (1, 4, 1), (None, None, ("fsdp",))),
        (("vocab", "width"), (10, 6), (1, 4, 2), (("tensor",), None)),
    ],
)
def test_spec(names, shape, sizes, expected):
    assert sharding.spec(names, shape, mesh(*sizes)) == PartitionSpec(*expected)


def devices(count, slices=1):
    """Devices that are in no process."""
    return [
        types.SimpleNamespace(
            id=i, process_index=0, slice_index=i * slices // count, platform="none", device_kind="x"
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_rest(config, shape):
    assert sharding._shape(config, 8) == shape


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        (dict(fsdp=3), 8, r"config\.mesh: data 1 x fsdp 3 x tensor 1 does not fit 8 devices.*-1"),
        (dict(data=3), 8, r"data 3 x fsdp -1 x tensor 1 does not fit 8 devices.*1, 2, 4, 8"),
        (dict(fsdp=16), 1, r"does not fit 1 device;"),
    ],
)
def test_mesh_that_does_not_fit_the_devices(sizes, count, message):
    with pytest.raises(ValueError, match=message):
        sharding.create_mesh(MeshConfig(**sizes), devices(count))


def test_slices_are_along_data_first():
    """Two slices of four chips each: those that differ in `data` alone are in different ones."""
    pytest.importorskip("libtpu", reason="describes the chips")
    from blocktx.compile.topology import _LIBTPU_ENVIRONMENT

    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
    made = sharding.create_mesh(MeshConfig(data=2), described.devices)
    slices = np.vectorize(lambda device: device.slice_index)(made.devices)
    assert made.devices.shape == (2, 4, 1)
    assert (slices == np.array([0, 1])[:, None, None]).all()


def test_slices_that_data_does_not_reach():
    with pytest.raises(ValueError, match=r"config\.mesh\.data: 1 is no multiple of the 2 slices"):
        sharding.create_mesh(MeshConfig(), devices(8, slices=2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(tensor=3), r"tensor: 3 does not divide config\.model\.vocab_size 256"),
        (dict(tensor=8), r"tensor: 8 does not divide config\.model\.block_decoder\.heads 4"),
    ],
)
def test_model_that_cannot_be_cut(sizes, message):
    config = dataclasses.replace(EVERY_MODULE[1], vocab_size=256)
    with pytest.raises(ValueError, match=message):
        sharding.check_model_fits(config, mesh(**sizes))


def test_run_that_does_not_fit_the_devices(data):
    place = types.SimpleNamespace(
        shape=dict(data=2, fsdp=4, tensor=1),
        devices=np.array(jax.devices()),
    )
    config = run_config(data, batch_size=8, microbatches=2)
    with pytest.raises(ValueError, match=r"batch_size: 8 rows .* 8 parts .* multiple of 16, .* 16"):
        check_run(config, place)
    offload = dataclasses.replace(MODEL, remat="offload")
    with pytest.raises(ValueError, match=r"remat: offload needs a GPU or TPU"):
        check_run(dataclasses.replace(config, model=offload), place)
