"""Ahead-of-time compilation of a run's programs for absent chips, and their cost."""

import dataclasses
import functools
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blocktx import cost
from blocktx.compile.abstract import bytes_on_a_chip, decoding_params, placed, prompts
from blocktx.compile.advice import decoding_advice, training_advice
from blocktx.compile.hlo import Program
from blocktx.compile.hlo_collectives import collectives
from blocktx.compile.hlo_cost import cycles, flops, hbm_bytes
from blocktx.compile.hlo_kernels import kernels
from blocktx.compile.hlo_operations import Computation
from blocktx.compile.report import GIB, Report
from blocktx.compile.topology import Topology
from blocktx.config import MeshConfig, ModelConfig, RunConfig
from blocktx.decode import Sampling, decode_blocks, decode_rows, init_rows, prefill
from blocktx.model import build
from blocktx.parallel import batch_parts, batch_sharding, check_model_fits, create_mesh
from blocktx.train import (
    abstract_batch,
    abstract_cache,
    abstract_state,
    abstract_teacher,
    check_run,
    train_step,
)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_OPTIONS = {
    "tpu": {},
    # Without a GPU to try its own tilings on, XLA finds none for some shapes; so cuBLAS.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


class DoesNotFit(ValueError):
    """A program needs more memory than a chip has. The message says how much, and what helps."""


def compile_train_step(config: RunConfig, topology: Topology) -> Report:
    """Compile the training step of `config` for all chips; of distillation, its last stage.

    Raises:
      DoesNotFit: the compiler says so, or the bytes do.
      ValueError: mesh, batch or model do not fit the topology.
    """
    config = _on(topology, config)
    mesh = create_mesh(config.mesh, topology.devices)
    check_run(config, mesh)
    state = abstract_state(config, mesh)
    batch = abstract_batch(config, mesh) | abstract_cache(config, mesh)
    teacher, last = abstract_teacher(config, mesh), len(config.distill.stages) - 1
    rows = config.training.batch_size
    if len({device.process_index for device in topology.devices}) > 1:
        batch["stop"] = jax.ShapeDtypeStruct((rows,), jnp.bool, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        lowered = train_step.lower(state, batch, config, build(config.model), teacher, last)
    compilation = _Compilation(
        program="train",
        model=config.model,
        topology=topology,
        mesh=mesh,
        arguments={
            "parameters": state.params,
            "optimizer": (state.opt_state, state.step),
            "teacher": () if teacher is None else teacher.params,
            "batch": batch,
        },
        batch_size=rows,
        tokens=rows * config.model.context_length,
        advice=lambda kinds, limit: training_advice(kinds, limit, config, mesh),
    )
    products = cost.train_step(config).flops / mesh.size
    if teacher is not None:
        read = dataclasses.replace(teacher.model.config, context_length=config.model.context_length)
        products += cost.forward(read, rows).flops / mesh.size
    return compilation.report(lowered, products, roofline=products / topology.chip.flops)


def compile_decoding(
    config: RunConfig,
    topology: Topology,
    program: Literal["prefill", "decode", "serve"],
    *,
    batch_size: int,
    context: int,
    quantized: Literal["int8"] | None = None,
) -> Report:
    """Decoding with the model of `config`, in a cache for `context` tokens: the prompt or a block.

    A block is that of a batch ("decode"), or that of a server's rows ("serve"): these have slots of
    their own, and log-probabilities on request, which are not counted.
    Rows are spread over all chips but those of `config.mesh.tensor`, and each of these groups has
    the whole model: `config.mesh.fsdp`, which would gather it for every token, counts as `data`.
    Parameters have the compute dtype, as an `Engine` holds them, or are `quantized`. The roofline
    and the counted bytes are those of parameters in the compute dtype.

    Raises:
      DoesNotFit: the compiler says so, or the bytes do.
      ValueError: mesh, batch, context or model do not fit.
    """
    config = _on(topology, config)
    dtype = config.model.compute_dtype
    model = dataclasses.replace(config.model, scan_layers=False, remat="none", param_dtype=dtype)
    mesh = create_mesh(MeshConfig(data=-1, fsdp=1, tensor=config.mesh.tensor), topology.devices)
    check_model_fits(model, mesh)
    parts = batch_parts(mesh)
    if batch_size < 1 or batch_size % parts:
        more = max(1, -(-batch_size // parts)) * parts
        raise ValueError(f"batch_size: {batch_size} rows do not go to {parts} chips; use {more}")
    if context % model.block_length or not 0 < context <= model.context_length:
        raise ValueError(
            f"context: got {context} tokens; use whole blocks of {model.block_length}, at most "
            f"config.model.context_length {model.context_length}"
        )
    slots = context // model.block_length
    net, by_row = build(model), functools.partial(placed, sharding=batch_sharding(mesh))
    params = decoding_params(model, mesh, quantized)
    read = prompts(model, batch_size, slots)
    if program == "prefill":
        arguments = {"parameters": params, "prompts": by_row(read)}
        with jax.set_mesh(mesh):
            lowered = prefill.lower(net, *arguments.values())
        work = cost.extend(model, batch_size // parts, slots, slots)
    else:
        sampling, number = by_row((Sampling.create(rows=batch_size), jnp.int32(0)))
        if program == "decode":
            state = jax.eval_shape(functools.partial(prefill, net), params, read)
            lower = functools.partial(decode_blocks.lower, blocks=number, pad_id=number)
        else:
            state = jax.eval_shape(functools.partial(init_rows, net, batch_size, slots))
            lower = functools.partial(
                decode_rows.lower,
                cancelled_B=by_row(jnp.zeros(batch_size, bool)),
                blocks=number,
                pad_id=number,
                score=number,
                most_blocks=1,
                top=0,
            )
        state = by_row(state)
        arguments = {
            "parameters": params,
            "cache": state.cache,
            "state": (state.replace(cache=()), sampling),
        }
        with jax.set_mesh(mesh):
            lowered = lower(net, params, state, sampling)
        work = cost.decode_block(model, batch_size // parts, slots)
    compilation = _Compilation(
        program=program,
        model=model,
        topology=topology,
        mesh=mesh,
        arguments=arguments,
        batch_size=batch_size,
        tokens=batch_size * (context if program == "prefill" else model.block_length),
        advice=lambda kinds, limit: decoding_advice(batch_size, parts, context),
    )
    tensor = mesh.shape["tensor"]
    least = topology.chip.seconds(flops=work.flops / tensor, hbm=work.bytes / tensor)
    roofline, moved = max(least.values()), work.bytes / tensor
    return compilation.report(lowered, work.flops / tensor, roofline, moved)


@dataclasses.dataclass(frozen=True)
class _Compilation:
    """Facts of a program before it is compiled."""

    program: str
    model: ModelConfig
    topology: Topology
    mesh: Mesh
    arguments: dict[str, Any]  # trees of ShapeDtypeStructs, by kind
    batch_size: int
    tokens: int
    advice: Callable[[dict[str, float], float], str]  # for these kinds of memory, and a limit

    def report(
        self,
        lowered: jax.stages.Lowered,
        products: float,
        roofline: float,
        counted_bytes: float | None = None,
    ) -> Report:
        chip, begin = self.topology.chip, time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            options = _OPTIONS[self.topology.platform] | {
                "xla_dump_to": folder,
                "xla_dump_hlo_as_text": True,
            }
            try:
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                raise self._out_of_memory(error) or error from error
            seconds = time.perf_counter() - begin
            program = Program(_text(compiled, pathlib.Path(folder)))
        within = _part(program, self.program)
        found = collectives(program, within)
        accessed = hbm_bytes(program, within)
        estimated_cycles = cycles(program, chip, within)
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
            flops=flops(program, within),
            bytes_accessed=accessed,
            counted_bytes=counted_bytes,
            kernels=kernels(program, within),
            collectives=found,
            seconds=chip.seconds(flops=products, hbm=accessed, sent=sum(c.sent for c in found)),
            roofline=roofline,
            cycle_seconds=None if estimated_cycles is None else estimated_cycles / chip.clock,
            compile_seconds=seconds,
        )
        if report.memory_total > chip.hbm_bytes:  # the compiler for GPUs does not look
            raise self._does_not_fit(report.memory_total, chip.hbm_bytes, report.memory)
        return report

    def _memory(self, compiled: jax.stages.Compiled) -> dict[str, int]:
        analysis = compiled.memory_analysis()
        kinds = {name: bytes_on_a_chip(tree) for name, tree in self.arguments.items()}
        return {
            **kinds,
            "padding": max(0, analysis.argument_size_in_bytes - sum(kinds.values())),
            "temporaries": analysis.temp_size_in_bytes,
            "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "code": analysis.generated_code_size_in_bytes,
        }

    def _out_of_memory(self, error: Exception) -> DoesNotFit | None:
        # Said before memory is laid out and after, by the compiler for TPUs.
        found = re.search(
            rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
            str(error),
        ) or re.search(rf"Used {_SIZE} of {_SIZE} hbm", str(error))
        if found is None:
            return None
        need, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        kinds = {name: bytes_on_a_chip(tree) for name, tree in self.arguments.items()}
        return self._does_not_fit(need, limit, kinds | {"the rest": need - sum(kinds.values())})

    def _does_not_fit(self, need: float, limit: float, kinds: dict[str, float]) -> DoesNotFit:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in kinds.items())
        return DoesNotFit(
            f"the {self.program} program does not fit: a chip of {self.topology.name} needs "
            f"{need / GIB:.2f} GiB ({parts}) and has {limit / GIB:.2f}, "
            f"{(need - limit) / GIB:.2f} too few; what helps: {self.advice(kinds, limit)}"
        )


def _on(topology: Topology, config: RunConfig) -> RunConfig:
    model = dataclasses.replace(config.model, platform=topology.platform)
    return dataclasses.replace(config, model=model)


def _part(program: Program, name: str) -> Computation | None:
    """Return the body of the loop of a program that decodes, else None."""
    return program.open_loops()[0][1] if name in ("decode", "serve") else None


def _text(compiled: jax.stages.Compiled, dumped: pathlib.Path) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read all that libtpu writes (v5p does so)
        (file,) = dumped.glob("*.after_optimizations.txt")
        return file.read_text()
