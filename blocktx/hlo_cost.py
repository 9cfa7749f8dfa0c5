"""What a compiled program does on one chip: FLOPs, memory traffic, collectives, estimated cycles.

XLA's own `cost_analysis` counts a loop's body once; here it counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from blocktx.chips import Chip
from blocktx.hlo import Computation, Executed, Operation, Program, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async-start", "async-update", "async-done", "after-all", "partition-id"),
    *("copy-done", "slice-done", "opt-barrier", "iota"),
    *(name + "-done" for name in COLLECTIVES),
}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind that carry the same to the same part of the model."""

    kind: str
    carries: str  # parameters, gradients, activations or scalars
    where: str  # modules, from the outermost: token_decoder/stack/layers/mlp/up
    phase: str  # forward, backward or update
    count: int  # on a chip, in one run of the program
    bytes: int  # results of all of them on a chip (of a reduce-scatter: operands)
    sent: int  # bytes that a chip sends in a ring or a direct exchange


def flops(program: Program, within: Computation | None = None) -> int:
    """FLOPs of all matrix products."""
    return sum(
        done.times * _flops(program, done.computation, done.operation)
        for done in program.executed(within)
    )


def hbm_bytes(program: Program, within: Computation | None = None) -> int:
    """Bytes read from and written to memory outside the chip, if no cache helps."""
    return sum(done.times * _traffic(program, done) for done in program.executed(within))


def cycles(program: Program, chip: Chip, within: Computation | None = None) -> int | None:
    """The TPU compiler's estimate, which knows nothing of waiting for memory or other chips.

    Of its kernels (Pallas) it has none: they count by the greater of their FLOPs and bytes. None if
    the text has no estimate at all, as for other chips.
    """
    total, found = 0.0, False
    for done in program.executed(within):
        estimate = done.operation.number("estimated_cycles")
        found |= estimate is not None
        if estimate is None and _is_kernel(done.operation):
            work = chip.seconds(
                flops=_flops(program, done.computation, done.operation),
                hbm=_traffic(program, done),
            )
            estimate = max(work.values()) * chip.clock
        total += done.times * (estimate or 0)
    return round(total) if found else None


def collectives(program: Program, within: Computation | None = None) -> list[Collective]:
    """All collectives, those of every branch of a conditional among them, greatest first."""
    sizes = _parameter_sizes(program)
    found: dict[tuple[str, ...], list[int]] = {}
    for done in program.executed(within, all_branches=True):
        for operation, shapes, operands in _collectives(program, done):
            group = _group_size(operation, shapes, operands)
            key, count = _describe(program, done, operation, shapes, sizes, group), done.times
            moved = sum(s.bytes for s in (operands if key[0] == "reduce-scatter" else shapes))
            sent = moved * (group - 1) / group * (2 if key[0] == "all-reduce" else 1)
            if key[0] == "collective-permute":
                sent = moved
            entry = found.setdefault(key, [0, 0, 0])
            for i, value in enumerate((1, moved, round(sent))):
                entry[i] += count * value
    result = [Collective(*key, *values) for key, values in found.items()]
    return sorted(result, key=lambda collective: -collective.sent)


def _collectives(program: Program, done: Executed):
    """Collectives that an executed operation starts: each with its results and operands.

    A TPU wraps some in fusions: reduce-scatters as an all-reduce of which each chip keeps a slice,
    and those that run beside other work in a fusion that starts them; copies in the fusions that
    run beside them and wait for them are the same ones again.
    """
    operation = done.operation
    if operation.opcode.removesuffix("-start") in COLLECTIVES:
        operands = [s for shapes in done.computation.operand_shapes(operation) for s in shapes]
        yield operation, _results(operation, operands), operands
    if operation.opcode != "fusion" or operation.called.startswith("async_collective_fusion"):
        return
    called = program.computations[operation.called]
    inner = list(called.operations.values())
    if any(op.attribute("custom_call_target") == "AsyncCollectiveDone" for op in inner):
        return
    for op in inner:
        if op.opcode not in COLLECTIVES:
            continue
        operands = [s for shapes in called.operand_shapes(op) for s in shapes]
        if op.opcode == "all-reduce" and "all-reduce-scatter" in called.name:
            kept = dataclasses.replace(op, opcode="reduce-scatter")
            yield kept, operation.shapes, operands
        else:
            yield op, op.shapes, operands


def _results(operation: Operation, operands: list[Shape]) -> tuple[Shape, ...]:
    if not operation.opcode.endswith("-start"):
        return operation.shapes
    # A start hands on what is on its way: operands, results, and flags.
    arrays = [shape for shape in operation.shapes if shape.dims]
    return tuple(arrays[len(operands) :] or arrays)


def _describe(
    program: Program,
    done: Executed,
    operation: Operation,
    shapes: Iterable[Shape],
    sizes: set[int],
    group: int,
) -> tuple[str, str, str, str]:
    kind = operation.opcode.removesuffix("-start")
    path = operation.op_name or done.operation.op_name or _users_name(done)
    phase = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "update"
    # A matrix product that is cut up hands parts of a weight, or of its gradient, round in a ring.
    summed = kind in ("all-reduce", "reduce-scatter", "collective-permute") and all(
        {s.size, s.size // group} & sizes for s in shapes if s.size > 1
    )
    if all(shape.size == 1 for shape in shapes):
        carries = "scalars"
    elif all(
        program.depends_on_parameters_alone(done.computation, name)
        for name in done.operation.operands
    ):
        carries = "parameters"
    else:
        carries = "gradients" if phase == "backward" and summed else "activations"
    return kind, carries, _modules(path), phase


def _users_name(done: Executed) -> str:
    """The origin of what uses a result, which may have none of its own."""
    waiting, seen = [done.operation.name], set()
    while waiting:
        name = waiting.pop(0)
        for op in done.computation.operations.values():
            if name in op.operands and op.name not in seen:
                if op.op_name:
                    return op.op_name
                seen.add(op.name)
                waiting.append(op.name)
    return ""


def _modules(op_name: str) -> str:
    """`jit(f)/while/body/vmap(token_decoder)/stack/dot_general` -> `token_decoder/stack`."""
    inner = re.sub(r"\b(vmap|remat|checkpoint|rematted_computation)\(", "(", op_name)
    inner = re.sub(r"(jit|jvp|transpose)\((?:[^()]|\([^()]*\))*\)", "", inner)
    parts = [part.strip("()") for part in inner.split("/")[:-1]]
    skipped = {"", "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation"}
    return "/".join(part for part in parts if part not in skipped and "." not in part)


def _parameter_sizes(program: Program) -> set[int]:
    """Sizes of a chip's part of the parameters, and of one layer of those that are stacked.

    A gradient is summed as large as that, or in all parts at once.
    """
    sizes = set()
    for operation in program.entry.operations.values():
        if operation.opcode == "parameter" and re.search(r"(^|\.)params\b", operation.op_name):
            shape = operation.shapes[0]
            sizes.add(shape.size)
            if "['layers']" in operation.op_name:
                sizes.add(shape.size // shape.dims[0])
    return sizes


def _group_size(operation: Operation, shapes: Iterable[Shape], operands: Iterable[Shape]) -> int:
    """How many chips take part in one of the groups of a collective."""
    text = operation.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])  # part of an axis: 'a':(2)4
        return math.prod(int(size or sizes[name]) for name, size in parts)
    biggest, smallest = sorted((sum(s.size for s in shapes), sum(s.size for s in operands)))[::-1]
    return max(2, biggest // max(smallest, 1))


def _is_kernel(operation: Operation) -> bool:
    return operation.attribute("custom_call_target") == "tpu_custom_call"


def _flops(program: Program, computation: Computation, operation: Operation) -> int:
    if operation.opcode == "fusion":
        called = program.computations[operation.called]
        return sum(_flops(program, called, op) for op in called.operations.values())
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
        if _is_kernel(operation):
            return operation.number("flops") or 0
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


def _traffic(program: Program, done: Executed) -> int:
    operation, computation = done.operation, done.computation
    if operation.opcode in _FREE or operation.attribute("custom_call_target") in _FREE_CALLS:
        return 0
    if _is_kernel(operation) and operation.number("bytes_accessed"):
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
            _results(operation, [s for o in operands for s in o])
        )
    if operation.opcode in ("dynamic-slice", "slice", "gather"):
        return operation.shapes[0].bytes * (_off_chip(operands[0]) > 0) + _off_chip(
            operation.shapes
        )
    if operation.opcode == "dynamic-update-slice":
        return operands[1][0].bytes * (_off_chip(operands[0]) > 0) + _off_chip(operands[1])
    return sum(map(_off_chip, operands)) + _off_chip(operation.shapes)


def _off_chip(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.off_chip)


def _fusion_traffic(program: Program, fusion: Operation, operands: list) -> int:
    called = program.computations[fusion.called]
    users: dict[str, list[Operation]] = {}
    for op in called.operations.values():
        for name in op.operands:
            users.setdefault(name, []).append(op)

    def read(name: str) -> int:
        """Bytes of a value that are read: where only slices of it are used, theirs."""
        total, full = 0, called.operations[name].shapes[0].bytes
        for user in users.get(name, []):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.shapes[0].bytes
            elif user.opcode == "bitcast":
                total += read(user.name)
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
