"""How is a model and a run described?

model.py  frozen dataclasses of a model
run.py    frozen dataclasses of a run; conversion from and to ConfigDicts
"""

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
    "divisors",
    "from_config_dict",
    "to_config_dict",
    "to_dict",
]
