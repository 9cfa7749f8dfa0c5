"""Configurations in files: complete or refused; those of older versions are read."""

import dataclasses
import json

import pytest

from blocktx.config.conversion import to_dict
from blocktx.config.errors import UserError
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.config.run import RunConfig
from blocktx.config.saved import _FORMAT_1, FORMAT_VERSION, from_saved, to_saved

STACK = StackConfig(layers=1, width=32, heads=4)
SIZES = dict(vocab_size=64, context_length=16)
RUNS = [
    RunConfig(model=BlockConfig(**SIZES, block_decoder=STACK, token_decoder=STACK)),
    RunConfig(model=VanillaConfig(**SIZES, decoder=STACK)),
]


def paths(node, path=()):
    """The paths of all fields below nested dicts."""
    for name, value in node.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from paths(value, (*path, name))


def without(saved, path):
    copy = json.loads(json.dumps(saved))
    node = copy
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]
    return copy


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.model.kind)
def test_every_missing_field_is_refused(run):
    saved = json.loads(json.dumps(to_saved(run)))
    assert from_saved(saved, FORMAT_VERSION) == run
    for path in paths(saved):
        if path[:2] == ("model", "formulations") and len(path) > 2:  # an execution choice
            continue
        with pytest.raises(UserError, match=rf"^config\.{'.'.join(path[:-1])}.*"):
            from_saved(without(saved, path), FORMAT_VERSION)


def test_a_file_of_format_1_lacks_newer_fields_alone():
    run = RUNS[0]
    newer = {
        (cls.__name__, field.name)
        for cls in (RunConfig, BlockConfig, StackConfig)
        for field in dataclasses.fields(cls)
        if field.name not in _FORMAT_1[cls.__name__].split()
    }
    assert ("RunConfig", "distill") in newer
    saved = json.loads(json.dumps(to_saved(run)))
    del saved["distill"]
    with pytest.raises(UserError, match=r"config\.distill: missing"):
        from_saved(saved, 2)
    assert from_saved(saved, 1) == run
    with pytest.raises(UserError, match=r"config\.model\.prefix_length: missing"):
        from_saved(without(saved, ("model", "prefix_length")), 1)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_choice_of_a_machine_is_saved_or_read(platform):
    model = dataclasses.replace(RUNS[0].model, platform=platform)
    run = dataclasses.replace(RUNS[0], model=model)
    assert to_saved(run)["model"]["platform"] == "auto"
    assert from_saved(to_dict(run), FORMAT_VERSION) == RUNS[0]
