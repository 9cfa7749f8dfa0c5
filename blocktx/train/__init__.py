"""How is a model trained?

loss.py       the loss of a training step, with auxiliary losses
optimizer.py  optax optimizers and schedules
step.py       train state and the compiled training step
start.py      initial or restored train state, checks before training
loop.py       the training loop
progress.py   progress line
metrics.py    metrics.jsonl and TensorBoard
loss_plot.py  plots of the loss
trace.py      profiler traces
interrupt.py  deferred stop requests: signals and preemption notices
"""

from blocktx.train.loop import train
from blocktx.train.loss_plot import plot_runs
from blocktx.train.metrics import read
from blocktx.train.step import TrainState, abstract_batch, abstract_state, check_run, train_step

__all__ = [
    "TrainState",
    "abstract_batch",
    "abstract_state",
    "check_run",
    "plot_runs",
    "read",
    "train",
    "train_step",
]
