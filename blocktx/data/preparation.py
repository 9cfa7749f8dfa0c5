"""Prepare a folder: tokenize sources into shards, on several processes and hosts.

The work is cut into parts by the sources alone, so the shards do not depend on who writes them. A
restart continues with what is not finished.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Sequence

from etils import epath

from blocktx.config import UserError
from blocktx.data.folder_lock import folder_lock
from blocktx.data.manifest import MANIFEST, PLAN, Manifest
from blocktx.data.preparation_progress import PreparationProgress
from blocktx.data.preparation_workers import Job, run_workers, tokenize_part_of
from blocktx.data.sources import Part, fingerprint, list_parts
from blocktx.data.tokenize_part import (
    PartRecord,
    token_dtype,
    too_many,
)
from blocktx.data.tokenizer import Tokenizer
from blocktx.files import is_bucket, write_atomic

PART_BYTES = 256 << 20  # of input, for which there is a shard or more

_FORMAT = 1
_MAX_FILES = 10_000  # in a part


def prepare_folder(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    folder: epath.PathLike,
    *,
    text_field: str = "text",
    workers: int = 1,
    task: tuple[int, int] = (0, 1),
    part_bytes: int = PART_BYTES,
    skip_bad: int = 0,
    field: str = "--output",
) -> Manifest | None:
    """Tokenize `sources`, one after the other, into a prepared folder.

    Args:
      sources: what `blocktx.data.sources` lists, without weights.
      tokenizer: of all texts.
      folder: new, or of an earlier call that was interrupted; local or gs://.
      text_field: the field, column or feature that holds the text.
      workers: processes. With one, this process does the work, on several threads.
      task: number and count of the hosts that share the work.
      part_bytes: bytes of input for each part, and so for each shard.
      skip_bad: how many documents that cannot be read are left out, in this task.
      field: the flag or field that holds `folder`, for error messages.

    Returns:
      The manifest, or None if other tasks have work left.

    Raises:
      FileNotFoundError: a source is missing.
      UserError: a source cannot be read, more than `skip_bad` documents cannot, the folder holds
        another preparation, or another process is preparing it.
      OSError: the folder cannot be written to.
    """
    folder = epath.Path(folder)
    try:
        if not is_bucket(folder):
            for name in ("parts", "shards"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, task, field):
            parts = [p for source in sources for p in list_parts(source, part_bytes)]
            groups = _group(parts, part_bytes)
            _check_plan(folder, sources, tokenizer, text_field, part_bytes, len(groups), field)
            if (folder / MANIFEST).exists():
                return Manifest.load(folder)
            tokenizer.save(folder / "tokenizer.json")
            special = (tokenizer.end_token, tokenizer.pad_token)
            job = Job(folder, tuple(groups), text_field, *special, skip_bad)
            _tokenize(job, tokenizer, workers, task)
            return _finish(folder, sources, tokenizer, text_field, len(groups))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{field}: cannot write to {folder}: {error.strerror}; nothing half-written counts as "
            "finished: make room, and the same command continues",
        ) from error


def _tokenize(job: Job, tokenizer: Tokenizer, workers: int, task: tuple[int, int]) -> None:
    sizes = {i: sum(part.size for part in parts) for i, parts in enumerate(job.parts)}
    mine = [i for i in sizes if i % task[1] == task[0]]
    records = {i: PartRecord.load(_record_path(job.folder, i)) for i in mine}
    todo = [i for i in mine if not records[i].done]
    bad = [message for record in records.values() for message in record.bad_documents]
    bad_count = sum(record.bad_count for record in records.values())
    if bad_count > job.skip_bad:
        raise UserError(too_many(bad[-1], bad_count - 1))
    todo_sizes = {i: sizes[i] for i in todo}
    with PreparationProgress(
        todo_sizes, len(mine) - len(todo), bad_count, job.skip_bad
    ) as progress:
        count = min(workers, len(todo))
        if count > 1:
            run_workers(job, todo, count, workers, progress)
            return
        for i in todo:
            tokenize_part_of(job, i, tokenizer, functools.partial(progress.add, i))
            progress.finish(i)


def _record_path(folder: epath.Path, number: int) -> epath.Path:
    return folder / "parts" / f"{number:05d}.json"


def _group(parts: list[Part], part_bytes: int) -> list[tuple[Part, ...]]:
    """Put small parts in a row together."""
    groups, group, size = [], [], 0
    for part in parts:
        if group and (size + part.size > part_bytes or len(group) == _MAX_FILES):
            groups.append(tuple(group))
            group, size = [], 0
        group.append(part)
        size += part.size
    return [*groups, tuple(group)] if group else groups


def _check_plan(
    folder: epath.Path,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    text_field: str,
    part_bytes: int,
    parts: int,
    field: str,
) -> None:
    """Write what is being prepared, or compare it with what a call before has written."""
    files = json.dumps([fingerprint(source) for source in sources], sort_keys=True)
    plan = {
        "format": _FORMAT,
        "sources": list(sources),
        "files": hashlib.sha256(files.encode()).hexdigest(),
        "text_field": text_field,
        "tokenizer": tokenizer.fingerprint,
        "special_tokens": [tokenizer.end_token, tokenizer.pad_token],
        "part_bytes": part_bytes,
        "parts": parts,
    }
    path = folder / PLAN
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        write_atomic(path, json.dumps(plan, indent=1) + "\n")
        return
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; remove the folder") from None
    changed = [name for name in plan if before.get(name) != plan[name]]
    if changed:
        listed = "; ".join(f"{n} was {before.get(n)!r}, is {plan[n]!r}" for n in changed)
        raise UserError(
            f"{field}: {folder} holds another preparation: {listed}; use another folder, or "
            "remove this one"
        )


def _finish(
    folder: epath.Path,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    text_field: str,
    parts: int,
) -> Manifest | None:
    """Write the manifest if all parts are done, and return it."""
    records = [PartRecord.load(_record_path(folder, i)) for i in range(parts)]
    left = sum(not record.done for record in records)
    if left:
        return None
    shards = tuple(shard for record in records for shard in record.shards)
    if not shards:
        raise UserError(
            f"config.data.source: {', '.join(sources)!r} holds nothing but blank documents"
        )
    manifest = Manifest(
        dtype=token_dtype(tokenizer).name,
        tokenizer={
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
            "pad_id": tokenizer.pad_id,
        },
        shards=shards,
        sources=tuple(sources),
        text_field=text_field,
        bad_documents=tuple(m for record in records for m in record.bad_documents),
        bad_count=sum(record.bad_count for record in records),
    )
    manifest.save(folder)
    return manifest
