"""Tokenized documents, and how they are divided into training and held-out ones."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from blocktx.data.shards import ShardedTokens


@dataclasses.dataclass(frozen=True)
class DocumentRange:
    """Documents `first` to `end`, without every n-th, or those alone.

    Attributes:
      first: the first document.
      end: the document after the last.
      every: n; 0: no document is held out.
      heldout: whether these are the held-out documents.
    """

    first: int
    end: int
    every: int = 0
    heldout: bool = False

    def __len__(self) -> int:
        count = self.end - self.first
        held = count // self.every if self.every else 0
        return held if self.heldout else count - held

    def ids(self) -> np.ndarray:
        """Return the numbers of the documents, int32 or int64, ascending."""
        dtype = np.int32 if self.end < 1 << 31 else np.int64
        j = np.arange(len(self), dtype=dtype)
        if self.heldout:
            return self.first + (j + 1) * self.every - 1
        return self.first + j + (j // (self.every - 1) if self.every else 0)


def split(first: int, end: int, every: int) -> tuple[DocumentRange, DocumentRange]:
    """Return the training and the held-out documents of a source.

    Every n-th document is held out, or the last one of two and more if there are fewer than that.
    """
    if 2 <= end - first < every:
        every = end - first
    return DocumentRange(first, end, every), DocumentRange(first, end, every, heldout=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Token ids of D documents, each ended by the end token.

    Attributes:
      tokens: ids by position, uint16 or uint32: an array, or shards on disk or in a bucket.
      offsets: int64; document i is tokens[offsets[i]:offsets[i + 1]].
      text_bytes: UTF-8 bytes of the texts of these documents.
      ranges: which documents these are; None: all.
    """

    tokens: np.ndarray | ShardedTokens
    offsets: np.ndarray
    text_bytes: int
    ranges: tuple[DocumentRange, ...] | None = None

    def _ranges(self) -> tuple[DocumentRange, ...]:
        return (DocumentRange(0, len(self.offsets) - 1),) if self.ranges is None else self.ranges

    def __len__(self) -> int:
        return sum(map(len, self._ranges()))

    @functools.cached_property
    def token_count(self) -> int:
        """The number of tokens of these documents."""
        total = 0
        for part in self._ranges():
            held = dataclasses.replace(part, heldout=True).ids() if part.every else np.arange(0)
            count = int((self.offsets[held + 1] - self.offsets[held]).sum())
            whole = int(self.offsets[part.end] - self.offsets[part.first])
            total += count if part.heldout else whole - count
        return total

    def ids(self) -> np.ndarray:
        """Return the numbers of these documents, int32 or int64 [D]."""
        return np.concatenate([np.arange(0, dtype=np.int32), *(p.ids() for p in self._ranges())])

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the tokens of one of these documents, by its place among them."""
        document = self.ids()[index]
        return self.read([tuple(self.offsets[document : document + 2].tolist())])[0]

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return the tokens of each range of positions, which may not span two documents.

        Raises:
          FileNotFoundError, UserError: see `ShardedTokens.read`.
        """
        if isinstance(self.tokens, ShardedTokens):
            return self.tokens.read(ranges)
        return [self.tokens[begin:end] for begin, end in ranges]
