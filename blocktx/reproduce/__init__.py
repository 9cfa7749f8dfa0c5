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
