"""Writes Megatron's `.bin/.idx` pairs from their description, one field after the other."""

import pathlib
import struct
from collections.abc import Sequence

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
FORMATS = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint16": "H"}


def write_megatron(
    prefix: pathlib.Path,
    documents: Sequence[Sequence[Sequence[int]]],
    dtype: str = "uint16",
    modes: bool = False,
) -> None:
    """Writes documents, each of several sequences of tokens."""
    sequences = [sequence for document in documents for sequence in document]
    pointers, bounds, data = [], [0], b""
    for sequence in sequences:
        pointers.append(len(data))
        data += struct.pack(f"<{len(sequence)}{FORMATS[dtype]}", *sequence)
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(bounds))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    index += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    index += b"".join(struct.pack("<q", bound) for bound in bounds)
    if modes:
        index += bytes(len(sequences))
    prefix.with_suffix(".bin").write_bytes(data)
    prefix.with_suffix(".idx").write_bytes(index)
