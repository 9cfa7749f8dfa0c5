"""Which tokens are in the batch of step s?

Knows no JAX.

    sources.py     documents of folders, files and packages
    tokenizer.py   text to token ids and back
    tokenizer_files.py  tokenizer.json and the files beside it
    corpus.py      tokenized documents
    disk_cache.py  folders in a cache directory, written atomically
    blocks.py      documents packed into blocks and contexts
    pipeline.py    batches by global index, with grain
"""

from blocktx.data.corpus import Corpus, Documents, prepare, read_in_memory
from blocktx.data.pipeline import heldout_batches, heldout_size, text_batches, training_batches
from blocktx.data.tokenizer import Tokenizer
from blocktx.data.tokenizer_files import copy_tokenizer, read_tokenizer_files

__all__ = [
    "Corpus",
    "Documents",
    "Tokenizer",
    "copy_tokenizer",
    "heldout_batches",
    "heldout_size",
    "prepare",
    "read_in_memory",
    "read_tokenizer_files",
    "text_batches",
    "training_batches",
]
