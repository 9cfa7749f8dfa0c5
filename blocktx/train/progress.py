"""Progress of a run: loss, speed, hardware utilisation, goodput."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from blocktx import cost
from blocktx.chips import find_chip
from blocktx.config import RunConfig
from blocktx.train.metrics import MetricsWriter


class Progress:
    """Reads each step's metrics while the device computes the next step, and reports them.

    On a terminal it is a bar on stderr, elsewhere lines on stdout. Every `log_every` steps the
    metrics are also written. Only process 0 reports.

    Besides the metrics of `train_step` it measures, since the last line:
      step_seconds, tokens_per_second.
      input_fraction: share of the time in which the device waited for data.
      mfu: model FLOPs per second (`blocktx.cost`, without recomputation) over the peak, on known
        chips (`blocktx.chips`).
      peak_memory_bytes: on devices that report it.
    Since the run began, including pauses between restarts:
      goodput: share of the time spent in steps, not in startup, compilation, saves or evaluation.

    Attributes:
      stop: whether a process was asked to stop, according to the last metrics read.
    """

    def __init__(self, writer: MetricsWriter, config: RunConfig, start: int):
        self._writer, self._training, self._start = writer, config.training, start
        self.stop = False
        self._is_primary = jax.process_index() == 0
        hidden = None if self._is_primary else True  # None: hidden without a terminal
        self._bar = tqdm(total=self._training.steps, initial=start, unit=" steps", disable=hidden)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since: float | None = None  # start of the measured interval
        self._until, self._tokens, self._steps, self._waited, self._flops = 0.0, 0, 0, 0.0, 0
        self._began, self._productive = writer.began, writer.productive
        chip = find_chip(jax.devices()[0].device_kind)
        self._peak = chip.flops * jax.device_count() if chip else None
        self._bag_steps = config.loss.bag_steps
        self._step_flops = [cost.train_step(config, bag).flops for bag in (False, True)]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Time the block that prepares the next batch."""
        begin = time.perf_counter()
        yield
        # Only count input time during which the device was idle.
        if self._since is not None and self._pending[1]["loss"].is_ready():
            self._waited += time.perf_counter() - begin

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keep the metrics of `train_step`, and read those of the step before.

        Raises:
          FloatingPointError: loss or gradient of the step before are not finite.
        """
        pending, self._pending = self._pending, (step, metrics)
        if pending is not None:
            self._read(*pending)

    def flush(self) -> None:
        """Read all metrics, as `add`. The time until the next step is not measured."""
        if self._pending is not None:
            # A step is timed when the next one has been dispatched. Here is no next one.
            self._read(*self._pending, timed=False)
        self._pending = None
        self._reset(None)

    def _reset(self, since: float | None) -> None:
        self._since, self._tokens, self._steps, self._waited, self._flops = since, 0, 0, 0.0, 0

    def _read(self, step: int, metrics: dict[str, jax.Array], timed: bool = True) -> None:
        # Reading blocks until the step is complete.
        values = {name: value.item() for name, value in metrics.items()}
        tokens = values.pop("tokens")
        self.stop = values.pop("stop", False)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"step {step}: the loss is {values['loss']}, the gradient's norm "
                f"{values['grad_norm']}"
            )
        shown = f"loss={values['loss']:.3f}"
        if timed:
            before, self._until = self._until, time.perf_counter()
            if self._since is None:  # this step compiled, or began before an evaluation or a save
                self._since = self._until
            else:
                self._tokens += tokens
                self._steps += 1
                self._flops += self._step_flops[step <= self._bag_steps]
                self._productive += self._until - before
        if self._steps:
            measured = self._measured()
            values |= measured
            shown += f" tokens/s={measured['tokens_per_second']:,.0f}"
            if "mfu" in measured:
                shown += f" mfu={measured['mfu']:.1%}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        ends = (self._start + 1, self._training.steps)
        if step in ends or step % self._training.log_every == 0:
            self._writer.write(step, {f"train/{name}": value for name, value in values.items()})
            self._reset(self._until if timed else None)
            if self._is_primary and self._bar.disable:
                print(f"step={step} {shown}", flush=True)

    def _measured(self) -> dict[str, float]:
        seconds = self._until - self._since
        measured = {
            "step_seconds": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "input_fraction": min(self._waited / seconds, 1.0),
            "productive_seconds": self._productive,
            "goodput": self._productive / max(time.time() - self._began, self._productive),
        }
        if self._peak is not None:
            measured["mfu"] = self._flops / self._peak / seconds
        memory = jax.local_devices()[0].memory_stats()  # none on a CPU
        if memory and "peak_bytes_in_use" in memory:
            measured["peak_memory_bytes"] = memory["peak_bytes_in_use"]
        return measured
