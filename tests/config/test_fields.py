"""Every field of every config class is checked when it is constructed."""

import dataclasses
import inspect
import math
import time
import types
import typing
from typing import Literal

import pytest

from blocktx.config import distill, formulations, model, run, stack
from blocktx.config.fields import FieldError, divisors

STACK = model.StackConfig(layers=1, width=32, heads=4)
BLOCK = model.BlockConfig(
    vocab_size=50, context_length=16, block_decoder=STACK, token_decoder=STACK
)
VANILLA = model.VanillaConfig(vocab_size=50, context_length=16, decoder=STACK)
NEEDED = {  # instances of the classes whose fields have no defaults
    model.StackConfig: STACK,
    model.BlockConfig: BLOCK,
    model.VanillaConfig: VANILLA,
    run.RunConfig: run.RunConfig(model=BLOCK),
}


def config_classes() -> list[type]:
    found = {
        cls
        for module in (distill, formulations, model, run, stack)
        for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        if isinstance(cls, type) and cls.__module__ == module.__name__ and cls.__name__[0] != "_"
    }
    return sorted(found, key=lambda cls: cls.__name__)


def wrong_values(hint) -> list:
    """Values that a field of this annotation must refuse."""
    if isinstance(hint, types.UnionType):
        kinds = set(typing.get_args(hint)) - {types.NoneType}
        (one,) = kinds if len(kinds) == 1 else (next(iter(kinds)),)
        return [value for value in wrong_values(one) if value is not None]
    if typing.get_origin(hint) is Literal:
        choice = typing.get_args(hint)[0]
        return [f"{choice}x", choice.upper(), "", None, 3, True, [choice]]
    return {
        int: [True, 1.0, "1", None, [1], 10**30],
        float: [True, "1", None, math.nan, math.inf, -math.inf, 10**400],
        bool: [0, 1, "yes", None],
        str: [0, None, b"text", ["text"]],
    }.get(hint, [None, 3, "block", {}, STACK if hint is not model.StackConfig else BLOCK])


CASES = [
    pytest.param(cls, field, value, id=f"{cls.__name__}.{field}={str(value)[:20]}")
    for cls in config_classes()
    for field, hint in typing.get_type_hints(cls).items()
    if field in {f.name for f in dataclasses.fields(cls)}
    for value in wrong_values(hint)
]


def test_all_classes_are_looked_at():
    assert {"StackConfig", "BlockConfig", "OptimizerConfig", "RunConfig", "DataConfig"} <= {
        cls.__name__ for cls in config_classes()
    }


@pytest.mark.parametrize(("cls", "field", "value"), CASES)
def test_wrong_value_is_refused_by_name(cls, field, value):
    config = NEEDED.get(cls) or cls()
    with pytest.raises(FieldError) as info:
        dataclasses.replace(config, **{field: value})
    assert info.value.field == field
    assert len(str(info.value)) < 400


@pytest.mark.parametrize("value", [1, 3])
def test_int_given_for_a_float_becomes_one(value):
    assert type(model.StackConfig(1, 32, 4, rotary_base=value).rotary_base) is float


def test_divisors_of_any_number_take_no_time():
    begin = time.perf_counter()
    assert divisors(48) == "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"
    near = divisors(2**40, near=1000).split(", ")
    assert {"512", "1024", "..."} <= set(near)
    divisors(10**30, near=7)
    assert time.perf_counter() - begin < 5


def test_huge_sizes_are_refused_at_once():
    huge = dataclasses.replace(STACK, width=2**30, heads=1)
    with pytest.raises(FieldError, match="block_length"):
        dataclasses.replace(
            BLOCK, embeddings_per_block=2**31 - 1, block_length=7, context_length=14,
            block_decoder=huge,
        )  # fmt: skip
