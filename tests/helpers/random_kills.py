"""Kill runs at random moments, resume them to their end, compare them with one never killed.

    python -m tests.helpers.random_kills --kills=30 --terms=20 --folder=/tmp/kills

Each process is forked from this one, which has imported everything and used no device. Moments are
spread over the whole life of a process, and more densely over the time after its first step.
"""

import argparse
import collections
import contextlib
import dataclasses
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

import jax

from blocktx.checkpoint import load_params
from blocktx.checkpoint.digest import measure
from blocktx.train.loop import train
from blocktx.train.metrics import read
from tests.helpers.tiny_run import run_config, write_corpus

PATIENCE = 3000  # seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--terms", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    args.folder.mkdir(parents=True)
    data = write_corpus(args.folder)
    rng = random.Random(args.seed)
    left = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms
    rng.shuffle(left)

    run = Run(args.folder / "never", data)  # compiles, so its times are not those of others
    run.start()
    assert run.end() == 0, run.log.read_text()
    wanted = run.result()
    run = Run(args.folder / "warm", data)
    run.start()
    begin = time.monotonic()
    run.wait_for_first_step()
    first = time.monotonic() - begin
    run.end()
    whole = time.monotonic() - begin
    assert run.result() == wanted
    print(f"a process takes {whole:.1f} s, {first:.1f} s to its first step", flush=True)

    counts, runs = collections.Counter(), 0
    while left:
        run, runs = Run(args.folder / f"run{runs}", data), runs + 1
        while True:
            run.start()
            if left:
                if rng.random() < 0.6:
                    run.wait_for_first_step()
                    time.sleep(rng.uniform(0, 1.1 * (whole - first)))
                else:
                    time.sleep(rng.uniform(0, whole))
                if run.signal(left[-1]):
                    counts[left.pop().name] += 1
            code = run.end()
            counts[f"code {code}"] += 1
            assert code in (0, 143, -signal.SIGKILL), f"{code}: {run.log.read_text()}"
            if code == 0:
                break
        assert run.result() == wanted, run.folder
        print(f"{runs} runs, {dict(counts)}", flush=True)
        shutil.rmtree(run.folder)
    print(f"{runs} runs are bitwise equal to one that was never killed: {dict(counts)}")


class Run:
    """A run and its process."""

    def __init__(self, folder: pathlib.Path, data):
        folder.mkdir()
        self.folder, self.log = folder, folder / "log"
        # Its own cache: tokenization is interrupted, too.
        data = dataclasses.replace(data, cache_dir=str(folder / "cache"))
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
