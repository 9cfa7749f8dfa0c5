"""Report of a compiled program: figures of one chip, as a table and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from blocktx.compile.hlo_collectives import Collective
from blocktx.compile.hlo_kernels import Kernels

GIB = 2**30
_SHOWN = 12  # collectives in the table; the JSON has all


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program, in bytes, FLOPs and seconds of one chip.

    Attributes:
      program: train, prefill or decode. All figures but memory are for one run of the first two,
        and for one block of the last: a block step and its K token steps.
      model: block or vanilla.
      topology, mesh, batch_size, parameters: what was compiled; the last two over all chips.
      tokens: that a run or iteration reads or writes, over all chips.
      memory: bytes, the arguments by kind, then what the compiler adds: `padding` of their layouts,
        `temporaries`, `outputs` that do not take the place of an argument, and `code`.
      hbm_bytes: what the chip has.
      products: FLOPs of the model's matrix products (`blocktx.cost`).
      flops: those of the matrix products in the program, some of which may be made twice.
      bytes_accessed: in memory outside the chip, if no cache helps.
      counted_bytes: that decoding must move: weights and cache once (`blocktx.cost`). None for
        training.
      kernels: their number and bytes, by kind.
      collectives: communication between chips.
      seconds: the least time of `products`, `bytes_accessed` and the collectives' bytes.
      roofline: seconds that no program for this model can go below: of `products` when training,
        else the greater of those of products and of weights and cache (`blocktx.cost`).
      cycle_seconds: the TPU compiler's estimated cycles as seconds; waiting for memory and other
        chips is not in them. None on other chips.
      compile_seconds: on this machine.
    """

    program: str
    model: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    tokens: int
    memory: dict[str, int]
    hbm_bytes: int
    products: float
    flops: int
    bytes_accessed: int
    counted_bytes: float | None
    kernels: list[Kernels]
    collectives: list[Collective]
    seconds: dict[str, float]
    roofline: float
    cycle_seconds: float | None
    compile_seconds: float

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def binds(self) -> str:
        """The resource that needs the most time."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def ratio(self) -> float | None:
        """Estimated cycles in units of the roofline."""
        return None if self.cycle_seconds is None else self.cycle_seconds / self.roofline

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {
            "memory_total": self.memory_total,
            "binds": self.binds,
            "step_seconds": self.seconds[self.binds],
            "cycles_over_roofline": self.ratio,
        }
        return dataclasses.asdict(self) | derived


def table(reports: Sequence[Report]) -> str:
    """Lines for people; several reports are of the same program for other models, side by side."""
    return "\n".join(_lines(reports[0]) + [_comparison(report, reports) for report in reports[1:]])


def _lines(report: Report) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    used, has = report.memory_total / GIB, report.hbm_bytes / GIB
    seconds = report.seconds
    lines = [
        f"program      {report.program}, {report.model} model of {report.parameters:,} parameters",
        f"topology     {report.topology}, mesh {mesh}, batch size {report.batch_size}",
        f"compilation  {report.compile_seconds:.0f} s",
        "",
        f"memory of a chip  {used:.2f} of {has:.2f} GiB",
        *(f"  {kind:<12}  {size / GIB:>8.3f}" for kind, size in report.memory.items() if size),
        "",
        f"{_of_what(report)} on a chip",
        f"  matrix products  {report.products / 1e12:>10.3f} TFLOP, compiled "
        f"{report.flops / 1e12:.3f}   {_time(seconds['matrix unit'])}",
        f"  memory accesses  {report.bytes_accessed / 1e9:>10.3f} GB"
        f"{_counted(report):<23}{_time(seconds['HBM'])}",
        f"  to other chips   {sum(c.sent for c in report.collectives) / 1e9:>10.3f} GB"
        f"                       {_time(seconds['interconnect'])}",
        f"  the {report.binds} binds: {_time(seconds[report.binds])}, "
        f"{report.tokens / seconds[report.binds]:,.0f} tokens/s on all chips at best",
    ]
    if report.ratio is not None:
        lines += ["", _figure(report)]
    lines += ["", "kernels             count        GB  share of the memory accesses"]
    for found in report.kernels:
        share = found.bytes / report.bytes_accessed
        lines.append(
            f"  {found.kind:<16} {found.count:>7} {found.bytes / 1e9:>9.3f}  {share:>5.1%}"
        )
    if report.collectives:
        lines += ["", "collectives    count        MB  carry"]
    for found in report.collectives[:_SHOWN]:
        lines.append(
            f"  {found.kind:<18} {found.count:>6} {found.bytes / 1e6:>9.1f}  {found.carries} "
            f"({found.phase}, {found.where or 'all of the model'})"
        )
    hidden = report.collectives[_SHOWN:]
    if hidden:
        size = sum(found.bytes for found in hidden)
        lines.append(f"  {'others':<18} {sum(f.count for f in hidden):>6} {size / 1e6:>9.1f}")
    return lines


def _counted(report: Report) -> str:
    if report.counted_bytes is None:
        return ""
    return f", {report.bytes_accessed / report.counted_bytes:.2f} times counted"


def _of_what(report: Report) -> str:
    return (
        "a block step and its token steps" if report.program in ("decode", "serve") else "one run"
    )


def _figure(report: Report) -> str:
    against = (
        "of the matrix products" if report.program == "train" else "of FLOPs, weights and cache"
    )
    return (
        f"estimated by the compiler {_time(report.cycle_seconds)}: {report.ratio:.2f} times the "
        f"roofline {against}, {_time(report.roofline)}"
    )


def _comparison(other: Report, reports: Sequence[Report]) -> str:
    first = reports[0]
    text = f"\n{other.model} ({other.parameters:,} parameters): {_of_what(other)}"
    if other.ratio is None:
        figure = f"{_time(other.seconds[other.binds])}, by the {other.binds}{_counted(other)}"
        per_token = [r.seconds[r.binds] / r.tokens for r in (other, first)]
    else:
        figure = _figure(other)
        per_token = [r.cycle_seconds / r.tokens for r in (other, first)]
    return (
        f"{text} {figure}\nby these estimates the {first.model} model makes "
        f"{per_token[0] / per_token[1]:.1f} times as many tokens/s"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"
