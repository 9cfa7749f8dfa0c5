"""Documents as contexts of N blocks of K tokens, packed on access."""

import numpy as np

from blocktx.data.corpus import Documents


class PackedBlocks:
    """A random-access source of contexts `{"tokens": int32 [N, K], "mask": bool [N, K]}`.

    Each document becomes whole blocks: 0..K-1 padding tokens if padding is random (the paper's
    appendix H), its tokens, and padding to the end of its last block. The blocks of all documents
    in a row are cut into contexts. The mask is true on documents' tokens and false on padding.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        block_length: int,
        blocks: int,
        pad_id: int,
        random_padding: bool,
        seed: int | None,
        overlap: int = 0,
    ):
        """Lays out the blocks; reads no tokens.

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
          ValueError: with a seed, when the documents do not fill even one context.
        """
        count = len(documents)
        self._documents = documents
        self._block_length, self._blocks = block_length, blocks
        self._stride = blocks - overlap
        self._pad_id = pad_id
        rng = np.random.default_rng(seed)
        self._order = np.arange(count) if seed is None else rng.permutation(count)
        self._padding = np.zeros(count, np.int64)
        if random_padding:
            if seed is None:
                raise ValueError("random_padding needs a seed, got None")
            self._padding = rng.integers(0, block_length, count)  # by place in the order
        lengths = self._padding + np.diff(documents.offsets)[self._order]
        # Document j of the order starts with block starts[j]; starts[-1] is the number of blocks.
        self._starts = np.concatenate([[0], np.cumsum(-(-lengths // block_length))])
        self._total = int(self._starts[-1])
        if seed is None:
            # What is to be predicted is in a context, even if all of it would be a repetition.
            self._length = max(self._total > 1, -(-(self._total - overlap) // self._stride))
        else:
            self._length = max(0, (self._total - overlap) // self._stride)
            if self._length == 0:
                raise ValueError(self._too_short())

    def _too_short(self) -> str:
        enough = self._total * self._block_length
        would = f"use {enough} or less, or more text"
        if self._total < 2:  # a context of one block has nothing to predict
            would = "use more text"
        return (
            f"config.model.context_length: the {len(self._documents.tokens)} training tokens make "
            f"{self._total} blocks of {self._block_length}, which do not fill one context of "
            f"{self._blocks * self._block_length} tokens; {would}"
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._length:
            raise IndexError(f"context {index} of {self._length}")
        first = index * self._stride
        end = min(first + self._blocks, self._total)
        # All below counts tokens in the stream of blocks.
        low, high = first * self._block_length, end * self._block_length
        tokens = np.full(self._blocks * self._block_length, self._pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        place = int(np.searchsorted(self._starts, first, side="right")) - 1
        while place < len(self._order) and self._starts[place] < end:
            document = self._order[place]
            source, source_end = self._documents.offsets[document : document + 2]
            start = self._starts[place] * self._block_length + self._padding[place]
            begin, stop = max(start, low), min(start + source_end - source, high)
            tokens[begin - low : stop - low] = self._documents.tokens[
                source + begin - start : source + stop - start
            ]
            mask[begin - low : stop - low] = True
            place += 1
        shape = (self._blocks, self._block_length)
        return {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape)}
