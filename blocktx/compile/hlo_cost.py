"""Work of a compiled program on one chip: FLOPs, memory traffic, estimated cycles.

XLA's own `cost_analysis` counts a loop's body once; here it counts as often as it runs.
"""

import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from blocktx.chips import Chip
from blocktx.compile.hlo import Program
from blocktx.compile.hlo_collectives import COLLECTIVES, results
from blocktx.compile.hlo_operations import Computation, Executed, Operation, Shape

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async-start", "async-update", "async-done", "after-all", "partition-id"),
    *("copy-done", "slice-done", "opt-barrier", "iota"),
    *(name + "-done" for name in COLLECTIVES),
}


# Of queries by keys, with its heads' size inside or outside; the second makes all gradients.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
_WORKSPACE = ("s8", "u8")  # of a library, most of which it leaves alone
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


def flops(program: Program, within: Computation | None = None) -> int:
    """FLOPs of all matrix products."""
    return sum(
        done.times * product_flops(program, done.computation, done.operation)
        for done in program.executed(within)
    )


def hbm_bytes(program: Program, within: Computation | None = None) -> int:
    """Return the bytes read from and written to HBM, without caches."""
    return sum(done.times * bytes_moved(program, done) for done in program.executed(within))


def cycles(program: Program, chip: Chip, within: Computation | None = None) -> int | None:
    """Return the TPU compiler's estimate, which excludes waits for memory and other chips.

    Of its kernels (Pallas) it has none: they count by the greater of their FLOPs and bytes. None if
    the text has no estimate at all, as for other chips.
    """
    total, found = 0.0, False
    for done in program.executed(within):
        estimate = done.operation.number("estimated_cycles")
        found |= estimate is not None
        if estimate is None and is_kernel(done.operation):
            work = chip.seconds(
                flops=product_flops(program, done.computation, done.operation),
                hbm=bytes_moved(program, done),
            )
            estimate = max(work.values()) * chip.clock
        total += done.times * (estimate or 0)
    return round(total) if found else None


def is_kernel(operation: Operation) -> bool:
    """Return whether an operation is a kernel of Pallas."""
    target = operation.attribute("custom_call_target") or ""
    return target == "tpu_custom_call" or "triton" in target or "mosaic" in target


def is_attention(operation: Operation) -> bool:
    """Return whether an operation is flash attention: cuDNN's, or JAX's splash attention."""
    target = operation.attribute("custom_call_target") or ""
    splash = operation.name.startswith("splash_") and is_kernel(operation)
    return splash or target.startswith("__cudnn$fmha")


def product_flops(program: Program, computation: Computation, operation: Operation) -> int:
    """Return the FLOPs of the matrix products in an operation."""
    if operation.opcode == "fusion":
        called = program.computations[operation.called]
        return sum(product_flops(program, called, op) for op in called.operations.values())
    if operation.opcode == "dot":
        left = computation.operations[operation.operands[0]].shapes[0]
        contracted = operation.attribute("lhs_contracting_dims")
        inner = math.prod(left.dims[int(i)] for i in contracted.split(",") if i)
        return 2 * operation.shapes[0].size * inner
    if operation.opcode == "convolution":
        return _convolution_flops(computation, operation)
    if operation.opcode == "custom-call":
        target = operation.attribute("custom_call_target") or ""
        if target.startswith("__cublas"):
            left = computation.operations[operation.operands[0]].shapes[0]
            dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', operation.attributes)
            inner = math.prod(left.dims[int(i)] for i in re.findall(r"\d+", dims[1]))
            return 2 * operation.shapes[0].size * inner
        if target.startswith("__cudnn$fmha"):
            return _cudnn_flops(computation, operation)
        if is_kernel(operation):
            return operation.number("flops") or _splash_flops(computation, operation)
    return 0


def _cudnn_flops(computation: Computation, operation: Operation) -> int:
    """Return the FLOPs of cuDNN's attention; masked products count too.

    Forward there are two products, of scores and of weighted values; backward five, as the scores
    are made again.
    """
    scores = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', operation.attributes
    )
    size = math.prod(int(dim) for dim in re.findall(r"\d+", scores[1]))
    channels = computation.operations[operation.operands[0]].shapes[0].dims[-1]
    backward = operation.attribute("custom_call_target").endswith("Backward")
    return 2 * (5 if backward else 2) * size * channels


def _splash_flops(computation: Computation, operation: Operation) -> int:
    """JAX's splash attention, which makes no estimate of itself; masked products count too."""
    for name, products in _SPLASH_PRODUCTS.items():
        if operation.name.startswith(name):
            shapes = [computation.operations[name].shapes[0] for name in operation.operands]
            queries, keys = [shape for shape in shapes if shape.dtype in ("bf16", "f32")][:2]
            return 2 * products * queries.size * keys.dims[-2]
    return 0


def _convolution_flops(computation: Computation, operation: Operation) -> int:
    """A TPU's matrix products: batch dimensions are spatial ones of which few positions meet."""
    left, right = (computation.operations[name].shapes[0].dims for name in operation.operands[:2])
    out = operation.shapes[0].dims
    left_names, right_names, out_names = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", operation.attributes
    ).groups()
    window = dict(re.findall(r"(\w+)=(\S+)", operation.attribute("window") or ""))
    products = out[out_names.index("b")] * out[out_names.index("f")] * right[right_names.index("i")]
    for i, name in enumerate(sorted(set(out_names) - {"b", "f"})):

        def setting(key: str, default: str, i: int = i) -> str:
            return window[key].split("x")[i] if key in window else default

        products *= _meetings(
            left[left_names.index(name)],
            int(setting("size", "1")),
            out[out_names.index(name)],
            int(setting("stride", "1")),
            int(setting("pad", "0_0").split("_")[0]),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    return 2 * products


@functools.lru_cache
def _meetings(
    size: int, window: int, out: int, stride: int, pad: int, base_dilation: int, dilation: int
) -> int:
    """Pairs of window and output positions along one dimension that meet an input element."""
    position = np.arange(out)[:, None] * stride + np.arange(window) * dilation - pad
    inside = (position >= 0) & (position <= (size - 1) * base_dilation)
    return int((inside & (position % base_dilation == 0)).sum())


def bytes_moved(program: Program, done: Executed) -> int:
    """Return the bytes that an operation reads from and writes to HBM, without caches."""
    operation, computation = done.operation, done.computation
    if operation.opcode in _FREE or operation.attribute("custom_call_target") in _FREE_CALLS:
        return 0
    if is_kernel(operation) and operation.number("bytes_accessed"):
        return operation.number("bytes_accessed")
    operands = computation.operand_shapes(operation)
    if operation.opcode == "fusion":
        return _fusion_traffic(program, operation, operands)
    if operation.opcode == "copy-start":
        return _off_chip(operation.shapes[:2])
    if operation.opcode == "slice-start":
        part = operation.shapes[len(operands)]
        return part.bytes * (_off_chip(operands[0]) > 0) + _off_chip([part])
    if operation.opcode.endswith("-start"):
        return sum(map(_off_chip, operands)) + _off_chip(
            results(operation, [s for o in operands for s in o])
        )
    if operation.opcode in ("dynamic-slice", "slice", "gather"):
        return operation.shapes[0].bytes * (_off_chip(operands[0]) > 0) + _off_chip(
            operation.shapes
        )
    if operation.opcode == "dynamic-update-slice":
        return operands[1][0].bytes * (_off_chip(operands[0]) > 0) + _off_chip(operands[1])
    outputs = operation.shapes
    if (operation.attribute("custom_call_target") or "").startswith(("__cublas", "__cudnn")):
        outputs = [shape for shape in outputs if shape.dtype not in _WORKSPACE]
    return sum(map(_off_chip, operands)) + _off_chip(outputs)


def _off_chip(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.off_chip)


def _fusion_traffic(program: Program, fusion: Operation, operands: list) -> int:
    called = program.computations[fusion.called]
    users: dict[str, list[Operation]] = {}
    for op in called.operations.values():
        for name in op.operands:
            users.setdefault(name, []).append(op)

    def read(name: str) -> int:
        """Return the bytes of a value that are read: of its slices, if only they are used."""
        total, full = 0, called.operations[name].shapes[0].bytes
        for user in users.get(name, []):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.shapes[0].bytes
            elif user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
                total += read(user.name)  # the second is another layout of what is sliced
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return full
        return min(total, full)

    def written(op: Operation) -> int:
        while op.opcode == "bitcast":
            op = called.operations[op.operands[0]]
        if op.opcode == "dynamic-update-slice":
            return called.operations[op.operands[1]].shapes[0].bytes
        return sum(shape.bytes for shape in op.shapes)

    total = 0
    for op in called.operations.values():
        if op.opcode == "parameter" and _off_chip(operands[int(op.argument)]):
            total += read(op.name) if len(op.shapes) == 1 else _off_chip(op.shapes)
    root = called.root
    results = (
        [called.operations[name] for name in root.operands] if root.opcode == "tuple" else [root]
    )
    if len(results) != len(fusion.shapes):
        return total + _off_chip(fusion.shapes)
    return total + sum(
        written(op) for op, shape in zip(results, fusion.shapes, strict=True) if shape.off_chip
    )
