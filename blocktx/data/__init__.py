"""Which tokens are in the batch of step s?

Knows no JAX. Reading order:

    sources.py      sources, their parts and documents:
      source_files.py   which files a source consists of
      text_files.py   text and JSON Lines, plain or compressed
      tables.py       Parquet, ArrayRecord, Hugging Face datasets
      megatron.py     Megatron's .bin/.idx, and synthetic tokens
    tokenizer.py    text to token ids and back
    tokenizer_files.py  tokenizer.json and the files beside it
    preparation.py  sources tokenized into a prepared folder, on several processes and hosts:
      tokenize_part.py, preparation_workers.py, preparation_progress.py, folder_lock.py
    manifest.py     what is in a prepared folder
    shards.py       its files of tokens, written whole and read by position
    disk_cache.py   folders in a cache directory, written atomically
    documents.py    documents by number, divided into training and held-out ones
    corpus.py       the data of a run
    blocks.py       documents packed into blocks and contexts
    pipeline.py     batches by global index, with grain
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blocktx.data.corpus import PACKING, Corpus, prepare, read_in_memory, train_tokenizer
    from blocktx.data.documents import Documents
    from blocktx.data.pipeline import (
        heldout_batches,
        heldout_size,
        sources_seen,
        text_batches,
        training_batches,
    )
    from blocktx.data.preparation import prepare_folder
    from blocktx.data.sources import parse_sources
    from blocktx.data.tokenizer import Tokenizer
    from blocktx.data.tokenizer_files import copy_tokenizer, read_tokenizer_files

__all__ = [
    "PACKING",
    "Corpus",
    "Documents",
    "Tokenizer",
    "copy_tokenizer",
    "heldout_batches",
    "heldout_size",
    "parse_sources",
    "prepare",
    "prepare_folder",
    "read_in_memory",
    "read_tokenizer_files",
    "sources_seen",
    "text_batches",
    "train_tokenizer",
    "training_batches",
]

# grain imports JAX: the processes of a preparation need neither.
_MODULES = {
    "corpus": ("PACKING", "Corpus", "prepare", "read_in_memory", "train_tokenizer"),
    "documents": ("Documents",),
    "pipeline": (
        "heldout_batches",
        "heldout_size",
        "sources_seen",
        "text_batches",
        "training_batches",
    ),
    "preparation": ("prepare_folder",),
    "sources": ("parse_sources",),
    "tokenizer": ("Tokenizer",),
    "tokenizer_files": ("copy_tokenizer", "read_tokenizer_files"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"blocktx.data.{module}"), name)
    raise AttributeError(f"module 'blocktx.data' has no attribute {name!r}")
