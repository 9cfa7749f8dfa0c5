"""How is a model and a run described?

distill.py frozen dataclasses of distillation
errors.py  the error for mistakes that only a person can correct
model.py   frozen dataclasses of a model
run.py     frozen dataclasses of a run; conversion from and to ConfigDicts
saved.py   configurations in files, of this version and older ones
"""

from blocktx.config.distill import DistillConfig, Multipliers, StageConfig
from blocktx.config.errors import UserError, user_errors
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
    "DistillConfig",
    "EmbedderConfig",
    "EncoderConfig",
    "FieldError",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "Multipliers",
    "OptimizerConfig",
    "RunConfig",
    "StackConfig",
    "StageConfig",
    "TrainingConfig",
    "UserError",
    "VanillaConfig",
    "divisors",
    "from_config_dict",
    "from_saved",
    "portable",
    "to_config_dict",
    "to_dict",
    "to_saved",
    "user_errors",
]
