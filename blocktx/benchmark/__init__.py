"""How fast does a model decode?

candidates.py  models to measure
machine.py     measured peaks of the machine
measure.py     measured throughput, latency and memory
report.py      tables and plots
accelerator.py         checks of one accelerator: correctness and speed
accelerator_formulations.py  formulations compared with the plain ones
accelerator_report.py  their page
"""

from blocktx.benchmark.accelerator import Sizes, check_accelerator, passed
from blocktx.benchmark.accelerator_report import page
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
    "Sizes",
    "check_accelerator",
    "counted_bytes",
    "decode_throughput",
    "equal_vanilla",
    "largest_batch",
    "measure",
    "measure_machine",
    "page",
    "passed",
    "plot",
    "random_model",
    "running_measure",
    "runs_per_round",
    "table",
    "with_room",
    "write_json",
]
