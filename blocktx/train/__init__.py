"""How is a model trained?

loss.py       the loss of a training step, with auxiliary losses
distill.py    losses against a frozen teacher
teacher.py    the teacher: checks and parameters
teacher_cache.py  cached probabilities of the teacher
optimizer.py  optax optimizers and schedules
step.py       train state and the compiled training step
start.py      initial or restored train state, checks before training
run_lock.py   a lock on the run folder
agreement.py  the start of a run, and agreement of its processes
loop.py       the training loop
report.py     the last evaluation and the plot of a run
progress.py   progress line
metrics.py    metrics.jsonl and TensorBoard
loss_plot.py  plots of the loss
trace.py      profiler traces
interrupt.py  deferred stop requests: signals and preemption notices
"""

from blocktx.train.loop import train
from blocktx.train.loss import training_sums
from blocktx.train.loss_plot import plot_runs
from blocktx.train.metrics import read
from blocktx.train.step import (
    TrainState,
    abstract_batch,
    abstract_state,
    check_run,
    create_state,
    train_step,
)
from blocktx.train.teacher import abstract_teacher
from blocktx.train.teacher_cache import abstract_cache, write_cache

__all__ = [
    "TrainState",
    "abstract_batch",
    "abstract_cache",
    "abstract_state",
    "abstract_teacher",
    "check_run",
    "create_state",
    "plot_runs",
    "read",
    "train",
    "train_step",
    "training_sums",
    "write_cache",
]
