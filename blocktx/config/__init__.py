"""How is a model and a run described?

errors.py  the error for mistakes that only a person can correct
model.py   frozen dataclasses of a model
run.py     frozen dataclasses of a run; conversion from and to ConfigDicts
saved.py   configurations in files, of this version and older ones
"""

from blocktx.config.errors import UserError, is_storage_full, user_errors
from blocktx.config.model import (
    BlockConfig,
    EmbedderConfig,
    EncoderConfig,
    FieldError,
    ModelConfig,
    StackConfig,
    VanillaConfig,
    divisors,
)
from blocktx.config.run import (
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    from_config_dict,
    to_config_dict,
    to_dict,
)
from blocktx.config.saved import FORMAT_VERSION, from_saved, portable, to_saved

__all__ = [
    "FORMAT_VERSION",
    "BlockConfig",
    "DataConfig",
    "EmbedderConfig",
    "EncoderConfig",
    "FieldError",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "StackConfig",
    "TrainingConfig",
    "UserError",
    "VanillaConfig",
    "divisors",
    "from_config_dict",
    "from_saved",
    "is_storage_full",
    "portable",
    "to_config_dict",
    "to_dict",
    "to_saved",
    "user_errors",
]
