"""Which tokens are in the batch of step s?

Knows no JAX.

    sources.py     documents of folders, files and packages
    tokenizer.py   tokenizers and special tokens
    corpus.py      tokenized documents
    disk_cache.py  folders in a cache directory, written atomically
    blocks.py      documents packed into blocks and contexts
    pipeline.py    batches by global index, with grain
"""

from blocktx.data.corpus import Corpus, Documents, prepare, read_in_memory
from blocktx.data.pipeline import heldout_batches, heldout_size, text_batches, training_batches
from blocktx.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "Documents",
    "Tokenizer",
    "heldout_batches",
    "heldout_size",
    "prepare",
    "read_in_memory",
    "text_batches",
    "training_batches",
]
