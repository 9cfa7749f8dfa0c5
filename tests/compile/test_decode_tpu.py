"""What the TPU's compiler, which needs no TPU, says of a decode loop at full size."""

import dataclasses
import importlib.util
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from blocktx import cost
from blocktx.benchmark.candidates import with_room
from blocktx.command_line import read_config
from blocktx.model.build import build, init_params
from blocktx.model.params import for_decoding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]
PAPER = pathlib.Path(__file__).parents[2] / "configs" / "paper.py"
ROWS, CONTEXT, STEPS = 64, 2176, 8
HZ, FLOPS, BYTES = 1.5e9, 197e12, 819e9  # a second, of one v5e chip


@pytest.fixture(scope="module")
def chip():
    settings = dict(
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(os.environ, name, value)
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(
            platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
        )
        yield topology.devices[0]


def compiled_loop(config, chip):
    """Greedy decoding of `STEPS` blocks by the methods of the model, the cache donated."""
    model, rows, slots = build(config), ROWS, CONTEXT // config.block_length
    prompt = slots - STEPS

    def step(index, carry, params, start_B):
        def apply(method, *args):
            return model.apply({"params": params}, *args, method=method)

        block_BxK, cache = carry
        slot_S = jnp.arange(slots)
        seen_BxS = (slot_S < start_B[:, None]) | ((slot_S >= prompt) & (slot_S < prompt + index))
        mask = jnp.ones((rows, 1, config.block_length), bool)
        arguments = (block_BxK[:, None], mask, start_B + index, cache, prompt + index, seen_BxS)
        contexts, cache = apply("extend", *arguments)
        logits, tokens = apply("start_block", contexts[:, 0], model.create_token_cache(rows))
        chosen = [logits.argmax(-1).astype(jnp.int32)]
        for k in range(config.block_length - 1):
            logits, tokens = apply("step_token", chosen[-1], k, tokens)
            chosen.append(logits.argmax(-1).astype(jnp.int32))
        return jnp.stack(chosen, axis=1), cache

    def loop(params, block_BxK, start_B, cache):
        return jax.lax.fori_loop(
            0, STEPS, lambda i, carry: step(i, carry, params, start_B), (block_BxK, cache)
        )

    shapes = jax.eval_shape(
        lambda: (
            for_decoding(model, init_params(model, jax.random.key(0)))[1],
            jnp.zeros((rows, config.block_length), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            model.create_cache(rows, slots),
        )
    )
    sharding = jax.sharding.SingleDeviceSharding(chip)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    return jax.jit(loop, donate_argnums=3).lower(*shapes).compile()


def cycles_of_body(text):
    """The largest sum of the estimates of one computation beside the entry: the loop's body."""
    sums, current = {}, None
    for line in text.splitlines():
        if re.match(r"^(ENTRY )?%?[\w.\-]+ .*\{$", line):
            current = None if line.startswith("ENTRY") else line.split()[0]
        elif current and (found := re.search(r'"estimated_cycles":"(\d+)"', line)):
            sums[current] = sums.get(current, 0) + int(found[1])
    return max(sums.values())


@pytest.mark.parametrize("name", ["block_170m", "vanilla_160m"])
def test_block_step_is_within_one_and_a_half_times_the_roofline(chip, name):
    config = with_room(read_config(f"{PAPER}:{name}").model, CONTEXT, "bfloat16")
    config = dataclasses.replace(config, platform="tpu", scan_layers=False)
    program = compiled_loop(config, chip)
    slots = CONTEXT // config.block_length
    work = cost.decode_block(config, ROWS, slots)
    roofline = HZ * max(work.flops / FLOPS, work.bytes / BYTES)
    cycles = cycles_of_body(program.as_text())
    print(f"{name}: {cycles} cycles, {cycles / roofline:.2f} of the roofline")
    assert roofline < cycles < 1.5 * roofline
    memory, cache = program.memory_analysis(), ROWS * cost.cache_bytes(config, slots)
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.1 * cache
