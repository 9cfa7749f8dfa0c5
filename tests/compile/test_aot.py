"""Programs for chips that are not there; without the compilers for them, what is refused before."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from blocktx import cost
from blocktx.checkpoint.params import save_params
from blocktx.compile.aot import DoesNotFit, _Compilation, compile_decoding, compile_train_step
from blocktx.compile.report import table
from blocktx.compile.topology import find_topology
from blocktx.config.distill import DistillConfig
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig, with_cache_dtype
from blocktx.config.run import MeshConfig, RunConfig, TrainingConfig
from blocktx.model.build import build, init_params

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[aot]'"
)
SCRIPT = Path(__file__).parents[2] / "launch" / "compile.py"
STACK = StackConfig(layers=1, width=128, heads=2)
BLOCK = BlockConfig(
    vocab_size=512,
    context_length=64,
    compute_dtype="bfloat16",
    block_decoder=STACK,
    token_decoder=STACK,
)
VANILLA = VanillaConfig(vocab_size=512, context_length=64, compute_dtype="bfloat16", decoder=STACK)
RUN = RunConfig(model=BLOCK, training=TrainingConfig(batch_size=8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "it begins with one of v4, v5e"),
        ("v5e", "use one of v5e:1x1"),
        ("v5e:3x3", "use one of v5e:1x1, v5e:2x2"),
        ("v5p:2x2", "use one of v5p:1x1x1"),
        ("h100:9", "use one of h100:1"),
    ],
)
def test_topology_that_does_not_exist(name, message):
    with pytest.raises(ValueError, match=rf"^topology: got '{name}'; {message}"):
        find_topology(name)


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^topology: the TPU compiler is missing; pip install"):
        find_topology("v5e:2x2")
    with pytest.raises(ValueError, match=r"^topology: JAX's CUDA plugin is missing; pip install"):
        find_topology("h100:8")


def test_target_config_is_for_gpus():
    with pytest.raises(ValueError, match=r"^target_config: is for GPUs, got topology 'v5e:2x2'"):
        find_topology("v5e:2x2", "h100.txtpb")


@needs_libtpu
def test_what_does_not_divide_is_refused_before_it_is_compiled():
    four = find_topology("v5e:2x2")
    with pytest.raises(ValueError, match=r"^config\.training\.batch_size: 6 rows do not divide"):
        compile_train_step(dataclasses.replace(RUN, training=TrainingConfig(batch_size=6)), four)
    with pytest.raises(ValueError, match=r"^config\.mesh: data 3 x .* does not fit 4 devices"):
        compile_train_step(dataclasses.replace(RUN, mesh=MeshConfig(data=3)), four)
    with pytest.raises(ValueError, match=r"^batch_size: 6 rows do not go to 4 chips; use 8"):
        compile_decoding(RUN, four, "decode", batch_size=6, context=64)
    for context in (0, 30, 128):
        with pytest.raises(ValueError, match=rf"^context: got {context} tokens; use whole blocks"):
            compile_decoding(RUN, four, "decode", batch_size=8, context=context)


@needs_libtpu
@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds "
        "available HBM (15.75G). HLO module: jit_train_step.",
        "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity",
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_helps(monkeypatch, said):
    def compile_nothing(self, **options):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_nothing)
    with pytest.raises(DoesNotFit) as info:
        compile_train_step(RUN, find_topology("v5e:1x1"))
    message = str(info.value)
    assert "a chip of v5e:1x1 needs 20.00 GiB (parameters 0.00" in message
    assert "and has 15.75, 4.25 too few" in message
    assert "--config.training.microbatches=2, or --config.model.remat=full" in message


def test_other_errors_of_a_compiler_are_left_alone(monkeypatch):
    report = _Compilation.report
    lowered = types.SimpleNamespace(compile=lambda **options: (_ for _ in ()).throw(ERROR))
    compilation = types.SimpleNamespace(
        topology=types.SimpleNamespace(platform="tpu", chip=None), _out_of_memory=lambda error: None
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        report(compilation, lowered, 1.0, 1.0)


ERROR = jax.errors.JaxRuntimeError("something else")


@needs_libtpu
@pytest.mark.slow
def test_training_step_of_four_chips():
    report = compile_train_step(RUN, find_topology("v5e:2x2"))
    assert report.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
    assert report.products == cost.train_step(RUN).flops / 4
    assert report.flops == pytest.approx(report.products, rel=0.2)  # products may be made twice
    assert report.parameters == cost.count_params(BLOCK).total
    # Of parameters and their two moments every chip has a quarter, of vectors all.
    assert report.memory["optimizer"] == pytest.approx(2 * report.memory["parameters"], rel=0.01)
    assert report.memory["parameters"] == pytest.approx(report.parameters, rel=0.05)
    assert report.cycle_seconds > report.roofline
    assert {"parameters", "gradients"} < {c.carries for c in report.collectives}
    for found in report.collectives:
        assert found.carries != "activations" or "stack" not in found.where
    assert "binds" in table([report])
    assert json.loads(json.dumps(report.to_dict()))["binds"] == report.binds


@needs_libtpu
@pytest.mark.slow
def test_llama_type_layers_take_at_most_a_tenth_more_cycles_than_neox():
    """Of the same sizes, and equal products: SwiGLU has 3 matrices of 2/3 of the width for 2."""

    def seconds(stack: StackConfig) -> float:
        model = dataclasses.replace(
            BLOCK,
            vocab_size=2048,
            context_length=256,
            block_decoder=stack,
            token_decoder=stack,
        )
        run = RunConfig(model=model, training=TrainingConfig(batch_size=16))
        return compile_train_step(run, find_topology("v5e:1x1")).cycle_seconds

    neox = seconds(StackConfig.neox(1, 384, 6))
    assert seconds(StackConfig.llama(1, 384, 6, mlp_width=1024)) < 1.1 * neox


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("model", [BLOCK, VANILLA], ids=["block", "vanilla"])
def test_decoding_on_four_chips_tells_them_nothing(model):
    run = dataclasses.replace(RUN, model=model)
    for program in ("prefill", "decode", "serve"):
        report = compile_decoding(run, find_topology("v5e:2x2"), program, batch_size=8, context=64)
        assert report.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
        assert report.collectives == []
        assert report.ratio > 0
        if program != "prefill":  # a prefill needs less: nobody wants the last layer's outputs
            assert report.flops == pytest.approx(report.products, rel=0.2)
        else:
            assert 0 < report.flops < report.products


@needs_libtpu
@pytest.mark.slow
def test_int8_weights_halve_what_decoding_reads():
    """With few rows, most other bytes than those of logits are of weights."""
    run = dataclasses.replace(RUN, model=dataclasses.replace(BLOCK, vocab_size=8192))
    plain, int8 = (
        compile_decoding(
            run, find_topology("v5e:1x1"), "decode", batch_size=2, context=64, quantized=kind
        )
        for kind in (None, "int8")
    )
    table_bytes = 2 * 8192 * (128 + 32)  # of both look-ups, which stay in bfloat16
    weights = plain.memory["parameters"] - table_bytes
    assert int8.memory["parameters"] - table_bytes < 0.6 * weights
    logits_bytes = 4 * BLOCK.block_length * 2 * 8192  # read once for the greedy tokens of a block
    assert int8.bytes_accessed - logits_bytes < 0.65 * (plain.bytes_accessed - logits_bytes)
    assert int8.counted_bytes == plain.counted_bytes


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("program", ["decode", "serve"])
def test_cache_in_int8_is_read_as_integers(program):
    """In a cache that does not fit on the chip: no copy of it takes away what it saves."""
    stack = StackConfig(layers=2, width=768, heads=12)
    model = dataclasses.replace(BLOCK, context_length=2176, block_decoder=stack)
    plain, int8 = (
        compile_decoding(
            dataclasses.replace(RUN, model=with_cache_dtype(model, kind)),
            find_topology("v5e:1x1"),
            program,
            batch_size=64,
            context=model.context_length,
        )
        for kind in (None, "int8")
    )
    saved = plain.memory["cache"] - int8.memory["cache"]
    assert saved > 0.45 * plain.memory["cache"]
    assert plain.counted_bytes - int8.counted_bytes == saved
    if program == "decode":
        assert plain.bytes_accessed - int8.bytes_accessed > 0.9 * saved
        assert int8.cycle_seconds < plain.cycle_seconds
    else:  # each row writes at a slot of its own: a scatter took twice as long as in bfloat16
        assert int8.bytes_accessed < plain.bytes_accessed
        assert int8.cycle_seconds < 1.1 * plain.cycle_seconds


@needs_libtpu
@pytest.mark.slow
def test_script_needs_nothing_of_the_environment(tmp_path):
    out = tmp_path / "report.json"
    config = tmp_path / "config.py"
    config.write_text(
        "from blocktx.config import RunConfig, TrainingConfig, to_config_dict\n"
        "from blocktx.config.model import BlockConfig, StackConfig\n"
        "STACK = StackConfig(1, 128, 2)\n"
        "MODEL = BlockConfig(vocab_size=512, context_length=64, block_decoder=STACK, "
        "token_decoder=STACK)\n"
        "def get_config():\n"
        "    return to_config_dict(RunConfig(model=MODEL))\n"
    )
    flags = ["--topology=v5e:1x1", "--program=decode", "--batch_size=4", "--against=vanilla"]
    done = subprocess.run(
        [sys.executable, SCRIPT, f"--config={config}", *flags, f"--json={out}"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SCRIPT.parents[1]), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "times as many tokens/s" in done.stdout
    block, vanilla = json.loads(out.read_text())
    assert (block["model"], vanilla["model"]) == ("block", "vanilla")


@needs_libtpu
@pytest.mark.slow
def test_the_teacher_of_distillation_is_counted(tmp_path):
    """At the student's context, which is shorter than the teacher's own."""
    params = init_params(build(VANILLA), jax.random.key(0))
    longer = dataclasses.replace(VANILLA, context_length=4 * VANILLA.context_length)
    save_params(tmp_path / "teacher", RunConfig(model=longer), params)
    distill = DistillConfig(teacher=str(tmp_path / "teacher"))
    topology = find_topology("v5e:2x2")
    plain, distilled = (
        compile_train_step(run, topology)
        for run in (RUN, dataclasses.replace(RUN, distill=distill))
    )
    total = cost.count_params(VANILLA).total
    assert distilled.memory["teacher"] == pytest.approx(2 * total / 4, rel=0.05)  # bf16, fsdp 4
    assert plain.memory["teacher"] == 0
    more = cost.forward(VANILLA, RUN.training.batch_size).flops / 4
    assert distilled.products == pytest.approx(plain.products + more)
    assert distilled.flops > plain.flops + 0.9 * more
    assert "teacher" in table([distilled])
    assert "teacher" not in table([plain])
