"""How good is a model?

heldout.py         loss on held-out documents and on any text
next_logits.py     logits of long contexts, a chunk at a time
position_curve.py  loss by position in a block and by place in a context
scoring.py         log-likelihood of continuations
needle.py          needle in a haystack
compare.py         a model beside a reference, token by token
continuations.py   greedy continuations of both
compare_report.py  the table and the plot of a comparison
"""

from blocktx.evaluate.compare import comparison_rows, running_comparison
from blocktx.evaluate.compare_report import Report, plot_report
from blocktx.evaluate.continuations import running_continuations
from blocktx.evaluate.heldout import (
    Evaluation,
    evaluate,
    heldout_evaluation,
    running_text_sums,
    summary,
    text_sums,
)
from blocktx.evaluate.needle import DEPTHS, PROMPTS, needle_accuracy, plot_accuracy, running_needle
from blocktx.evaluate.next_logits import map_logits
from blocktx.evaluate.position_curve import Bin, default_bin, plot_losses, position_curve
from blocktx.evaluate.scoring import Score, iterate_scores, longest_row, score

__all__ = [
    "DEPTHS",
    "PROMPTS",
    "Bin",
    "Evaluation",
    "Report",
    "Score",
    "comparison_rows",
    "default_bin",
    "evaluate",
    "heldout_evaluation",
    "iterate_scores",
    "longest_row",
    "map_logits",
    "needle_accuracy",
    "plot_accuracy",
    "plot_losses",
    "plot_report",
    "position_curve",
    "running_comparison",
    "running_continuations",
    "running_needle",
    "running_text_sums",
    "score",
    "summary",
    "text_sums",
]
