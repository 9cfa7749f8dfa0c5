"""How do devices and processes share the work?

backend.py      the backend of the scripts
gpu.py          settings of a run on GPUs
sharding.py     the device mesh and the logical-axis rules
distributed.py  multi-process initialization and exit
google_vm.py    queries to the Google Cloud VM metadata server
host_rows.py    the rows of a batch that a process reads
"""

from blocktx.parallel.backend import choose_backend
from blocktx.parallel.distributed import HEARTBEAT_TIMEOUT, MODES, exit_process, initialize
from blocktx.parallel.google_vm import is_google_vm, metadata
from blocktx.parallel.gpu import prepare_gpu
from blocktx.parallel.host_rows import HostRows
from blocktx.parallel.sharding import (
    BATCH_AXES,
    MESH_AXES,
    axis_parts,
    batch_parts,
    batch_sharding,
    check_model_fits,
    constrain,
    create_mesh,
    replicated,
    spec,
)

__all__ = [
    "BATCH_AXES",
    "HEARTBEAT_TIMEOUT",
    "MESH_AXES",
    "MODES",
    "HostRows",
    "axis_parts",
    "batch_parts",
    "batch_sharding",
    "check_model_fits",
    "choose_backend",
    "constrain",
    "create_mesh",
    "exit_process",
    "initialize",
    "is_google_vm",
    "metadata",
    "prepare_gpu",
    "replicated",
    "spec",
]
