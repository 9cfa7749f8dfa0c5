"""Cached top-k probabilities of a teacher, one file per training step.

    folder/manifest.json       what the batches and the teacher depend on, and k
    folder/00000012.npz        of step 12: int tokens and float16 log_probs, [B, N-1, K, k], and
                               uint32 checksums [B] of the rows that they belong to

The batch of a step follows from the configuration, so that files are found by step. A file is
written whole or not at all, and writing goes on where it was interrupted.
"""

import io
import json
import zlib
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from blocktx.checkpoint import load_config
from blocktx.config import RunConfig, UserError, to_dict
from blocktx.data import Corpus, prepare, training_batches
from blocktx.files import absolute, run_folder, write_atomic
from blocktx.parallel import HostRows, batch_sharding, create_mesh
from blocktx.progress_bar import ProgressBar
from blocktx.train.distill import top_log_probs
from blocktx.train.step import check_run
from blocktx.train.teacher import load_teacher

_MANIFEST = "manifest.json"

# Fields of a model that choose how it is computed.
_EXECUTION = ("param_dtype", "compute_dtype", "scan_layers", "remat", "platform", "formulations")


class TeacherCache:
    """The cache in `config.distill.cache`, for reading."""

    def __init__(self, config: RunConfig, corpus: Corpus):
        """Check that the cache is of this run's batches and teacher, and holds all its steps.

        Raises:
          UserError: there is no cache, or it is of another run; all fields that differ are listed.
        """
        self._folder = absolute(config.distill.cache)
        manifest = _read_manifest(self._folder)
        _require_same(self._folder, manifest["key"], _key(config, corpus))
        steps = config.training.steps
        missing = [step for step in range(steps) if not _file(self._folder, step).exists()]
        if missing:
            raise UserError(
                f"config.distill.cache: {self._folder} lacks {len(missing)} of {steps} steps, "
                f"step {missing[0]} first; launch/cache_teacher.py goes on with it"
            )

    def read(
        self, step: int, batch: dict[str, np.ndarray], rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return `teacher_tokens` and `teacher_log_probs` of `batch`, which are `rows` of a step.

        Raises:
          UserError: the file cannot be read, or is of another batch.
        """
        path = _file(self._folder, step)
        again = "delete it and run launch/cache_teacher.py again"
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:
                found = {name: file[name][rows] for name in ("tokens", "log_probs", "checksums")}
        except Exception as error:  # damage surfaces as whatever the layer that meets it raises
            raise UserError(f"{path}: cannot be read ({error}); {again}") from error
        if not np.array_equal(found["checksums"], _checksums(batch)):
            raise UserError(f"{path}: is of another batch than step {step} of this run; {again}")
        return {
            "teacher_tokens": found["tokens"].astype(np.int32),
            "teacher_log_probs": found["log_probs"],
        }


def abstract_cache(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what a cache adds to the batch of a step as ShapeDtypeStructs; empty without one."""
    if not config.distill.cache:
        return {}
    manifest = _read_manifest(absolute(config.distill.cache))
    model, rows = config.model, config.training.batch_size
    shape = (rows, model.blocks - 1, model.block_length, manifest["top_k"])
    dtypes = {"teacher_tokens": np.int32, "teacher_log_probs": np.float16}
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }


def write_cache(config: RunConfig, folder: epath.PathLike, top_k: int) -> epath.Path:
    """Write the teacher's `top_k` probabilities for all steps of a run; return the folder.

    Steps that are there are kept. Stages and losses of `config` do not matter, `temperature` does.

    Raises:
      UserError: the run has no teacher, `top_k` is out of range, or the folder is of another run.
      ValueError, FileNotFoundError: as `blocktx.train.train`.
    """
    model = config.model
    if not config.distill.teacher:
        raise UserError("config.distill.teacher: is empty; name the model to cache")
    if not 1 <= top_k <= model.vocab_size:
        raise UserError(f"top_k: got {top_k}, must be in 1..{model.vocab_size} (vocab_size)")
    mesh = create_mesh(config.mesh)
    check_run(config, mesh)
    folder = run_folder(folder)
    corpus = prepare(config.data, model.vocab_size)
    key = _key(config, corpus) | {"top_k": top_k}
    if (folder / _MANIFEST).exists():
        manifest = _read_manifest(folder)
        _require_same(folder, manifest["key"] | {"top_k": manifest["top_k"]}, key)
    teacher = load_teacher(config, corpus.tokenizer, mesh)
    host_rows = HostRows(config.training.batch_size, mesh)
    batches = training_batches(corpus.train, config, corpus.tokenizer.pad_id)
    del key["top_k"]
    write_atomic(folder / _MANIFEST, json.dumps({"key": key, "top_k": top_k}, indent=2) + "\n")
    temperature = config.distill.temperature
    token_dtype = np.uint16 if model.vocab_size <= 2**16 else np.int32
    top = jax.jit(top_log_probs, static_argnums=(3, 4))
    with jax.set_mesh(mesh):
        for step in ProgressBar(range(config.training.steps), unit=" steps"):
            batch, path = next(batches), _file(folder, step)
            if not path.exists():
                placed = host_rows.place(batch)
                found = top(teacher, placed["tokens"], placed["mask"], top_k, temperature)
                _write(path, batch, *map(np.asarray, found), token_dtype)
    return folder


def _write(
    path: epath.Path,
    batch: dict[str, np.ndarray],
    tokens: np.ndarray,
    log_probs: np.ndarray,
    token_dtype: type,
) -> None:
    data = io.BytesIO()
    np.savez(
        data,
        tokens=tokens.astype(token_dtype),
        log_probs=log_probs.astype(np.float16),
        checksums=_checksums(batch),
    )
    write_atomic(path, data.getvalue())


def _checksums(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the checksum of each row's real tokens and of where they are."""
    marked = np.where(batch["mask"], batch["tokens"], -1).astype(np.int32)
    return np.array([zlib.crc32(row.tobytes()) for row in marked], np.uint32)


def _file(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"{step:08}.npz"


def _key(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Return what the batches and the teacher's probabilities depend on, by field."""
    _, step, teacher = load_config(config.distill.teacher)
    described = to_dict(teacher)["model"]
    for execution in _EXECUTION:
        del described[execution]
    return {
        "config.model.context_length": config.model.context_length,
        "config.model.block_length": config.model.block_length,
        "config.data": corpus.digest,
        "config.data.random_padding": config.data.random_padding,
        "config.training.batch_size": config.training.batch_size,
        "config.seed": config.seed,
        "config.distill.temperature": config.distill.temperature,
        "the teacher's step": step,
        "the teacher's model": described,
    }


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.exists():
        raise UserError(
            f"config.distill.cache: {folder} holds no {_MANIFEST}; write it with "
            "launch/cache_teacher.py"
        )
    try:
        manifest = json.loads(path.read_text())
        manifest["key"], manifest["top_k"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); choose another folder") from error
    return manifest


def _require_same(folder: epath.Path, cached: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    problems = [
        f"  {name}: cached {cached.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(cached.keys() | now.keys())
        if cached.get(name) != now.get(name)
    ]
    if problems:
        lines = [f"{folder}: the cache is of another run:", *problems]
        raise UserError("\n".join(lines))
