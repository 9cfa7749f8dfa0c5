"""What is on disk, and how is it read back?

folder.py       the layout of checkpoints, metadata and checks
manager.py      save and resume in training
params.py       load and save parameters alone
safetensors.py  export to and import from safetensors
"""

from blocktx.checkpoint.folder import has_checkpoint
from blocktx.checkpoint.manager import Checkpoints
from blocktx.checkpoint.params import (
    Checkpoint,
    load_config,
    load_params,
    load_tokenizer,
    save_params,
    tokenizer_file,
)
from blocktx.checkpoint.safetensors import is_ours, write

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "has_checkpoint",
    "is_ours",
    "load_config",
    "load_params",
    "load_tokenizer",
    "save_params",
    "tokenizer_file",
    "write",
]
