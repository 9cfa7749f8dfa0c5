"""Operations of a compiled program, parsed from the lines of its text."""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other types end their letters with their bits
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(([^)]*)\)")
_HOST_MEMORY = 5


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's: a tuple is several."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0  # on a TPU: 0 is HBM, 5 the host's; all others are on the chip

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.search(r"\d+", self.dtype)[0])  # bf16, s32, f8e4m3fn, c64
        return -(-self.size * bits // 8)

    @property
    def off_chip(self) -> bool:
        return self.memory in (0, _HOST_MEMORY)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]  # names
    argument: str  # what stands in the brackets
    attributes: str  # all behind the brackets
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(parse_shape(match) for match in _SHAPE.finditer(self.type))

    def attribute(self, name: str) -> str | None:
        """Return the value of `name=value`: a word, a number, or the contents of braces."""
        match = re.search(
            rf'(?:^|[\s,{{]){name}=(?:\{{([^{{}}]*)\}}|"([^"]*)"|%?([\w.\-:>]+))', self.attributes
        )
        return (
            next((group for group in match.groups() if group is not None), None) if match else None
        )

    def number(self, name: str) -> int | None:
        """Return a number of the backend config: `"name":"5"`, `"name":5` or `{"n":"5"}`."""
        match = re.search(rf'"{name}":(?:\{{"n":)?"?(\d+)', self.attributes)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """Return the origin of the operation: JAX's name stack, or a parameter's argument."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    @property
    def is_whole_number(self) -> bool:
        shapes = self.shapes
        return len(shapes) == 1 and shapes[0].size == 1 and shapes[0].dtype[0] in "su"

    @property
    def called(self) -> str | None:
        """Return the computation of a fusion, call or asynchronous start."""
        return self.attribute("calls") or self.attribute("to_apply")


class Computation:
    """Operations by name, in the order in which they are scheduled."""

    def __init__(self, name: str):
        self.name = name
        self.operations: dict[str, Operation] = {}

    @property
    def root(self) -> Operation:
        return next(op for op in self.operations.values() if op.is_root)

    def operand_shapes(self, operation: Operation) -> list[tuple[Shape, ...]]:
        return [self.operations[name].shapes for name in operation.operands]


@dataclasses.dataclass(frozen=True)
class Executed:
    """An operation, where it stands, and how often it runs."""

    operation: Operation
    computation: Computation
    times: int


def parse_shape(match: re.Match) -> Shape:
    dims = tuple(int(d.lstrip("<=")) for d in match[2].split(",") if d)
    memory = re.search(r"S\((\d+)\)", match[3] or "")
    return Shape(match[1], dims, int(memory[1]) if memory else 0)


def parse_operation(name: str, rest: str, is_root: bool) -> Operation:
    end = _end_of_brackets(rest) if rest.startswith("(") else rest.index(" ")
    match = _OPCODE.match(rest, end)
    argument = match[2]
    operands = tuple(_NAME.findall(argument))
    return Operation(name, match[1], rest[:end], operands, argument, rest[match.end() :], is_root)


def _end_of_brackets(text: str) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"text: brackets do not close in {text[:80]!r}")
