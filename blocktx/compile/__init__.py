"""What does the compiled program cost, on which chip?

No device of that kind is needed.

    aot.py              ahead-of-time compilation of training and decoding
    abstract.py         arguments of the decoding programs
    topology.py         descriptions of absent devices
    advice.py           flags that make a program fit
    hlo.py              optimized HLO, parsed
    hlo_operations.py   its operations
    hlo_collectives.py  its collectives
    hlo_cost.py         its FLOPs, bytes and estimated cycles
    hlo_kernels.py      its kernels by kind
    report.py           tables and JSON
"""

from blocktx.compile.aot import compile_decoding, compile_train_step
from blocktx.compile.report import Report, table
from blocktx.compile.topology import Topology, find_topology

__all__ = [
    "Report",
    "Topology",
    "compile_decoding",
    "compile_train_step",
    "find_topology",
    "table",
]
