"""What is on disk, and how is it read back?

errors.py       damage, told apart from errors that another try may overcome; agreement of processes
digest.py       digests of arrays, JSON values and files
metadata.py     the metadata of checkpoints and exports
folder.py       find, read and check the folder of a checkpoint
manager.py      save and resume in training
params.py       load and save parameters alone
safetensors.py  export to and import from safetensors

`Checkpoints.restore(..., step=)` chooses a checkpoint. `verify=False` skips the comparison of
digests at loading. `allow_nonfinite=True` accepts parameters with NaN or infinity.
"""

from blocktx.checkpoint.digest import file_digest
from blocktx.checkpoint.errors import DamagedError
from blocktx.checkpoint.folder import find_all, has_checkpoint
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
    "DamagedError",
    "file_digest",
    "find_all",
    "has_checkpoint",
    "is_ours",
    "load_config",
    "load_params",
    "load_tokenizer",
    "save_params",
    "tokenizer_file",
    "write",
]
