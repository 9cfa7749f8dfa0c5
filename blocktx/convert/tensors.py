"""Folders of safetensors with a config.json, as Hugging Face lays them out: reading and writing."""

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
_HUB_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
_LISTED = 10  # lines of one kind in an error message


def raise_all(path: Any, problems: Iterable[str]) -> None:
    """Raise one ValueError that lists `problems`, if there are any."""
    lines = list(problems)
    if lines:
        raise ValueError("\n".join([f"{path}: cannot be converted:", *(f"  {p}" for p in lines)]))


def shortened(lines: list[str], what: str) -> list[str]:
    """Return the first ten lines, and how many there are if they are more."""
    if len(lines) <= _LISTED:
        return lines
    return [*lines[:_LISTED], f"... {len(lines)} {what} in all"]


def check_foreign(what: str, prefixes: tuple[str, ...], names: Collection[str]) -> list[str]:
    """Return a problem if no name begins with one of `prefixes`."""
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
    dtype: str  # of safetensors, such as F32


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint; the tensors themselves are read one by one."""

    path: Path  # the folder or file
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None  # config.json
    lost: frozenset[str] = frozenset()  # tensors that only the index has
    problems: tuple[str, ...] = ()  # with files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors; () of those that are lost."""
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return dict.fromkeys(self.lost, ()) | shapes

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32, which represents all `DTYPES` exactly."""
        with safe_open(self.tensors[name].file, "np") as file:
            return file.get_tensor(name).astype(np.float32)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at `path`: a folder, a .safetensors file, or a hub name.

    A folder has model.safetensors, or model.safetensors.index.json and its shards, or one
    .safetensors file of another name. A file's config.json is that of its folder; if that describes
    several files, `{"STEM": {...}, ...}`, the part with the file's name counts.

    Raises:
      FileNotFoundError: there is no such file, folder or hub name, or no safetensors in it.
      ValueError: nothing can be read. Other problems with files are in `problems`.
    """
    local = _local(path)
    files, wanted, problems = _files(local)
    tensors, read, extra = {}, set(), []
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
                extra.append(f"extra tensor {name} in {file.name}: the index {place}")
    lost = frozenset((wanted or {}).keys() - tensors.keys())
    missing = [  # those of a missing shard are not named one by one
        f"missing tensor {name}: the index has it in {wanted[name]}"
        for name in sorted(lost)
        if wanted[name] in read
    ]
    problems += shortened(extra, "extra tensors") + shortened(missing, "missing tensors")
    config = _config(local, problems)
    if problems and not read:
        raise_all(path, problems)
    return Checkpoint(local, tensors, config, lost, tuple(problems))


def _infos(file: Path) -> dict[str, TensorInfo]:
    if not file.is_file():  # reading a pipe would block
        raise OSError("not a regular file")
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
    """Return the files to open, the file name of each tensor (None: no index), and problems."""
    if not path.is_dir():
        return [path], None, []
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"], None, []
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            wanted = dict(_read_json(index)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            return [], None, [f"{index.name}: not an index of shards: {error!r:.200}"]
        wrong = {name: shard for name, shard in wanted.items() if not _is_file_name(shard)}
        bad = [
            f"{index.name}: {name}: got {shard!r:.100}, must be the name of a file beside it"
            for name, shard in wrong.items()
        ]
        wanted |= dict.fromkeys(wrong, "")
        shards = [path / name for name in sorted(set(wanted.values()) - {""})]
        missing = [f"missing shard {shard.name}" for shard in shards if not shard.exists()]
        problems = shortened(bad, "wrong names") + shortened(missing, "missing shards")
        return [shard for shard in shards if shard.exists()], wanted, problems
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files, None, []
    if files:
        names = ", ".join(shortened([file.name for file in files], "files"))
        raise ValueError(f"{path}: several safetensors files ({names}); give one of them")
    hint = ""
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        hint = "; save PyTorch files as safetensors first, on a machine that has PyTorch"
    raise FileNotFoundError(f"{path}: no model.safetensors and no index of shards in it{hint}")


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) < 256
        and "\0" not in name
        and Path(name).name == name
    )


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      ValueError: it is no file, no JSON, nested too deep, or no object.
    """
    if not file.is_file():
        raise ValueError("not a regular file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not an object")
    return content


def _config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return None
    try:
        config = _read_json(file)
        config = config if path.is_dir() else config.get(path.stem, config)
        if not isinstance(config, dict):
            raise ValueError(f"{path.stem}: a {type(config).__name__}, not an object")
    except (ValueError, OSError) as error:
        problems.append(f"config.json: not readable: {error}")
        return None
    return config


def check_new(folder: str | os.PathLike[str]) -> Path:
    """Return the path of an output folder.

    Raises:
      FileExistsError: it exists already.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{folder}: exists already; choose another output folder")
    return path


def save_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    more: Mapping[str, str] | None = None,
) -> None:
    """Write model.safetensors, config.json and the files of `more`, all or nothing.

    The `official_yaml` of an official config is also written alone, as official.yaml (JSON, which
    is YAML), because that is what the authors' loader takes.

    Args:
      folder: the output folder.
      tensors: arrays by name.
      config: the content of config.json.
      more: contents of other files by name, such as those of a tokenizer.

    Raises:
      FileExistsError: `folder` exists already.
    """
    path = check_new(folder)
    files = {"config.json": config}
    if "official_yaml" in config:
        files["official.yaml"] = config["official_yaml"]
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        save_file(dict(tensors), unfinished / "model.safetensors", metadata={"format": "pt"})
        for name, text in {**texts, **(more or {})}.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
