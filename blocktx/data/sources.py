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
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from blocktx.config import UserError
from blocktx.data import megatron, tables
from blocktx.data.source_files import (
    ARRAY_RECORD_SUFFIXES,
    MEGATRON_SUFFIXES,
    PACKAGE,
    PARQUET_SUFFIXES,
    source_files,
)
from blocktx.data.text_files import JSON_LINES_SUFFIXES, BadDocument, read_json_lines, read_text
from blocktx.files import FileInfo, file_info, list_files

_HUB, _SYNTHETIC = "hub:", "synthetic:"

_ROW_BYTES = 1000  # a guess at a row of a Hugging Face dataset

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
      UserError: a source is empty, a weight is not a number greater than 0, or some sources have
        weights and others none.
    """
    specs = [text] if "," not in text or os.path.exists(text) else text.split(",")
    found = []
    for spec in map(str.strip, specs):
        name, at, number = spec.rpartition("@")
        if at and _is_number(number) and not os.path.exists(spec):
            found.append(Source(name, float(number)))
        else:
            found.append(Source(spec, None))
    if not all(source.spec for source in found):
        raise UserError(f"{field}: {text!r} names an empty source between its commas")
    weighted = [source.weight is not None for source in found]
    if any(weighted) and not all(weighted):
        raise UserError(f"{field}: {text!r}: give all sources a weight, as in A@0.7,B@0.3, or none")
    if any(source.weight is not None and not 0 < source.weight < math.inf for source in found):
        raise UserError(f"{field}: {text!r}: a weight must be a number greater than 0")
    return tuple(found)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """Yield the documents of `source` that are not blank, in a fixed order.

    Args:
      source: one source (see above), but not a prepared one.
      text_field: the field, column or feature that holds the text.

    Raises:
      FileNotFoundError: `source` or its package is missing.
      UserError: there is no document, or a file is not what its name says; names file and place.
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
        raise UserError(f"config.data.source: {source!r} holds nothing but blank documents")


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
      FileNotFoundError, UserError: see `read_documents`.
    """
    if source.startswith(_SYNTHETIC):
        tokens = _count(source)
        chunks = -(-tokens // megatron.SYNTHETIC_CHUNK)
        return _cut_evenly("synthetic", source, chunks, 2 * megatron.SYNTHETIC_CHUNK, part_bytes)
    if _is_dataset(source):
        return _cut_evenly("hub", source, tables.hub_rows(source), _ROW_BYTES, part_bytes)
    return [part for file in source_files(source) for part in _file_parts(file, part_bytes)]


def fingerprint(source: str) -> dict[str, Any]:
    """Return what distinguishes `source` from its other versions: files, sizes, times, version.

    Raises:
      FileNotFoundError, UserError: as `read_documents`, before any file is read.
    """
    if source.startswith(_SYNTHETIC):
        return {"source": source}
    if source.startswith(_HUB):
        return {"source": source, "version": tables.hub_fingerprint(source)}
    if _is_dataset(source):
        files = list(list_files(epath.Path(source).expanduser(), ("",)))
    else:
        files = list(source_files(source))
        indices = [file.path for file in files if file.name.endswith(MEGATRON_SUFFIXES)]
        files += [file_info(path.removesuffix(".idx") + ".bin") for path in indices]
    version = None
    if source.startswith(PACKAGE):
        # A package may be installed under another name than its import name.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(source.removeprefix(PACKAGE))
    return {"files": [list(dataclasses.astuple(file)) for file in files], "version": version}


def _count(source: str) -> int:
    text = source.removeprefix(_SYNTHETIC).replace("_", "")
    try:
        count = int(text) if text.isdecimal() else int(float(text))
    except (ValueError, OverflowError):
        count = 0
    if not 2 <= count <= 10**15:
        raise UserError(
            f"config.data.source: {source!r}: expected a number of tokens, as in synthetic:1e8"
        )
    return count


def _is_dataset(source: str) -> bool:
    if source.startswith(_HUB):
        return True
    if source.startswith((PACKAGE, _SYNTHETIC)) or glob.has_magic(source):
        return False
    folder = epath.Path(source).expanduser()
    names = ("dataset_info.json", "dataset_dict.json")
    return any((folder / name).exists() for name in names)


def _cut(kind: str, path: str, ends: np.ndarray, part_bytes: int) -> list[Part]:
    """Return parts of consecutive items, each of about `part_bytes`; `ends` are in bytes."""
    parts, begin, start = [], 0, 0
    while begin < len(ends):
        end = int(np.searchsorted(ends, start + part_bytes, side="right"))
        end = max(begin + 1, end)
        parts.append(Part(kind, path, begin, end, int(ends[end - 1]) - start))
        begin, start = end, int(ends[end - 1])
    return parts


def _cut_evenly(kind: str, path: str, count: int, size: int, part_bytes: int) -> list[Part]:
    """Return parts of consecutive items of `size` bytes each."""
    step = max(1, part_bytes // size)
    bounds = [*range(0, count, step), count]
    return [Part(kind, path, a, b, (b - a) * size) for a, b in itertools.pairwise(bounds)]


def _file_parts(file: FileInfo, part_bytes: int) -> list[Part]:
    path, name = file.path, file.name
    large = file.size > 1.5 * part_bytes
    if name.endswith(MEGATRON_SUFFIXES):
        prefix = path.removesuffix(".idx")
        index = megatron.read_index(prefix)
        if file_info(f"{prefix}.bin").size <= 1.5 * part_bytes:
            return [Part("megatron", prefix, 0, len(index), file_info(f"{prefix}.bin").size)]
        ends = np.concatenate([[0], np.cumsum(index.sizes, dtype=np.int64)])[index.documents[1:]]
        return _cut("megatron", prefix, ends * index.dtype.itemsize, part_bytes)
    if name.endswith(PARQUET_SUFFIXES):
        if large:
            return _cut("parquet", path, np.cumsum(tables.parquet_row_groups(path)), part_bytes)
        return [Part("parquet", path, size=file.size)]
    if name.endswith(ARRAY_RECORD_SUFFIXES):
        if large and (count := tables.array_record_count(path)):
            return _cut_evenly("array_record", path, count, -(-file.size // count), part_bytes)
        return [Part("array_record", path, size=file.size)]
    if name.removesuffix(".gz").removesuffix(".zst").endswith(JSON_LINES_SUFFIXES):
        if large and name.endswith(JSON_LINES_SUFFIXES):
            bounds = [*range(0, file.size - part_bytes // 2, part_bytes), file.size]
            pairs = itertools.pairwise(bounds)
            return [Part("json", path, begin, end, end - begin) for begin, end in pairs]
        return [Part("json", path, size=file.size)]
    return [Part("text", path, size=file.size)]
