"""Processes that tokenize the parts of a preparation."""

import dataclasses
import functools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from blocktx.config import UserError
from blocktx.data.preparation_progress import PreparationProgress
from blocktx.data.sources import Part
from blocktx.data.tokenize_part import Progress, tokenize_part
from blocktx.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Job:
    """A preparation, as its processes need it; see `prepare_folder`."""

    folder: epath.Path
    parts: tuple[tuple[Part, ...], ...]
    text_field: str
    end_token: str
    pad_token: str
    skip_bad: int


def tokenize_part_of(
    job: Job, number: int, tokenizer: Tokenizer, report: Callable[[Progress], None]
) -> None:
    """Tokenize part `number` of a job."""
    tokenize_part(
        job.folder, number, job.parts[number], job.text_field, tokenizer, report, job.skip_bad
    )


def run_workers(
    job: Job,
    numbers: Sequence[int],
    count: int,
    threads: int,
    progress: PreparationProgress,
) -> None:
    """Tokenize parts on `count` processes with `threads` threads together."""
    context = multiprocessing.get_context("spawn")  # threads of tokenizers do not survive a fork
    tasks, results = context.Queue(), context.Queue()
    for number in [*numbers, *[None] * count]:
        tasks.put(number)
    processes = [
        context.Process(
            target=_work, args=(job, tasks, results, os.getpid(), threads // count), daemon=True
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            process.start()
        left = len(numbers)
        while left:
            try:
                number, result = results.get(timeout=1)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode]
                if dead:
                    raise RuntimeError(
                        f"a worker ended with {dead[0]} (-9: killed, perhaps for lack of memory); "
                        "the same command continues"
                    ) from None
                continue
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, Progress):
                progress.add(number, result)
            else:
                progress.finish(number)
                left -= 1
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


def _work(job: Job, tasks: Any, results: Any, parent: int, threads: int) -> None:
    """Run in a process of its own: tokenize parts until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    try:
        tokenizer = Tokenizer.load(job.folder / "tokenizer.json", job.end_token, job.pad_token)
        while (number := tasks.get()) is not None:
            report = functools.partial(_report, results, number)
            tokenize_part_of(job, number, tokenizer, report)
            results.put((number, None))
    except BaseException as error:
        results.put((-1, _picklable(error)))


def _report(results: Any, number: int, counts: Progress) -> None:
    results.put((number, counts))


def _picklable(error: BaseException) -> BaseException:
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    kinds = (UserError, ValueError, FileNotFoundError, PermissionError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind(str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which may be killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
