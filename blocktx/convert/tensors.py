"""Reads and writes folders of safetensors with a config.json, as Hugging Face lays them out."""

import dataclasses
import json
import os
import re
import shutil
import textwrap
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json")


def raise_all(path: Any, problems: Iterable[str]) -> None:
    """Raises one ValueError that lists `problems`, if there are any."""
    lines = list(problems)
    if lines:
        raise ValueError("\n".join([f"{path}: cannot be converted:", *(f"  {p}" for p in lines)]))


def check_foreign(what: str, prefixes: tuple[str, ...], names: Collection[str]) -> list[str]:
    """One problem if none of `names` has one of the `prefixes`."""
    if not names:
        return [f"not {what}: no tensors"]
    if any(name.startswith(prefixes) for name in names):
        return []
    first = sorted(names)[:3]
    more = f", ... {len(names)} in all" if len(names) > len(first) else ""
    return [f"not {what} (tensors {', '.join(first)}{more})"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors has it, such as F32


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint consists of; the tensors themselves are read one by one."""

    path: Path  # the folder or file
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None  # config.json
    lost: frozenset[str] = frozenset()  # tensors that are in the index alone
    problems: tuple[str, ...] = ()  # with files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors; () where a tensor is lost."""
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return dict.fromkeys(self.lost, ()) | shapes

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, to which all of `DTYPES` convert exactly."""
        with safe_open(self.tensors[name].file, "np") as file:
            return file.get_tensor(name).astype(np.float32)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`: a folder, a .safetensors file, or a name on the Hugging Face hub.

    A folder holds model.safetensors, or model.safetensors.index.json and its shards, or one
    .safetensors file of another name. config.json is that of the folder, also for a file; where it
    describes several files, `{"STEM": {...}, ...}`, the part that is named like the file counts.

    Raises:
      FileNotFoundError: there is no such file, folder or hub name, or no safetensors in it.
      ValueError: nothing can be read; what else is wrong with files, is in `problems`.
    """
    local = _local(path)
    files, wanted, problems = _files(local)
    tensors, read = {}, set()
    for file in files:
        try:
            infos = _infos(file)
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: not a whole safetensors file: {error}")
            continue
        read.add(file.name)
        for name, info in infos.items():
            if wanted is None or wanted.get(name) == file.name:
                tensors[name] = info
            else:
                place = f"has it in {wanted[name]}" if name in wanted else "does not have it"
                problems.append(f"extra tensor {name} in {file.name}: the index {place}")
    lost = frozenset((wanted or {}).keys() - tensors.keys())
    for name in sorted(lost):
        if wanted[name] in read:  # the others go without saying
            problems.append(f"missing tensor {name}: the index has it in {wanted[name]}")
    config = _config(local, problems)
    if problems and not read:
        raise_all(path, problems)
    return Checkpoint(local, tensors, config, lost, tuple(problems))


def _infos(file: Path) -> dict[str, TensorInfo]:
    with safe_open(file, "np") as opened:
        pieces = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(file, tuple(piece.get_shape()), piece.get_dtype())
            for name, piece in pieces.items()
        }


def _local(path: str | os.PathLike[str]) -> Path:
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = os.fspath(path)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or local.suffix == ".safetensors":
        raise FileNotFoundError(f"{name}: there is no such file or folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 100, placeholder=" ...")
        raise FileNotFoundError(
            f"{name}: there is no such file or folder, and it is neither known nor reachable on "
            f"the Hugging Face hub ({reason})"
        ) from error


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None, list[str]]:
    """Files to open, the file name of each wanted tensor (None: all in them), and problems."""
    if path.is_file():
        return [path], None, []
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"], None, []
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            wanted = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            return [], None, [f"{index.name}: not an index of shards: {error!r}"]
        wrong = {name: shard for name, shard in wanted.items() if not _is_file_name(shard)}
        problems = [
            f"{index.name}: {name}: got {shard!r}, must be the name of a file beside it"
            for name, shard in wrong.items()
        ]
        wanted |= dict.fromkeys(wrong, "")
        shards = [path / name for name in sorted(set(wanted.values()) - {""})]
        problems += [f"missing shard {shard.name}" for shard in shards if not shard.exists()]
        return [shard for shard in shards if shard.exists()], wanted, problems
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files, None, []
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path}: several safetensors files ({names}); give one of them")
    hint = ""
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        hint = "; PyTorch files have to be saved as safetensors first, where PyTorch is installed"
    raise FileNotFoundError(f"{path}: no model.safetensors and no index of shards in it{hint}")


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, not an object")
        config = config.get(path.stem, config) if path.is_file() else config
        if not isinstance(config, dict):
            raise ValueError(f"{path.stem}: a {type(config).__name__}, not an object")
    except ValueError as error:
        problems.append(f"config.json: not readable: {error}")
        return None
    return config


def check_new(folder: str | os.PathLike[str]) -> Path:
    """The path of an output folder.

    Raises:
      FileExistsError: it is there already.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{folder}: exists already; choose another output folder")
    return path


def save_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Writes model.safetensors, config.json and a copy of the tokenizer.json, all or nothing.

    The `official_yaml` of an official config is also written alone, as official.yaml (JSON, which
    is YAML), because that is what the authors' loader takes.

    Raises:
      FileExistsError: `folder` is there already.
    """
    path = check_new(folder)
    files = {"config.json": config}
    if "official_yaml" in config:
        files["official.yaml"] = config["official_yaml"]
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        save_file(dict(tensors), unfinished / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, indent=2) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, unfinished / "tokenizer.json")
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
