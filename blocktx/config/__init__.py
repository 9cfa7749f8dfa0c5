"""How is a model and a run described?

fields.py  checks that every config class applies to its fields
model.py   frozen dataclasses of a model
run.py     frozen dataclasses of a run; conversion from and to ConfigDicts
"""

from blocktx.config.fields import FieldError, check_fields, divisors
from blocktx.config.model import (
    BlockConfig,
    EmbedderConfig,
    EncoderConfig,
    ModelConfig,
    StackConfig,
    VanillaConfig,
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

__all__ = [
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
    "VanillaConfig",
    "check_fields",
    "divisors",
    "from_config_dict",
    "to_config_dict",
    "to_dict",
]
