"""How fast does a model decode?

candidates.py  models to measure
machine.py     measured peaks of the machine
measure.py     measured throughput, latency and memory
report.py      tables and plots
"""

from blocktx.benchmark.candidates import Candidate, equal_vanilla, random_model, with_room
from blocktx.benchmark.machine import measure_machine
from blocktx.benchmark.measure import (
    SETTINGS,
    counted_bytes,
    decode_throughput,
    largest_batch,
    measure,
    running_measure,
    runs_per_round,
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
