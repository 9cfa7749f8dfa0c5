"""Text and JSON Lines files, plain or compressed, read as streams of bounded memory."""

import codecs
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import zstandard

from blocktx.config import UserError
from blocktx.files import open_binary

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex")  # taken from folders
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst")

_CHUNK_BYTES = 1 << 20
# A zstd block of 4 bytes can decompress to 128 KiB: 512 bytes give at most 16 MiB at a time.
_ZSTD_INPUT_BYTES = 512
_MAX_LINE_BYTES = 1 << 27

_PIECE_CHARACTERS = 1 << 20
# Cuts at which GPT-2 like tokenizers see no difference between one text and two.
_CUTS = (re.compile(r"\S\n(?=\S)"), re.compile(r"\S(?= \S)"))


class BadDocument(UserError):
    """A document that cannot be read; the message names the file and the place in it."""


def read_text(path: str) -> Iterator[str | Iterator[str] | BadDocument]:
    """Yield the one document of a text file: a string, or a stream of strings if it is long.

    Raises:
      UserError: the compressed file is damaged or truncated.
    """
    chunks = read_bytes(path)
    first, second = next(chunks, b""), next(chunks, None)
    try:
        if second is None:
            yield first.decode().removeprefix("\ufeff")
            return
        for _ in _decoded(path):  # all of it is checked before any of it is used
            pass
    except UnicodeDecodeError as error:
        yield BadDocument(f"{path}: {_not_utf8(error, error.start)}")
        return
    yield _decoded(path)


def _decoded(path: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file; a UnicodeDecodeError counts bytes from the file's start."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, begins = 0, True
    for chunk, last in _with_last(read_bytes(path)):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, last)
        except UnicodeDecodeError as error:
            error.start += offset - pending
            raise
        offset += len(chunk)
        if begins and text:
            text, begins = text.removeprefix("\ufeff"), False
        yield text


def _with_last(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    before = None
    for chunk in chunks:
        if before is not None:
            yield before, False
        before = chunk
    yield before or b"", True


def _not_utf8(error: UnicodeDecodeError, start: int) -> BadDocument:
    return BadDocument(f"not UTF-8 at byte {start} ({error.reason}); convert the file")


def read_json_lines(
    path: str, text_field: str, begin: int = 0, end: int | None = None
) -> Iterator[str | BadDocument]:
    """Yield the documents of a JSON Lines file.

    Args:
      path: the file, plain or compressed.
      text_field: the field that holds the text.
      begin: of a plain file, the lines that begin at this byte or later.
      end: of a plain file, the lines that begin before this byte; None: to the end.

    Raises:
      UserError: the compressed file is damaged, or a line is longer than 128 MiB.
    """
    offset = max(0, begin - 1)  # the byte before tells whether a line begins at `begin`
    lines = _lines(read_bytes(path, offset), path)
    if begin:
        offset += len(next(lines))
    first = offset
    for number, data in enumerate(lines, start=1):
        if end is not None and offset >= end:
            return
        try:
            text = _json_line(data, text_field, offset)
        except BadDocument as error:
            yield BadDocument(f"{path}, line {number + _count_lines(path, first)}: {error}")
        else:
            if text:
                yield text
        offset += len(data)


def _json_line(data: bytes, text_field: str, offset: int) -> str | None:
    try:
        line = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, offset + error.start) from None
    if not line or line.isspace():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON: {error}") from None
    return json_text(record, text_field)


def _count_lines(path: str, size: int) -> int:
    """Return the number of lines in the first `size` bytes, which end with a line."""
    count = 0
    for chunk in read_bytes(path) if size else ():
        count += chunk[:size].count(b"\n")
        size -= len(chunk)
        if size <= 0:
            break
    return count


def read_bytes(path: str, begin: int = 0) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in pieces of bounded size.

    Raises:
      UserError: the compressed file is damaged or truncated.
    """
    with open_binary(path) as file:
        file.seek(begin)
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        suffix = path[path.rfind(".") :]
        if suffix not in COMPRESSED_SUFFIXES:
            yield from chunks
            return
        try:
            yield from (_gunzip if suffix == ".gz" else _unzstd)(chunks)
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise UserError(f"{path}: not a whole {suffix} file: {error}") from None


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    member = None  # a file may be several compressed members in a row
    for chunk in chunks:
        pending = False  # output that is held back
        while chunk or pending:
            member = member or zlib.decompressobj(wbits=31)
            piece = member.decompress(chunk, _CHUNK_BYTES)
            if piece:
                yield piece
            pending = len(piece) == _CHUNK_BYTES and not member.eof
            if member.eof:
                chunk, member = member.unused_data, None
            else:
                chunk = member.unconsumed_tail
    if member is not None:
        raise EOFError("it ends too early")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    frame = None  # a file may be several frames in a row
    for chunk in chunks:
        position = 0
        while position < len(chunk):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            part = chunk[position : position + _ZSTD_INPUT_BYTES]
            if piece := frame.decompress(part):
                yield piece
            position += len(part)
            if frame.eof:
                position -= len(frame.unused_data)
                frame = None
    if frame is not None:
        raise EOFError("it ends too early")


def _lines(chunks: Iterator[bytes], path: str) -> Iterator[bytes]:
    """Yield lines with their newline; the last has none."""
    parts, length = [], 0  # of a line that may go on in the next chunk
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        length += len(first)
        if length > _MAX_LINE_BYTES:
            raise UserError(
                f"{path}: a line of more than {_MAX_LINE_BYTES >> 20} MiB; is it JSON Lines?"
            )
        for following in others:
            yield b"".join([*parts, b"\n"])
            parts, length = [following], len(following)
    yield b"".join(parts)


def pieces(document: str | Iterable[str]) -> Iterator[str]:
    """Yield a document in pieces of 1 to 2 Mi characters, the same ones however it is streamed.

    A document of up to 2 Mi characters is one piece. A longer one is cut where a line ends, or else
    where a word ends, or else at 2 Mi characters.
    """
    if isinstance(document, str):
        size = _PIECE_CHARACTERS
        if len(document) <= 2 * size:
            yield document
            return
        stream = (document[i : i + size] for i in range(0, len(document), size))
    else:
        stream = document
    buffer = ""
    for text in stream:
        buffer += text
        while len(buffer) > 2 * _PIECE_CHARACTERS:
            cut = _cut(buffer)
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def _cut(text: str) -> int:
    # Depends on the first 2 Mi + 1 characters alone.
    for pattern in _CUTS:
        if found := pattern.search(text, _PIECE_CHARACTERS, 2 * _PIECE_CHARACTERS + 1):
            return found.end()
    return 2 * _PIECE_CHARACTERS


def json_text(record: Any, text_field: str) -> str:
    """Return the text of a JSON record.

    Raises:
      BadDocument: the record has no such text; the message does not name the place.
    """
    if not isinstance(record, dict):
        raise BadDocument(f"a JSON {type(record).__name__}, expected an object with fields")
    text = record.get(text_field)
    if not isinstance(text, str):
        problem = "is not a string in it" if text_field in record else "is not a field of it"
        names = list(map(repr, record))
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise BadDocument(
            f"config.data.text_field: {text_field!r} {problem}; "
            f"the line has {listed or 'no fields'}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as in "\ud83d"
        raise BadDocument(
            f"field {text_field!r} is not valid Unicode at character {error.start}"
        ) from None
    return text
