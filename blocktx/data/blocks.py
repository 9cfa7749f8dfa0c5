"""Documents as contexts of N blocks of K tokens, packed on access."""

from collections.abc import Sequence

import numpy as np

from blocktx.config import UserError
from blocktx.data.documents import Documents


class PackedBlocks:
    """A random-access source of contexts `{"tokens": int32 [N, K], "mask": bool [N, K]}`.

    Each document becomes whole blocks: 0..K-1 padding tokens if padding is random (paper, appendix
    H), its tokens, and padding to the end of its last block. The blocks of all documents in a row
    are cut into contexts. The mask is True on tokens of documents and False on padding.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        block_length: int,
        blocks: int,
        pad_id: int,
        random_padding: bool,
        seed: int | Sequence[int] | None,
        overlap: int = 0,
    ):
        """Lay out the blocks; reads no tokens.

        Args:
          documents: D documents, each of one token or more.
          block_length: K.
          blocks: N.
          pad_id: the padding token.
          random_padding: whether padding stands before documents too; needs a seed.
          seed: for training: order and padding of the documents follow from it, and blocks too few
            for a last context are left out. None keeps the documents' order and fills up the last
            context with padding.
          overlap: blocks that a context repeats from the one before it. With 1, each block but the
            very first is in one context at a place other than the first.

        Raises:
          ValueError: `random_padding` without a seed.
        """
        self._documents = documents
        self._block_length, self._blocks = block_length, blocks
        self._stride = blocks - overlap
        self._pad_id = pad_id
        self._order = documents.ids()
        self._padding = np.zeros(len(self._order), np.int32)
        if random_padding:
            if seed is None:
                raise ValueError("random_padding needs a seed, got None")
            self._padding = _draw_padding(len(self._order), block_length, seed)
        if seed is not None:
            permutation = np.argsort(_raw(seed, 1, len(self._order)), kind="stable")
            self._order, self._padding = self._order[permutation], self._padding[permutation]
        lengths = documents.offsets[self._order + 1] - documents.offsets[self._order]
        # Document j of the order starts with block starts[j]; starts[-1] is the number of blocks.
        self._starts = np.zeros(len(self._order) + 1, np.int64)
        np.cumsum(_count_blocks(lengths, self._padding, block_length), out=self._starts[1:])
        self._total = int(self._starts[-1])
        if seed is None:
            # At least one context, so that every block after the first is predicted.
            self._length = max(self._total > 1, -(-(self._total - overlap) // self._stride))
        else:
            self._length = max(0, (self._total - overlap) // self._stride)

    @staticmethod
    def count(
        documents: Documents,
        *,
        block_length: int,
        blocks: int,
        random_padding: bool,
        seed: int | Sequence[int],
    ) -> int:
        """Return the number of contexts with this seed and no overlap, without laying them out."""
        ids = documents.ids()
        padding = _draw_padding(len(ids), block_length, seed) if random_padding else 0
        lengths = documents.offsets[ids + 1] - documents.offsets[ids]
        return int(_count_blocks(lengths, padding, block_length).sum()) // blocks

    def require_context(self) -> None:
        """Raise a UserError if the documents do not fill one context."""
        if self._length:
            return
        enough = self._total * self._block_length
        would = f"use {enough} or less, or more text"
        if self._total < 2:  # a context of one block has nothing to predict
            would = "use more text"
        raise UserError(
            f"config.model.context_length: the {self._documents.token_count} training tokens make "
            f"{self._total} blocks of {self._block_length}, which do not fill one context of "
            f"{self._blocks * self._block_length} tokens; {would}"
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.read([index]).items()}

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Return contexts as rows, `{"tokens": int32 [R, N, K], "mask": bool [R, N, K]}`.

        What is read from documents is asked for all at once.
        """
        length = self._blocks * self._block_length
        tokens = np.full((len(indices), length), self._pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        wanted, places = [], []
        for row, index in enumerate(indices):
            for source, begin, count in self._layout(int(index)):
                wanted.append((source, source + count))
                places.append((row, begin, begin + count))
        for found, (row, begin, end) in zip(self._documents.read(wanted), places, strict=True):
            tokens[row, begin:end] = found
            mask[row, begin:end] = True
        shape = (len(indices), self._blocks, self._block_length)
        return {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape)}

    def _layout(self, index: int) -> list[tuple[int, int, int]]:
        """Return for each document in a context: the position read from, the place, the length."""
        if not 0 <= index < self._length:
            raise IndexError(f"context {index} of {self._length}")
        first = index * self._stride
        end = min(first + self._blocks, self._total)
        # All below counts tokens in the stream of blocks.
        low, high = first * self._block_length, end * self._block_length
        place = int(np.searchsorted(self._starts, first, side="right")) - 1
        found = []
        while place < len(self._order) and self._starts[place] < end:
            document = int(self._order[place])
            source, source_end = map(int, self._documents.offsets[document : document + 2])
            start = int(self._starts[place]) * self._block_length + int(self._padding[place])
            begin, stop = max(start, low), min(start + source_end - source, high)
            if begin < stop:
                found.append((source + begin - start, begin - low, stop - begin))
            place += 1
        return found


def _raw(seed: int | Sequence[int], stream: int, count: int) -> np.ndarray:
    """Return random uint64 that are the same in every version of NumPy."""
    parts = [seed] if isinstance(seed, int) else list(seed)
    return np.random.PCG64(np.random.SeedSequence([*parts, stream])).random_raw(count)


def _draw_padding(count: int, block_length: int, seed: int | Sequence[int]) -> np.ndarray:
    return (_raw(seed, 0, count) % np.uint64(block_length)).astype(np.int32)


def _count_blocks(lengths: np.ndarray, padding: np.ndarray | int, block_length: int) -> np.ndarray:
    return -(-(lengths + padding) // block_length)
