"""How good is a model?

heldout.py         loss on held-out documents and on any text
position_curve.py  loss by position in a context
scoring.py         log-likelihood of continuations
needle.py          needle in a haystack
"""

from blocktx.evaluate.heldout import Evaluation, heldout_evaluation, summary, text_sums
from blocktx.evaluate.needle import DEPTHS, PROMPTS, needle_accuracy, plot_accuracy
from blocktx.evaluate.position_curve import Bin, plot_curve, position_curve
from blocktx.evaluate.scoring import longest_row, score

__all__ = [
    "DEPTHS",
    "PROMPTS",
    "Bin",
    "Evaluation",
    "heldout_evaluation",
    "longest_row",
    "needle_accuracy",
    "plot_accuracy",
    "plot_curve",
    "position_curve",
    "score",
    "summary",
    "text_sums",
]
