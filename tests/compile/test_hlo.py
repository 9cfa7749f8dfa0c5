"""Reading compiled programs: as written by the TPU compiler, and by this machine's."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from blocktx import cost
from blocktx.chips import CHIPS
from blocktx.compile.hlo import Program
from blocktx.compile.hlo_collectives import collectives
from blocktx.compile.hlo_cost import cycles, flops, hbm_bytes
from blocktx.compile.hlo_kernels import kernels
from blocktx.compile.hlo_operations import Shape
from blocktx.config.run import RunConfig, TrainingConfig
from blocktx.model.build import build
from blocktx.train.step import create_state, train_step
from tests.test_cost import MODELS, batch_of

# Put together of lines for v5e (libtpu 0.0.52), names shortened and what nobody reads left out: a
# loop of 3 over stacked weights, which gathers one, multiplies, and sums a gradient in parts.
TPU = (pathlib.Path(__file__).parent / "program_v5e.hlo").read_text()


@pytest.fixture(scope="module")
def program():
    return Program(TPU)


def test_flops_and_cycles_count_loops_and_kernels(program):
    kernel = 197_000_000_000
    assert flops(program) == 3 * 2 * 16 * 128 * 128 + kernel
    # The kernel's FLOPs take a v5e 1 ms, which is 1.5 million cycles.
    assert cycles(program, CHIPS["v5e"]) == 3 * (100 + 1000) + 1_500_000


def test_text_of_a_kernel_may_have_any_lines(program):
    """Splash attention's has some that begin with a bracket, as the end of a computation does."""
    told = 'frontend_attributes={kernel_metadata={\n"told":"{}"\n}}, metadata={op_name="jit(f)/p'
    text = TPU.replace('metadata={op_name="jit(f)/p', told)
    assert text.count("\n}}, metadata=") == 1
    assert flops(Program(text)) == flops(program)
    assert cycles(Program(text), CHIPS["v5e"]) == cycles(program, CHIPS["v5e"])


@pytest.mark.parametrize(("name", "products"), [("fwd_segmented", 2), ("dkv_segmented", 5)])
def test_splash_attention_is_counted(name, products):
    """It makes no estimate of itself: 3 heads of size 16, 128 queries, 256 keys."""
    shapes = ("s8[1,1,1]", "bf16[3,128,16]", "bf16[3,256,16]", "bf16[3,256,16]")
    parameters = [f"  %p.{i} = {s} parameter({i})" for i, s in enumerate(shapes)]
    text = "\n".join(
        [
            "ENTRY %main (a: s8[1,1,1]) -> bf16[3,128,16] {",
            *parameters,
            f"  ROOT %splash_mha_{name}.1 = bf16[3,128,16] custom-call(%p.0, %p.1, %p.2, %p.3), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
            '"xprof_metadata":"{}"',
            '}}, backend_config={"custom_call_config":{}}',
            "}",
        ]
    )
    assert flops(Program(text)) == 2 * products * 3 * 128 * 256 * 16


def test_memory_traffic_is_of_what_is_used_and_outside_the_chip(program):
    # Only a slice of the stacked weights is read, and what is kept on the chip costs nothing.
    body = program.computations["body"]
    weights, hidden, gradient = 128 * 64 * 4, 16 * 128 * 4, 128 * 128 * 4
    scattered = gradient + 128 * 64 * 4
    index = 4
    expected = weights + index + 2 * hidden + scattered + 2 * hidden
    assert hbm_bytes(program, body) == expected


def test_collectives_are_told_apart(program):
    found = {(c.kind, c.carries): c for c in collectives(program)}
    assert set(found) == {
        ("all-gather", "parameters"),
        ("all-gather", "activations"),
        ("reduce-scatter", "gradients"),
    }
    weight = found["all-gather", "parameters"]
    assert weight.where == "token_decoder/stack/layers/mlp/up"
    assert (weight.phase, weight.count, weight.bytes) == ("forward", 3, 3 * 128 * 128 * 2)
    assert weight.sent == weight.bytes // 2  # of two chips each has half already
    gradient = found["reduce-scatter", "gradients"]
    assert (gradient.phase, gradient.count, gradient.bytes) == ("backward", 3, 3 * 128 * 128 * 4)
    assert found["all-gather", "activations"].where == "token_decoder/stack/layers/mlp/down"


def test_loop_whose_end_is_not_known_counts_once():
    text = TPU.replace("direction=LT", "direction=NE")
    program = Program(text)
    ((loop, body),) = program.open_loops()
    assert (loop.name, body.name) == ("while.1", "body")
    assert flops(program, body) == 2 * 16 * 128 * 128


def test_batched_product_of_a_tpu_is_counted_as_one():
    # 2 x 511 x 8 products of 5 x 32 and 32 x 5, as the compiler writes them: a convolution.
    text = """
ENTRY %main (a: bf16[2,511,5,8,32], b: bf16[2,511,5,8,32]) -> f32[2,511,8,5,5] {
  %a = bf16[2,511,5,8,32]{4,2,3,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,511,5,8,32]{4,2,3,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution-base-dilated.49 = f32[2,511,8,5,5]{3,4,2,1,0:T(8,128)} convolution(%a, %b), window={size=2x511x8 stride=1x510x7 lhs_dilate=2x511x8}, dim_labels=01b2f_01o2i->012bf
}
"""  # noqa: E501
    assert flops(Program(text)) == 2 * 2 * 511 * 8 * 5 * 5 * 32


def test_product_in_a_library_of_a_gpu_is_counted():
    text = """
ENTRY %main (a: bf16[512,2048], b: bf16[2048,8192]) -> (bf16[512,8192], s8[4194304]) {
  %a = bf16[512,2048]{1,0} parameter(0)
  %b = bf16[2048,8192]{1,0} parameter(1)
  ROOT %gemm = (bf16[512,8192]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"beta":0}}
}
"""  # noqa: E501
    assert flops(Program(text)) == 2 * 512 * 2048 * 8192


def test_bytes_of_shapes():
    sizes = {"pred": 6, "bf16": 12, "s32": 24, "f8e4m3fn": 6, "s4": 3, "c64": 48, "token": 0}
    for dtype, size in sizes.items():
        assert Shape(dtype, (2, 3)).bytes == size
    assert Shape("f32", ()).bytes == 4


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match=r"^text: there is no ENTRY computation"):
        Program("func.func public @main()")


@pytest.mark.parametrize("name", ["block", "vanilla"])
def test_program_of_this_machine_has_the_counted_products(name):
    # Layers are scanned inside of scanned microbatches.
    run = RunConfig(model=MODELS[name], training=TrainingConfig(batch_size=4, microbatches=2))
    net = build(run.model)
    tokens, mask = batch_of(run.model, 4)
    state = jax.eval_shape(functools.partial(create_state, run, net))
    lowered = train_step.lower(state, {"tokens": tokens, "mask": mask}, run, net)
    program = Program(lowered.compile().as_text())
    assert flops(program) == cost.train_step(run).flops
    assert not program.open_loops()
    assert not collectives(program)


def test_open_loop_of_this_machine_is_found():
    def f(n, x):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    text = jax.jit(f).lower(jnp.int32(3), jnp.ones((4, 4))).compile().as_text()
    program = Program(text)
    ((_, body),) = program.open_loops()
    assert flops(program, body) == 2 * 4**3


GPU = """HloModule gpu

%fused_softmax (p.0: f32[8,128]) -> f32[8] {
  %p.0 = f32[8,128]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum = f32[8]{0} reduce(%p.0, %zero), dimensions={1}, to_apply=%add
}

%fused_add (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  ROOT %add.1 = f32[8,128]{1,0} add(%p.1, %p.1)
}

%fused_cast (p.2: f32[8,128]) -> bf16[128,8] {
  %p.2 = f32[8,128]{1,0} parameter(0)
  %turned = f32[128,8]{1,0} transpose(%p.2), dimensions={1,0}
  ROOT %cast = bf16[128,8]{1,0} convert(%turned)
}

ENTRY %main (x: f32[8,128], q: bf16[2,16,4,8], k: bf16[2,16,4,8]) -> f32[8] {
  %x = f32[8,128]{1,0} parameter(0)
  %q = bf16[2,16,4,8]{3,2,1,0} parameter(1)
  %k = bf16[2,16,4,8]{3,2,1,0} parameter(2)
  %attention = (bf16[2,4,16,8]{3,1,2,0}, f32[2,4,16]{2,1,0}, u8[4096]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "16", "16"], "tuple_shapes": []}}}
  %gradient = (bf16[2,4,16,8]{3,1,2,0}, bf16[2,4,16,8]{3,1,2,0}, bf16[2,4,16,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "16", "16"], "tuple_shapes": []}}}
  %added = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  %moved = bf16[128,8]{1,0} fusion(%added), kind=kLoop, calls=%fused_cast
  ROOT %summed = f32[8]{0} fusion(%added), kind=kInput, calls=%fused_softmax
}
"""  # noqa: E501


def test_kernels_of_a_gpu_by_kind():
    found = {each.kind: each for each in kernels(Program(GPU))}
    array, scores = 2 * (2 * 16 * 4 * 8), 4 * (2 * 4 * 16)
    assert found["attention"].count == 2
    # The workspace, of which a library leaves most alone, does not count.
    assert found["attention"].bytes == (3 + 1) * array + scores + (3 + 3) * array
    assert found["elementwise"].bytes == 2 * 4 * 8 * 128
    assert found["copies"].bytes == (4 + 2) * 8 * 128
    assert found["reductions"].bytes == 4 * (8 * 128 + 8)
    assert sum(each.bytes for each in found.values()) == hbm_bytes(Program(GPU))


def test_attention_of_cudnn_has_products():
    scores = 2 * 4 * 16 * 16
    assert flops(Program(GPU)) == 2 * (2 + 5) * scores * 8
