"""Collectives of a compiled program, and the parts of the model that they serve."""

import dataclasses
import math
import re
from collections.abc import Iterable

from blocktx.compile.hlo import Program
from blocktx.compile.hlo_operations import Computation, Executed, Operation, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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


def collectives(program: Program, within: Computation | None = None) -> list[Collective]:
    """Return all collectives, largest first, including those of every branch."""
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


def results(operation: Operation, operands: list[Shape]) -> tuple[Shape, ...]:
    """Shapes of what a collective makes; `operands` are those of what it takes."""
    if not operation.opcode.endswith("-start"):
        return operation.shapes
    # A start hands on what is on its way: operands, results, and flags.
    arrays = [shape for shape in operation.shapes if shape.dims]
    return tuple(arrays[len(operands) :] or arrays)


def _collectives(program: Program, done: Executed):
    """Collectives that an executed operation starts: each with its results and operands.

    A TPU wraps some in fusions: reduce-scatters as an all-reduce of which each chip keeps a slice,
    and those that run beside other work in a fusion that starts them; copies in the fusions that
    run beside them and wait for them are the same ones again.
    """
    operation = done.operation
    if operation.opcode.removesuffix("-start") in COLLECTIVES:
        operands = [s for shapes in done.computation.operand_shapes(operation) for s in shapes]
        yield operation, results(operation, operands), operands
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
        of_loss = not _modules(path)  # which makes its gradient in the forward pass
        carries = "gradients" if summed and (phase == "backward" or of_loss) else "activations"
    return kind, carries, _modules(path), phase


def _users_name(done: Executed) -> str:
    """Return the origin of the user of a result, which may have none of its own."""
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
    """Return the number of chips in a group of a collective."""
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
