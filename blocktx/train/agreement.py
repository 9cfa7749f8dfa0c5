"""The start of a run: one lock, and the same configuration and files in all processes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from blocktx.checkpoint import find_all
from blocktx.config import RunConfig, UserError, to_dict, user_errors
from blocktx.data import Corpus
from blocktx.files import run_folder
from blocktx.train.run_lock import RunLock
from blocktx.train.start import require_no_run


@contextlib.contextmanager
def opened_run(
    config: RunConfig, workdir: str | os.PathLike[str], resume: bool, step: int | None
) -> Iterator[tuple[epath.Path, RunLock | None]]:
    """Yield the run folder, locked, after all processes have agreed on how to start."""
    with contextlib.ExitStack() as stack:
        folder, lock, saved, problem = epath.Path(workdir), None, [], None
        try:
            with user_errors():
                folder = run_folder(workdir)
            if jax.process_index() == 0:
                lock = stack.enter_context(RunLock(folder))
            if not resume:
                require_no_run(folder)
            saved = list(find_all(folder))
        except Exception as error:
            problem = error
        facts = {
            "config": json.dumps(to_dict(config), sort_keys=True),
            "workdir": folder,
            "--resume and --step": (resume, step),
            "checkpoints": saved,
        }
        require_agreement(facts, problem)
        yield folder, lock


def require_agreement(facts: Mapping[str, object], problem: Exception | None = None) -> None:
    """Raise a UserError in all processes if one of them failed or knows other facts.

    All processes call this before any other collective, in which they would wait for each other.

    Args:
      facts: values by name, the same names in all processes.
      problem: the error of this process, which is raised again after the others know of it.
    """
    if jax.process_count() == 1:
        if problem is not None:
            raise problem
        return
    values = {"": "failed" if problem else "", **facts}
    mine = np.stack([_hash(value) for value in values.values()])
    all_PxFxB = multihost_utils.process_allgather(mine).reshape(-1, *mine.shape)
    if problem is not None:
        raise problem
    failed = np.flatnonzero((all_PxFxB[:, 0] != _hash("")).any(-1))
    if failed.size:
        raise UserError(f"process {_listed(failed)} of this run failed; its own message says why")
    for row, (name, value) in enumerate(values.items()):
        others = np.flatnonzero((all_PxFxB[:, row] != all_PxFxB[0, row]).any(-1))
        if others.size:
            here = f" (here it is {value})" if len(str(value)) < 200 else ""
            raise UserError(
                f"{name}: that of process {_listed(others)} differs from that of process 0; give "
                f"all hosts the same command and a workdir that all see{here}"
            )


def of_first_process(value: bool) -> bool:
    """Return the value that process 0 passes. All processes call this."""
    if jax.process_count() == 1:
        return value
    return bool(np.ravel(multihost_utils.process_allgather(np.int32(value)))[0])


def require_same_corpus_everywhere(corpus: Corpus) -> None:
    """Raise a UserError in all processes if they have read different documents."""
    mine = np.frombuffer(bytes.fromhex(corpus.digest), np.uint8)
    digests = multihost_utils.process_allgather(mine).reshape(jax.process_count(), -1)
    others = np.flatnonzero((digests != digests[0]).any(1))
    if others.size:
        raise UserError(
            "config.data: the processes have read different documents: those of process "
            f"{_listed(others)} are not those of process 0; give all hosts the same files and "
            "tokenizer"
        )


def _listed(processes: np.ndarray) -> str:
    shown = ", ".join(map(str, processes[:10]))
    return shown + (f" and {len(processes) - 10} more" if len(processes) > 10 else "")


def _hash(value: object) -> np.ndarray:
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
