"""Can the paper's findings be seen, at a given scale?

study.py        runs, measurements, statements, results
scale.py        the runs that studies vary, by scale
studies/        one file for each finding
asked.py        when a finished result is of the wanted configuration
runner.py       make what is missing
context_use.py  how much of a context a model uses
charts.py       pictures
report.py       results.json and the page
"""

from blocktx.reproduce.report import RESULTS, read_results, write_report, write_results
from blocktx.reproduce.runner import collect, read_run, read_speed, run_all
from blocktx.reproduce.scale import SCALES, Base
from blocktx.reproduce.studies import FURTHER, STUDIES
from blocktx.reproduce.study import Results, Study

__all__ = [
    "FURTHER",
    "RESULTS",
    "SCALES",
    "STUDIES",
    "Base",
    "Results",
    "Study",
    "collect",
    "read_results",
    "read_run",
    "read_speed",
    "run_all",
    "write_report",
    "write_results",
]
