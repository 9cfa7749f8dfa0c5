"""Compiles the programs of a run for chips that are not there, and says what they will cost."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blocktx import cost, hlo_cost, sampling
from blocktx.aot_report import GIB, Report
from blocktx.config import MeshConfig, RunConfig
from blocktx.hlo import Computation, Program
from blocktx.model import abstract_params, build
from blocktx.model_config import ModelConfig
from blocktx.run_start import check_run
from blocktx.sharding import (
    batch_parts,
    batch_sharding,
    check_model_fits,
    create_mesh,
    replicated,
)
from blocktx.step import abstract_batch, abstract_state, train_step
from blocktx.topology import Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB}
_OPTIONS = {
    "tpu": {},
    # Without a GPU to try its own tilings on, XLA finds none for some shapes; so cuBLAS.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}
_NEW_BLOCKS = 16  # room for these is left behind a prompt; a loop costs the same for any number


class DoesNotFit(ValueError):
    """The program needs more memory than a chip has; the message says how much, and what helps."""


def compile_train_step(config: RunConfig, topology: Topology) -> Report:
    """The training step of `config` on all chips of `topology`.

    Raises:
      DoesNotFit: the compiler says so, or the bytes do.
      ValueError: mesh, batch or model do not fit the topology.
    """
    config = _on(topology, config)
    mesh = create_mesh(config.mesh, topology.devices)
    check_run(config, mesh)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    rows = config.training.batch_size
    if len({device.process_index for device in topology.devices}) > 1:
        batch["stop"] = jax.ShapeDtypeStruct((rows,), jnp.bool, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        lowered = train_step.lower(state, batch, config, build(config.model))
    compilation = _Compilation(
        program="train",
        model=config.model,
        topology=topology,
        mesh=mesh,
        arguments={
            "parameters": state.params,
            "optimizer": (state.opt_state, state.step),
            "batch": batch,
        },
        batch_size=rows,
        tokens=rows * config.model.context_length,
        advice=lambda kinds: _training_advice(kinds, config, mesh),
    )
    products = cost.train_step(config).flops / mesh.size
    return compilation.report(lowered, products, roofline=products / topology.chip.flops)


def compile_decoding(
    config: RunConfig,
    topology: Topology,
    program: Literal["prefill", "decode"],
    *,
    batch_size: int,
    context: int,
) -> Report:
    """Decoding with the model of `config`, in a cache for `context` tokens: the prompt or a block.

    Rows are spread over all chips but those of `config.mesh.tensor`, and each of these groups has
    the whole model: `config.mesh.fsdp`, which would gather it for every token, counts as `data`.

    Raises:
      DoesNotFit: the compiler says so, or the bytes do.
      ValueError: mesh, batch, context or model do not fit.
    """
    config = _on(topology, config)
    model = dataclasses.replace(config.model, scan_layers=False, remat="none")
    mesh = create_mesh(MeshConfig(data=-1, fsdp=1, tensor=config.mesh.tensor), topology.devices)
    check_model_fits(model, mesh)
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % parts:
        more = max(1, -(-batch_size // parts)) * parts
        raise ValueError(f"batch_size: {batch_size} rows do not go to {parts} chips; use {more}")
    least, most = 2 * _NEW_BLOCKS * model.block_length, model.context_length
    if context % model.block_length or not least <= context <= most:
        raise ValueError(
            f"context: got {context} tokens; use whole blocks of {model.block_length}, {least} to "
            f"config.model.context_length {most}"
        )
    slots = context // model.block_length
    prompt = slots - _NEW_BLOCKS + 1
    arguments = _decoding_arguments(model, mesh, batch_size, prompt, slots)
    with jax.set_mesh(mesh):
        lowered = sampling._generate.lower(
            build(model),
            *(arguments[name] for name in ("parameters", "tokens", "mask", "cache", "sampling")),
            new_bucket=_NEW_BLOCKS,
            **_scalars(mesh),
        )
    tokens = model.block_length if program == "decode" else prompt * model.block_length
    compilation = _Compilation(
        program=program,
        model=model,
        topology=topology,
        mesh=mesh,
        arguments=arguments,
        batch_size=batch_size,
        tokens=batch_size * tokens,
        advice=lambda kinds: _decoding_advice(model, batch_size, parts, context),
    )
    rows = batch_size // parts
    if program == "decode":
        work = cost.decode_block(model, rows, slots)
    else:
        work = cost.extend(model, rows, prompt, slots)
    tensor = mesh.shape["tensor"]
    least_time = topology.chip.seconds(flops=work.flops / tensor, hbm=work.bytes / tensor)
    return compilation.report(lowered, work.flops / tensor, roofline=max(least_time.values()))


@dataclasses.dataclass(frozen=True)
class _Compilation:
    """What is known of a program before it is compiled."""

    program: str
    model: ModelConfig
    topology: Topology
    mesh: Mesh
    arguments: dict[str, Any]  # trees of ShapeDtypeStructs, by kind
    batch_size: int
    tokens: int
    advice: Callable[[dict[str, int]], str]  # what to do if these kinds of memory are too much

    def report(self, lowered: jax.stages.Lowered, products: float, roofline: float) -> Report:
        begin = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options=_OPTIONS[self.topology.platform])
        except jax.errors.JaxRuntimeError as error:
            raise self._out_of_memory(error) or error from error
        seconds = time.perf_counter() - begin
        program, chip = Program(compiled.as_text()), self.topology.chip
        within = _part(program, self.program)
        found = hlo_cost.collectives(program, within)
        accessed = hlo_cost.hbm_bytes(program, within)
        cycles = hlo_cost.cycles(program, chip, within)
        report = Report(
            program=self.program,
            model=self.model.kind,
            topology=self.topology.name,
            mesh=dict(self.mesh.shape),
            batch_size=self.batch_size,
            parameters=cost.count_params(self.model).total,
            tokens=self.tokens,
            memory=self._memory(compiled),
            hbm_bytes=chip.hbm_bytes,
            products=products,
            flops=hlo_cost.flops(program, within),
            bytes_accessed=accessed,
            collectives=found,
            seconds=chip.seconds(flops=products, hbm=accessed, sent=sum(c.sent for c in found)),
            roofline=roofline,
            cycle_seconds=cycles / chip.clock if chip.clock else None,
            compile_seconds=seconds,
        )
        if report.memory_total > chip.hbm_bytes:  # the compiler for GPUs does not look
            raise self._does_not_fit(report.memory_total, chip.hbm_bytes, report.memory)
        return report

    def _memory(self, compiled: jax.stages.Compiled) -> dict[str, int]:
        analysis = compiled.memory_analysis()
        kinds = {name: _bytes_on_a_chip(tree) for name, tree in self.arguments.items()}
        return {
            **kinds,
            "padding": max(0, analysis.argument_size_in_bytes - sum(kinds.values())),
            "temporaries": analysis.temp_size_in_bytes,
            "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "code": analysis.generated_code_size_in_bytes,
        }

    def _out_of_memory(self, error: Exception) -> DoesNotFit | None:
        # "Ran out of memory in memory space hbm. Used 20.05G of 15.75G hbm."
        used = re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", str(error))
        if used is None:
            return None
        need, limit = (float(used[i]) * _UNITS[used[i + 1]] for i in (1, 3))
        kinds = {name: _bytes_on_a_chip(tree) for name, tree in self.arguments.items()}
        return self._does_not_fit(need, limit, kinds | {"the rest": need - sum(kinds.values())})

    def _does_not_fit(self, need: float, limit: float, kinds: dict[str, float]) -> DoesNotFit:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in kinds.items())
        return DoesNotFit(
            f"the {self.program} program does not fit: a chip of {self.topology.name} needs "
            f"{need / GIB:.2f} GiB ({parts}) and has {limit / GIB:.2f}, "
            f"{(need - limit) / GIB:.2f} too few; what helps: {self.advice(kinds)}"
        )


def _on(topology: Topology, config: RunConfig) -> RunConfig:
    model = dataclasses.replace(config.model, platform=topology.platform)
    return dataclasses.replace(config, model=model)


def _decoding_arguments(
    config: ModelConfig, mesh: Mesh, rows: int, prompt: int, slots: int
) -> dict[str, Any]:
    """Arguments of the generating loop after the model, by kind."""
    net = build(config)

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        by_row = x.shape[:1] == (rows,)
        sharding = batch_sharding(mesh) if by_row else replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shape = (rows, prompt, config.block_length)
    others = jax.eval_shape(
        lambda: {
            "tokens": jnp.zeros(shape, jnp.int32),
            "mask": jnp.zeros(shape, bool),
            "cache": net.create_cache(rows, slots),
            "sampling": sampling.Sampling.create(
                temperature=0.0, top_k=0, top_p=1.0, seed=0, rows=rows
            ),
        }
    )
    return {"parameters": abstract_params(config, mesh), **jax.tree.map(place, others)}


def _scalars(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return {"new_blocks": number, "end_id": number, "pad_id": number}


def _part(program: Program, name: str) -> Computation | None:
    """Of a program that generates: the loop's body, whose iterations are counted as they come."""
    return program.open_loops()[0][1] if name == "decode" else None


def _bytes_on_a_chip(tree: Any) -> int:
    def size(x: jax.ShapeDtypeStruct) -> int:
        part = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        return part.size * part.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _training_advice(kinds: dict[str, float], config: RunConfig, mesh: Mesh) -> str:
    """Knobs for what takes the most memory, as flags."""
    knobs = []
    state = kinds["parameters"] + kinds["optimizer"]
    if state > sum(kinds.values()) / 2:
        if mesh.shape["data"] > 1:
            knobs.append(
                "--config.mesh.data=1 --config.mesh.fsdp=-1, so that each chip has less "
                "of parameters and optimizer"
            )
        knobs.append("a topology of more chips")
    parts = config.training.microbatches
    rows = config.training.batch_size // batch_parts(mesh) // parts
    if rows > 1:
        more = next(n for n in range(2, rows + 1) if rows % n == 0)
        knobs.append(f"--config.training.microbatches={parts * more}")
    elif mesh.size > mesh.shape["tensor"]:
        knobs.append(f"--config.mesh.tensor={2 * mesh.shape['tensor']}")
    if config.model.remat != "full":
        knobs.append("--config.model.remat=full")
    return ", or ".join(knobs)


def _decoding_advice(model: ModelConfig, batch_size: int, parts: int, context: int) -> str:
    knobs = []
    if batch_size > parts:
        knobs.append(f"--batch_size={max(parts, batch_size // 2 // parts * parts)}")
    if model.param_dtype == "float32":
        knobs.append("--config.model.param_dtype=bfloat16")
    return ", or ".join([*knobs, f"--context below {context}", "--config.mesh.tensor=2"])
