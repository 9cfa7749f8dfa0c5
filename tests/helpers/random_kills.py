"""Kill runs at random moments, resume them to their end, compare them with one never killed.

    python -m tests.helpers.random_kills --kills=30 --terms=20 --folder=/tmp/kills

Each process is forked from this one, which has imported everything and used no device. Moments are
spread over the whole life of a process, and more densely over the time after its first step. The
same command continues after an interruption.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from blocktx.checkpoint import load_params
from blocktx.checkpoint.digest import measure
from blocktx.config.run import DataConfig
from blocktx.files import write_atomic
from blocktx.train.loop import train
from blocktx.train.metrics import read
from tests.helpers.tiny_run import run_config, write_corpus

PATIENCE = 3000  # seconds
SIGNALS = 4  # to a run, at most: runs are compared when they have ended


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3, help="number of SIGKILLs")
    parser.add_argument("--terms", type=int, default=3, help="number of SIGTERMs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="of the runs")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "progress.json"
    if not file.exists():
        write_atomic(file, json.dumps(begin(args.folder)))
    progress = json.loads(file.read_text())
    counts = collections.Counter(progress["counts"])
    left = [signal.SIGKILL] * (args.kills - counts["SIGKILL"])
    left += [signal.SIGTERM] * (args.terms - counts["SIGTERM"])
    rng = random.Random(f"{args.seed} {progress['runs']}")
    rng.shuffle(left)
    while left:
        folder = args.folder / f"run{progress['runs']}"
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(folder, args.folder / "corpus")
        interrupt(run, left, progress["seconds"], rng, counts)
        assert run.result() == progress["wanted"], run.folder
        progress |= {"runs": progress["runs"] + 1, "counts": counts}
        write_atomic(file, json.dumps(progress))
        print(f"{progress['runs']} runs, {len(left)} signals left, {dict(counts)}", flush=True)
        shutil.rmtree(folder)
    print(f"{progress['runs']} runs are bitwise equal to one that was never killed: {dict(counts)}")


def begin(folder: pathlib.Path) -> dict[str, Any]:
    """Train two runs that nothing interrupts: the first compiles, the second is measured."""
    for name in ("corpus", "never", "warm"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_corpus(folder)
    results = []
    for name in ("never", "warm"):
        run = Run(folder / name, folder / "corpus")
        start = time.monotonic()
        run.start()
        run.wait_for_first_step()
        first = time.monotonic() - start
        assert run.end() == 0, run.log.read_text()
        whole = time.monotonic() - start
        results.append(run.result())
    assert results[0] == results[1]
    print(f"a process takes {whole:.1f} s, {first:.1f} s to its first step", flush=True)
    seconds = {"whole": whole, "first": first}
    return {"runs": 0, "counts": {}, "wanted": results[0], "seconds": seconds}


def interrupt(
    run: "Run",
    left: list[signal.Signals],
    seconds: dict[str, float],
    rng: random.Random,
    counts: collections.Counter,
) -> None:
    """Start a run's process and end it by a signal of `left`, until a process ends by itself.

    `seconds` follow the load of the machine, so that moments stay within the life of a process.
    """
    sent = 0
    while True:
        start = time.monotonic()
        run.start()
        if left and sent < SIGNALS:
            if rng.random() < 0.6:
                run.wait_for_first_step()
                seconds["first"] = time.monotonic() - start
                time.sleep(rng.uniform(0, 1.1 * max(0, seconds["whole"] - seconds["first"])))
            else:
                time.sleep(rng.uniform(0, seconds["whole"]))
            if run.signal(left[-1]):
                counts[left.pop().name] += 1
                sent += 1
        code = run.end()
        counts[f"code {code}"] += 1
        assert code in (0, 143, -signal.SIGKILL), f"{code}: {run.log.read_text()}"
        if code == 0:
            seconds["whole"] = time.monotonic() - start
            return


class Run:
    """A run and its process."""

    def __init__(self, folder: pathlib.Path, corpus: pathlib.Path):
        folder.mkdir()
        self.folder, self.log = folder, folder / "log"
        # Its own cache: tokenization is interrupted, too.
        data = DataConfig(source=str(corpus), holdout_every=2, cache_dir=str(folder / "cache"))
        settings = dict(steps=12, checkpoint_every=2, evaluate_every=6)
        self.config = run_config(data, **settings)

    def start(self) -> None:
        self._fork(lambda: train(self.config, self.folder / "workdir", resume=True))

    def _fork(self, function: Callable[[], object]) -> None:
        self.log.touch()
        self._logged, self._code = self.log.stat().st_size, None
        self._process = os.fork()
        if self._process:
            return
        code = 99
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            function()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _ended(self) -> bool:
        if self._code is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait_for_first_step(self) -> None:
        end = time.monotonic() + PATIENCE
        while not self._ended() and "step=" not in self.log.read_text()[self._logged :]:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal. Return whether the process was there."""
        if self._ended():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, number)
            return True
        return False

    def end(self) -> int:
        """Wait for the process; return its exit code."""
        end = time.monotonic() + PATIENCE
        while not self._ended():
            if time.monotonic() > end:
                os.kill(self._process, signal.SIGABRT)
                raise AssertionError(f"hangs: {self.log.read_text()}")
            time.sleep(0.05)
        return self._code

    def result(self) -> list:
        """Return digests of the parameters, and what was logged but for times."""
        workdir, file = self.folder / "workdir", self.folder / "digests.json"
        assert (workdir / "loss.png").exists()
        assert not (workdir / ".lock").exists()
        self._fork(lambda: file.write_text(json.dumps(measure(load_params(workdir).params)[0])))
        assert self.end() == 0, self.log.read_text()
        kept = ("step", "train/loss", "train/grad_norm", "heldout/loss")
        lines = [{name: line[name] for name in kept if name in line} for line in read(workdir)]
        lines.sort(key=lambda line: (line["step"], "heldout/loss" in line))
        return [json.loads(file.read_text()), lines]


if __name__ == "__main__":
    main()
