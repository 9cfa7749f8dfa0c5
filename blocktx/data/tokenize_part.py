"""Tokenize one part of the sources into shards, resumably."""

import dataclasses
import json
from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from etils import epath

from blocktx.config import UserError
from blocktx.data.manifest import Shard
from blocktx.data.shards import ShardWriter
from blocktx.data.sources import Document, Part, read_part, without_blank
from blocktx.data.text_files import BadDocument, pieces
from blocktx.data.tokenizer import Tokenizer
from blocktx.files import is_bucket, write_atomic

_BATCH_CHARACTERS = 1 << 20  # tokenized at a time
_SHARD_TOKENS = 1 << 27  # a document is never split, so a shard may have more
_LISTED = 100  # messages of bad documents that are kept for each part


@dataclasses.dataclass
class PartRecord:
    """The contents of `parts/00000.json`: the result so far.

    Attributes:
      shards: those that are published.
      read: documents that were read for them, blank and bad ones included.
      bad_documents: messages of the first that were skipped.
      bad_count: the number of those that were skipped.
      done: whether this is all.
    """

    shards: list[Shard] = dataclasses.field(default_factory=list)
    read: int = 0
    bad_documents: list[str] = dataclasses.field(default_factory=list)
    bad_count: int = 0
    done: bool = False

    @classmethod
    def load(cls, path: epath.Path) -> "PartRecord":
        """Read the record of a part; an empty one if nothing was published."""
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}; remove it") from None
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return cls(**content)

    def save(self, path: epath.Path) -> None:
        write_atomic(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Counts since the last report."""

    documents: int
    tokens: int
    text_bytes: int
    bad: tuple[str, ...]


def tokenize_part(
    folder: epath.Path,
    number: int,
    parts: Iterable[Part],
    text_field: str,
    tokenizer: Tokenizer,
    report: Callable[[Progress], None],
    skip_bad: int,
) -> PartRecord:
    """Write the shards of a part that are not there yet, and its record after each.

    Args:
      folder: the prepared folder.
      number: of the part, for the names of its files.
      parts: what it consists of.
      text_field: the field, column or feature that holds the text.
      tokenizer: encodes texts. Tokens are taken as they are.
      report: called after every batch; an exception that it raises ends the work.
      skip_bad: how many documents that cannot be read are left out, in this part.

    Raises:
      UserError: a source is damaged, more than `skip_bad` documents cannot be read, or tokens are
        not ids of the tokenizer.
    """
    path = folder / "parts" / f"{number:05d}.json"
    record = PartRecord.load(path)
    if record.done:
        return record
    if not is_bucket(folder):  # of a process that was killed
        for left in (folder / "shards").glob(f".{number:05d}-*"):
            left.unlink(missing_ok=True)
    bad: list[tuple[int, str]] = []  # of all that was read
    documents = _read(parts, text_field, tokenizer.vocab_size, record.read, bad)
    dtype, writer = token_dtype(tokenizer), None
    recorded = reported = 0

    def publish(read: int) -> None:
        """Publish the shard and record what was read up to it."""
        nonlocal writer, recorded
        if writer is not None:
            record.shards.append(writer.publish(f"{number:05d}-{len(record.shards):03d}.bin"))
            writer = None
        for place, message in bad[recorded:]:
            if place <= read:
                recorded += 1
                record.bad_count += 1
                record.bad_documents = [*record.bad_documents, message][:_LISTED]
        record.read = read
        record.save(path)

    def tell(documents: int, tokens: int, text_bytes: int) -> None:
        nonlocal reported
        messages = tuple(message for _, message in bad[reported:])
        reported = len(bad)
        if record.bad_count + len(bad) - recorded > skip_bad:
            before = record.bad_count + len(bad) - recorded - 1
            raise UserError(too_many(bad[-1][1] if bad else record.bad_documents[-1], before))
        report(Progress(documents, tokens, text_bytes, messages))

    read = record.read
    try:
        for batch in encoded(documents, tokenizer):
            for piece in batch:
                if writer is None:
                    writer = ShardWriter(dtype, folder / "shards", f"{number:05d}")
                writer.add(piece.tokens)
                if piece.document_bytes is not None:
                    read = piece.read
                    writer.end_document(piece.document_bytes)
                    if writer.tokens >= _SHARD_TOKENS:
                        publish(read)
            ends = sum(piece.document_bytes is not None for piece in batch)
            tokens = sum(len(piece.tokens) for piece in batch)
            tell(ends, tokens, sum(piece.text_bytes for piece in batch))
        tell(0, 0, 0)
        record.done = True
        publish(bad[-1][0] if bad and bad[-1][0] > read else read)
    finally:
        if writer is not None:
            writer.close()
    return record


def too_many(message: str, before: int) -> str:
    """Return the message of the error for a bad document, after so many that were skipped."""
    skipped = f" ({before} were skipped before)" if before else ""
    return f"{message}{skipped}; correct it, or skip up to N such documents with --skip_bad=N"


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype in which shards keep the ids of a tokenizer."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _read(
    parts: Iterable[Part],
    text_field: str,
    vocab_size: int,
    skipped: int,
    bad: list[tuple[int, str]],
) -> Iterator[tuple[int, Document, str]]:
    """Yield the number of documents read, a document that is not blank, and its file.

    The first `skipped` are left out. Bad ones after them are appended to `bad`.
    """
    read = 0
    for part in parts:
        for document in read_part(part, text_field, vocab_size):
            read += 1
            if read <= skipped:
                continue
            if isinstance(document, BadDocument):
                bad.append((read, str(document)))
                continue
            document = without_blank(document)
            if document is not None:
                yield read, document, part.path


@dataclasses.dataclass(frozen=True)
class TokenPiece:
    """The tokens of a document, or of a piece of a long one.

    Attributes:
      read: documents read, this one included.
      tokens: with the end token, if this is the end of the document.
      text_bytes: UTF-8 bytes of this piece.
      document_bytes: of the whole document, if this is the end of it.
    """

    read: int
    tokens: np.ndarray
    text_bytes: int
    document_bytes: int | None


def encoded(
    documents: Iterable[tuple[int, Document, str]], tokenizer: Tokenizer
) -> Iterator[list[TokenPiece]]:
    """Yield documents as tokens, each with the end token, in batches.

    Args:
      documents: the number of documents read, a document, and its file.
      tokenizer: of the texts. Tokens are taken as they are.

    Raises:
      UserError: tokens are not ids of the tokenizer.
    """
    byte_lengths = None
    texts: list[tuple[int, str, bool]] = []  # to be encoded
    batch: list[TokenPiece] = []
    characters = document_bytes = 0

    def encode() -> None:
        nonlocal document_bytes
        ids = tokenizer.encode_batch([text for _, text, _ in texts])
        for (read, text, last), tokens in zip(texts, ids, strict=True):
            if last:
                tokens.append(tokenizer.end_id)
            size = len(text.encode())
            document_bytes += size
            ids_T = np.frombuffer(array("I", tokens), np.uint32)
            batch.append(TokenPiece(read, ids_T, size, document_bytes if last else None))
            if last:
                document_bytes = 0
        texts.clear()

    for read, document, path in documents:
        if isinstance(document, np.ndarray):
            encode()
            if byte_lengths is None:
                byte_lengths = tokenizer.byte_lengths()
            tokens = _checked(document, len(byte_lengths), tokenizer.end_id, path)
            size = int(byte_lengths[tokens].sum())
            batch.append(TokenPiece(read, tokens, size, size))
            characters += len(tokens)
            document = ()
        for text, last in _with_last(pieces(document)):
            texts.append((read, text, last))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                encode()
                yield batch
                batch, characters = [], 0
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    encode()
    yield batch


def _with_last(items: Iterable[str]) -> Iterator[tuple[str, bool]]:
    before = None
    for item in items:
        if before is not None:
            yield before, False
        before = item
    if before is not None:
        yield before, True


def _checked(tokens: np.ndarray, vocab_size: int, end_id: int, path: str) -> np.ndarray:
    """Return the tokens of a document, with the end token if they do not end with it."""
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{path}: a token has id {low if low < 0 else high}, and the tokenizer's ids are 0 to "
            f"{vocab_size - 1}: the tokens are of another tokenizer"
        )
    return tokens if tokens[-1] == end_id else np.append(tokens, tokens.dtype.type(end_id))
