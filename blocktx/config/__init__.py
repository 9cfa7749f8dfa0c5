"""How is a model and a run described?

errors.py      the error for mistakes that only a person can correct
fields.py      checks that every config class applies to its fields
stack.py       frozen dataclasses of a stack of layers
formulations.py  how operations are computed on a backend
model.py       frozen dataclasses of a model
distill.py     frozen dataclasses of distillation
run.py         frozen dataclasses of a run
conversion.py  conversion from and to ConfigDicts and plain dicts
saved.py       configurations in files, of this version and older ones
"""

from blocktx.config.conversion import from_config_dict, to_config_dict, to_dict
from blocktx.config.distill import DistillConfig, Multipliers, StageConfig
from blocktx.config.errors import UserError, is_storage_full, user_errors
from blocktx.config.fields import FieldError, check_fields, divisors
from blocktx.config.formulations import Formulations
from blocktx.config.model import (
    BlockConfig,
    EmbedderConfig,
    EncoderConfig,
    ModelConfig,
    VanillaConfig,
    with_cache_dtype,
)
from blocktx.config.run import (
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from blocktx.config.saved import FORMAT_VERSION, from_saved, to_saved, without_execution
from blocktx.config.stack import RotaryScaling, StackConfig

__all__ = [
    "FORMAT_VERSION",
    "BlockConfig",
    "DataConfig",
    "DistillConfig",
    "EmbedderConfig",
    "EncoderConfig",
    "FieldError",
    "Formulations",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "Multipliers",
    "OptimizerConfig",
    "RotaryScaling",
    "RunConfig",
    "StackConfig",
    "StageConfig",
    "TrainingConfig",
    "UserError",
    "VanillaConfig",
    "check_fields",
    "divisors",
    "from_config_dict",
    "from_saved",
    "is_storage_full",
    "to_config_dict",
    "to_dict",
    "to_saved",
    "user_errors",
    "with_cache_dtype",
    "without_execution",
]
