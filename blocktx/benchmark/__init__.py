"""How fast does a model decode?

measure.py  measured throughput, latency and memory
machine.py  measured peaks of the machine
report.py   tables and plots
"""

from blocktx.benchmark.machine import measure_machine
from blocktx.benchmark.measure import (
    SETTINGS,
    Candidate,
    counted_bytes,
    decode_throughput,
    equal_vanilla,
    largest_batch,
    measure,
    random_model,
    running_measure,
    runs_per_round,
    with_room,
)
from blocktx.benchmark.report import plot, table, write_json

__all__ = [
    "SETTINGS",
    "Candidate",
    "counted_bytes",
    "decode_throughput",
    "equal_vanilla",
    "largest_batch",
    "measure",
    "measure_machine",
    "plot",
    "random_model",
    "running_measure",
    "runs_per_round",
    "table",
    "with_room",
    "write_json",
]
