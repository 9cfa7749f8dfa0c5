"""Compiles the programs of a run for chips that are not there, and says what they will cost."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blocktx import cost, hlo_cost
from blocktx.config import RunConfig
from blocktx.hlo import Program
from blocktx.hlo_cost import Collective
from blocktx.model import build
from blocktx.run_start import check_run
from blocktx.sharding import batch_parts, batch_sharding, create_mesh
from blocktx.step import abstract_batch, abstract_state, train_step
from blocktx.topology import Topology

_GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": _GIB}


class DoesNotFit(ValueError):
    """The program needs more memory than a chip has; the message says how much, and what helps."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program, in bytes, FLOPs and seconds of one chip.

    `memory` has the arguments by kind and then what the compiler adds to them: `padding` of the
    arguments' layouts, `temporaries`, `outputs` (those that are not put in place of an argument)
    and `code`. `products` are the FLOPs of the model's matrix products (`blocktx.cost`),
    `flops` those of the compiled program's, which may compute some twice; of a decoding program all
    is for one iteration, a block step and its K token steps. `cycles` is the TPU compiler's
    estimate of the program without waiting for other chips, `roofline_cycles` what the resource
    that binds takes: for training the matrix unit, for decoding that or the memory.
    """

    program: str
    topology: str
    mesh: dict[str, int]
    parameters: int
    batch_size: int
    memory: dict[str, int]
    hbm_bytes: int
    products: float
    flops: int
    bytes_accessed: int
    collectives: list[Collective]
    seconds: dict[str, float]
    cycles: int | None
    roofline_cycles: float
    compile_seconds: float

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def binds(self) -> str:
        """The resource that needs the most time."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def ratio(self) -> float | None:
        """Estimated cycles in units of the roofline."""
        return self.cycles / self.roofline_cycles if self.cycles else None


def compile_train_step(config: RunConfig, topology: Topology) -> Report:
    """The training step of `config` on all chips of `topology`.

    Raises:
      DoesNotFit: the compiler says so, or the bytes do.
      ValueError: mesh, batch, or model do not fit the topology.
    """
    config = _for_platform(config, topology)
    mesh = create_mesh(config.mesh, topology.devices)
    check_run(config, mesh)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    if len({device.process_index for device in topology.devices}) > 1:
        rows = (config.training.batch_size,)
        batch["stop"] = jax.ShapeDtypeStruct(rows, jnp.bool, sharding=batch_sharding(mesh))
    arguments = {
        "parameters": state.params,
        "optimizer": (state.opt_state, state.step),
        "batch": batch,
    }
    with jax.set_mesh(mesh):
        lowered = train_step.lower(state, batch, config, build(config.model))
    compiled, seconds = _compile(lowered, config, mesh, arguments, topology)
    program = Program(compiled.as_text())
    products = cost.train_step(config).flops / mesh.size
    report = _report(
        "train", config, topology, mesh, arguments, compiled, program, seconds, products
    )
    return _checked(report, config, mesh)


def _report(
    name: str,
    config: RunConfig,
    topology: Topology,
    mesh: Mesh,
    arguments: dict[str, Any],
    compiled: jax.stages.Compiled,
    program: Program,
    seconds: float,
    products: float,
) -> Report:
    chip = topology.chip
    accessed, found = hlo_cost.hbm_bytes(program), hlo_cost.collectives(program)
    return Report(
        program=name,
        topology=topology.name,
        mesh=dict(mesh.shape),
        parameters=cost.count_params(config.model).total,
        batch_size=config.training.batch_size,
        memory=_memory(compiled, arguments),
        hbm_bytes=chip.hbm_bytes,
        products=products,
        flops=hlo_cost.flops(program),
        bytes_accessed=accessed,
        collectives=found,
        seconds=chip.seconds(
            flops=products, hbm=accessed, sent=sum(collective.sent for collective in found)
        ),
        cycles=hlo_cost.cycles(program, chip) if topology.platform == "tpu" else None,
        roofline_cycles=products / chip.flops * chip.clock,
        compile_seconds=seconds,
    )


def _for_platform(config: RunConfig, topology: Topology) -> RunConfig:
    model = dataclasses.replace(config.model, platform=topology.platform)
    return dataclasses.replace(config, model=model)


def _compile(
    lowered: jax.stages.Lowered,
    config: RunConfig,
    mesh: Mesh,
    arguments: dict[str, Any],
    topology: Topology,
) -> tuple[jax.stages.Compiled, float]:
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # "Ran out of memory in memory space hbm. Used 20.05G of 15.75G hbm."
        used = re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", str(error))
        if used is None:
            raise
        need, limit = (float(used[i]) * _UNITS[used[i + 1]] for i in (1, 3))
        kinds = {name: _bytes_on_a_chip(tree) for name, tree in arguments.items()}
        kinds["all else"] = round(need) - sum(kinds.values())
        raise DoesNotFit(_too_much(need, limit, kinds, config, mesh, topology.name)) from error
    return compiled, time.perf_counter() - begin


def _memory(compiled: jax.stages.Compiled, arguments: dict[str, Any]) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    kinds = {name: _bytes_on_a_chip(tree) for name, tree in arguments.items()}
    return {
        **kinds,
        "padding": analysis.argument_size_in_bytes - sum(kinds.values()),
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def _bytes_on_a_chip(tree: Any) -> int:
    def size(x: jax.ShapeDtypeStruct) -> int:
        part = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        return part.size * part.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _checked(report: Report, config: RunConfig, mesh: Mesh) -> Report:
    if report.memory_total > report.hbm_bytes:  # compilers for GPUs do not look
        need, limit = report.memory_total, report.hbm_bytes
        raise DoesNotFit(_too_much(need, limit, report.memory, config, mesh, report.topology))
    return report


def _too_much(
    need: float,
    limit: float,
    kinds: dict[str, int],
    config: RunConfig,
    mesh: Mesh,
    topology: str,
) -> str:
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in kinds.items())
    return (
        f"config: does not fit {topology}: a chip needs {need / _GIB:.2f} GiB ({parts}) and has "
        f"{limit / _GIB:.2f}, {(need - limit) / _GIB:.2f} too few; {_advice(kinds, config, mesh)}"
    )


def _advice(kinds: dict[str, int], config: RunConfig, mesh: Mesh) -> str:
    """The knobs that make smaller what takes the most memory."""
    kept = sum(kinds.get(name, 0) for name in ("parameters", "optimizer"))
    knobs = []
    if kept > sum(kinds.values()) / 2:
        if mesh.shape["data"] > 1:
            knobs.append("config.mesh.data=1 and config.mesh.fsdp=-1 (cut the state up further)")
        knobs.append("a topology of more chips")
    rows = config.training.batch_size // batch_parts(mesh) // config.training.microbatches
    if rows > 1:
        more = next(n for n in range(2, rows + 1) if rows % n == 0)
        knobs.append(f"config.training.microbatches={config.training.microbatches * more}")
    else:
        knobs.append("config.mesh.tensor=2 (cut each layer up)")
    if config.model.remat != "full":
        knobs.append("config.model.remat=full")
    return "what helps: " + ", ".join(knobs)
