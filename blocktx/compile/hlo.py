"""Reads the text of a compiled program: its operations, how often each runs, and what they are.

The text is `compiled.as_text()`: optimised HLO, of any backend. Nothing here knows JAX.
"""

import re
from collections.abc import Iterator

from blocktx.compile.hlo_operations import Computation, Executed, Operation, parse_operation

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")


class Program:
    """A compiled program.

    Raises:
      ValueError: the text is not that of one.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry: Computation | None = None
        self._loops: dict[str, tuple[Operation, Computation]] = {}  # by their bodies
        self._calls: dict[str, tuple[Operation, Computation]] = {}  # by what they call
        current = None
        for line in _whole_lines(text):
            if current is not None and (match := _OPERATION.match(line)):
                operation = parse_operation(
                    match[1], line[match.end() :], "ROOT " in line[: match.end()]
                )
                current.operations[operation.name] = operation
            elif match := _HEADER.match(line):
                current = self.computations[match[2]] = Computation(match[2])
                if match[1]:
                    self.entry = current
            elif line == "}":
                current = None
        if self.entry is None:
            raise ValueError("text: there is no ENTRY computation in it; pass compiled.as_text()")
        for computation in self.computations.values():
            for operation in computation.operations.values():
                if operation.opcode == "while":
                    self._loops[operation.attribute("body")] = (operation, computation)
                elif operation.opcode in ("call", "async-start"):
                    self._calls[operation.called] = (operation, computation)

    def executed(
        self, computation: Computation | None = None, *, all_branches: bool = False
    ) -> Iterator[Executed]:
        """Yield what runs in a computation (None: the program), loops and calls included.

        The inside of a fusion is not entered. A loop whose number of iterations is decided while it
        runs counts once. Of a conditional, the first branch runs, which is that of a false
        condition, or with `all_branches` each.
        """
        return self._executed(computation or self.entry, 1, all_branches)

    def _executed(self, computation: Computation, times: int, all_branches: bool):
        for operation in computation.operations.values():
            yield Executed(operation, computation, times)
            inner: list[str] = []
            repeats = 1
            if operation.opcode == "while":
                inner, repeats = [operation.attribute("body")], self.iterations(operation) or 1
            elif operation.opcode == "conditional":
                branches = operation.attribute("branch_computations")
                inner = (
                    _NAME.findall(branches)
                    if branches
                    else [
                        operation.attribute("false_computation"),
                        operation.attribute("true_computation"),
                    ]
                )
                inner = inner if all_branches else inner[:1]
            elif operation.opcode in ("call", "async-start"):
                inner = [operation.called]
            for name in inner:
                if name in self.computations:
                    yield from self._executed(
                        self.computations[name], times * repeats, all_branches
                    )

    def iterations(self, loop: Operation) -> int | None:
        """Return the iterations of a `while`; None if they are not static.

        Some backends say so. Otherwise it is what the condition compares the counter with, which
        begins at 0 as all of `jax.lax.scan` do.
        """
        known = loop.number("known_trip_count")
        if known is not None:
            return known
        condition = self.computations[loop.attribute("condition")]
        test, bounds = (
            condition.root,
            [
                int(op.argument)
                for op in condition.operations.values()
                if op.opcode == "constant"
                and op.shapes[0].dtype[0] in "su"
                and not op.shapes[0].dims
            ],
        )
        if test.opcode == "fusion":
            test = self.computations[test.called].root
        if test.opcode == "compare" and test.attribute("direction") == "LT" and len(bounds) == 1:
            return bounds[0]
        return None

    def open_loops(self) -> list[tuple[Operation, Computation]]:
        """Loops of unknown length, outermost first, each with its body."""
        return [
            (done.operation, self.computations[done.operation.attribute("body")])
            for done in self.executed()
            if done.operation.opcode == "while" and self.iterations(done.operation) is None
        ]

    def depends_on_parameters_alone(self, computation: Computation, name: str) -> bool:
        """Return whether a value depends only on arguments called `params`, and constants.

        That tells the gathering of a weight from that of an activation.
        """
        waiting, seen, found = [(computation, name, None)], set(), False
        while waiting:
            value = waiting.pop()
            computation, name, index = value
            if (computation.name, name, index) in seen:
                continue
            seen.add((computation.name, name, index))
            operation = computation.operations[name]
            if operation.is_whole_number:
                continue
            if operation.opcode == "parameter" and computation is self.entry:
                if not re.search(r"(^|\.)params\b", operation.op_name):
                    return False
                found = True
            elif operation.opcode == "parameter" and (
                computation.name not in self._loops and computation.name not in self._calls
            ):
                return False
            else:
                waiting.extend(self._made_of(*value))
        return found

    def _made_of(self, computation: Computation, name: str, index: int | None):
        """Yield the values that a value, or a tuple's element `index`, is computed from."""
        operation = computation.operations[name]
        operands = operation.operands
        if operation.opcode == "get-tuple-element":
            yield computation, operands[0], int(operation.attribute("index"))
        elif operation.opcode == "parameter" and computation.name in self._calls:
            call, outside = self._calls[computation.name]
            yield outside, call.operands[int(operation.argument)], index
        elif operation.opcode == "parameter":  # what went into a loop, or comes of an iteration
            loop, outside = self._loops[computation.name]
            yield outside, loop.operands[0], index
            yield computation, computation.root.name, index
        elif operation.opcode == "while":
            body = self.computations[operation.attribute("body")]
            yield computation, operands[0], index
            yield body, body.root.name, index
        else:
            if operation.opcode == "tuple" and index is not None:
                operands = (operands[index],)
            elif operation.opcode == "fusion":
                operands = self._used_by_fusion(operation, index)
            yield from ((computation, operand, None) for operand in operands)

    def _used_by_fusion(self, fusion: Operation, index: int | None) -> Iterator[str]:
        inside = self.computations[fusion.called].operations
        root = self.computations[fusion.called].root
        element = root.opcode == "tuple" and index is not None
        waiting, seen = [root.operands[index] if element else root.name], set()
        while waiting:
            operation = inside[waiting.pop()]
            if operation.opcode == "parameter":
                yield fusion.operands[int(operation.argument)]
            waiting.extend(name for name in operation.operands if name not in seen)
            seen.update(operation.operands)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines with those that continue them: what a kernel says of itself may have line breaks.

    An operation is indented, its continuation is not; the end of a computation stands alone.
    """
    whole = ""
    for line in text.splitlines():
        if whole[:1].isspace() and line and not line[0].isspace() and line != "}":
            whole += line
        else:
            yield whole
            whole = line
    yield whole
