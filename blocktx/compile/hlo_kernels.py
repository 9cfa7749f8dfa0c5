"""Kernels of a compiled program by kind: how many run, and the bytes that they move."""

import dataclasses

from blocktx.compile.hlo import Program
from blocktx.compile.hlo_collectives import COLLECTIVES
from blocktx.compile.hlo_cost import bytes_moved, is_attention, is_kernel, product_flops
from blocktx.compile.hlo_operations import Computation, Executed

_MOVES = {  # opcodes that compute nothing
    *("parameter", "constant", "iota", "bitcast", "bitcast-convert", "copy", "copy-start"),
    *("transpose", "reshape", "broadcast", "slice", "slice-start", "dynamic-slice", "tuple"),
    *("dynamic-update-slice", "concatenate", "pad", "convert", "get-tuple-element"),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels of one kind, in one run of a program on one chip."""

    kind: str
    count: int
    bytes: int  # read and written in HBM


def kernels(program: Program, within: Computation | None = None) -> list[Kernels]:
    """Return all kinds of kernels, by their bytes.

    Kinds:
      matrix products: with the elementwise work that is fused into them.
      attention: flash attention of a library or in Pallas.
      Pallas kernels: all others.
      reductions, elementwise: fusions and single operations, with and without a sum.
      copies: what computes nothing: slices, casts, copies to another layout, writes to a cache.
      collectives: between chips.
      other: sorts, scatters, random bits and calls to a library.
    """
    found: dict[str, list[int]] = {}
    for done in program.executed(within):
        size = bytes_moved(program, done)
        if size:
            entry = found.setdefault(_kind(program, done), [0, 0])
            entry[0] += done.times
            entry[1] += done.times * size
    result = [Kernels(kind, *values) for kind, values in found.items()]
    return sorted(result, key=lambda kernels: -kernels.bytes)


def _kind(program: Program, done: Executed) -> str:
    operation = done.operation
    if operation.opcode.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    if is_attention(operation):
        return "attention"
    if is_kernel(operation):
        return "Pallas kernels"
    if product_flops(program, done.computation, operation):
        return "matrix products"
    inside = [operation]
    if operation.opcode == "fusion":
        inside = list(program.computations[operation.called].operations.values())
    opcodes = {inner.opcode for inner in inside}
    if opcodes & {"custom-call", "sort", "scatter", "rng-bit-generator", "fusion"}:
        return "other"
    if opcodes & {"reduce", "reduce-window"}:
        return "reductions"
    return "copies" if opcodes <= _MOVES else "elementwise"
