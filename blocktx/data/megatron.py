"""Tokens without text: Megatron-LM's `.bin/.idx` pairs, and synthetic documents.

The format is that of `IndexedDataset` in Megatron-LM and GPT-NeoX (The Pile as Pythia had it).
"""

import dataclasses
import struct
from collections.abc import Iterator

import numpy as np

from blocktx.config import UserError
from blocktx.files import file_info, open_binary

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")
_READ_BYTES = 1 << 22

_SYNTHETIC_SEED = 20_240_604
SYNTHETIC_CHUNK = 1 << 20  # tokens


@dataclasses.dataclass(frozen=True)
class MegatronIndex:
    """The index of a `.bin` file.

    Attributes:
      dtype: of its tokens.
      sizes: int32 [sequences], tokens.
      pointers: int64 [sequences], bytes from the start of the `.bin` file.
      documents: int64 [D + 1]: document i is sequences[documents[i]:documents[i + 1]].
    """

    dtype: np.dtype
    sizes: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents) - 1


def read_index(prefix: str, begin: int = 0, end: int | None = None) -> MegatronIndex:
    """Read documents `begin` to `end` of `prefix.idx`, and check them against `prefix.bin`.

    Raises:
      FileNotFoundError: one of the two files is missing.
      UserError: the index is truncated or of another format, or does not fit the `.bin` file.
    """
    path = f"{prefix}.idx"
    bin_size = file_info(f"{prefix}.bin").size
    size = file_info(path).size
    with open_binary(path) as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            raise UserError(f"{path}: not a Megatron index: it does not begin with {_MAGIC!r}")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{path}: version {version} of Megatron's index, expected 1")
        if code not in _DTYPES:
            raise UserError(
                f"{path}: dtype code {code} is not of integers; expected one of "
                f"{', '.join(map(str, _DTYPES))}"
            )
        expected = _HEADER.size + 12 * sequences + 8 * documents
        # A multimodal index has a byte more for each sequence.
        if size not in (expected, expected + sequences):
            raise UserError(
                f"{path}: truncated or damaged: {size} bytes, expected {expected} for {sequences} "
                f"sequences and {documents} document boundaries"
            )

        def read(dtype: str, start: int, first: int, last: int) -> np.ndarray:
            width = np.dtype(dtype).itemsize
            file.seek(start + width * first)
            return np.frombuffer(file.read(width * (last - first)), dtype)

        end = max(0, documents - 1) if end is None else end
        bounds = read("<i8", _HEADER.size + 12 * sequences, begin, end + 1)
        whole = begin == 0 and end == documents - 1
        if (
            len(bounds) == 0
            or (np.diff(bounds) < 0).any()
            or not 0 <= bounds[0] <= bounds[-1] <= sequences
            or (whole and (bounds[0] != 0 or bounds[-1] != sequences))
        ):
            raise UserError(f"{path}: damaged: its document boundaries do not cover its sequences")
        first, last = int(bounds[0]), int(bounds[-1])
        sizes = read("<i4", _HEADER.size, first, last)
        pointers = read("<i8", _HEADER.size + 4 * sequences, first, last)
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    ends = pointers + sizes.astype(np.int64) * dtype.itemsize
    if len(sizes) and (sizes.min() < 0 or pointers.min() < 0 or ends.max() > bin_size):
        raise UserError(
            f"{prefix}.bin: truncated: it has {bin_size} bytes, and {path} expects "
            f"{int(ends.max())}"
        )
    if whole and ends.max(initial=0) < bin_size:
        raise UserError(
            f"{prefix}.bin: has {bin_size} bytes, and {path} tells of {int(ends.max(initial=0))}: "
            f"it is of another file, or its tokens are not {dtype.name}"
        )
    return MegatronIndex(dtype, sizes, pointers, bounds - first)


def read_megatron(prefix: str, begin: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
    """Yield the tokens of documents `begin` to `end`, integers; empty documents are left out.

    Raises:
      FileNotFoundError, UserError: see `read_index`.
    """
    index = read_index(prefix, begin, end)
    size = index.dtype.itemsize
    with open_binary(f"{prefix}.bin") as file:
        buffer, buffer_start = b"", 0  # files are read in order, many documents at a time
        for document in range(len(index)):
            parts = []
            for i in range(index.documents[document], index.documents[document + 1]):
                start, length = int(index.pointers[i]), int(index.sizes[i]) * size
                if not buffer_start <= start <= start + length <= buffer_start + len(buffer):
                    file.seek(start)
                    buffer, buffer_start = file.read(max(length, _READ_BYTES)), start
                offset = start - buffer_start
                parts.append(np.frombuffer(buffer, index.dtype, int(index.sizes[i]), offset))
            tokens = (
                parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, index.dtype), *parts])
            )
            if len(tokens):
                yield tokens


def read_synthetic(total: int, vocab_size: int, begin: int, end: int) -> Iterator[np.ndarray]:
    """Yield random documents of 1 to 1,999 tokens, uint32, `total` tokens in all chunks together.

    Args:
      total: tokens of all documents.
      vocab_size: ids are below it.
      begin: the first chunk of 2^20 tokens.
      end: the chunk after the last.
    """
    for chunk in range(begin, end):
        size = min(SYNTHETIC_CHUNK, total - chunk * SYNTHETIC_CHUNK)
        raw = np.random.PCG64(np.random.SeedSequence([_SYNTHETIC_SEED, chunk]))
        # The raw stream of a bit generator is the same in every version of NumPy.
        lengths = raw.random_raw(size // 500 + 10) % 1999 + 1
        ends = np.cumsum(lengths)
        while ends[-1] < size:
            ends = np.concatenate([ends, ends[-1] + np.cumsum(raw.random_raw(1000) % 1999 + 1)])
        ends = np.minimum(ends[: int(np.searchsorted(ends, size)) + 1], size)
        tokens = raw.random_raw(-(-size // 2)).view(np.uint32)[:size] % np.uint32(vocab_size)
        yield from np.split(tokens, ends[:-1].astype(np.int64))
