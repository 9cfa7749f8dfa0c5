"""Configurations in files: complete when written, complete or refused when read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blocktx.config.conversion import build_config, to_dict
from blocktx.config.formulations import AUTO
from blocktx.config.run import RunConfig

FORMAT_VERSION = 2  # 1: without digests, and with the fields of _FORMAT_1 only

# Fields of the model that choose kernels for a backend. A saved config leaves them to its reader.
_EXECUTION = {"platform": "auto", "formulations": dataclasses.asdict(AUTO)}

# Fields of each class that a file of format 1 has. Other fields, and other classes, are newer.
_FORMAT_1 = {
    "RunConfig": "model data optimizer loss training mesh seed",
    "BlockConfig": "vocab_size context_length initializer_range param_dtype compute_dtype "
    "scan_layers remat platform kind block_length embeddings_per_block embedder block_decoder "
    "token_decoder conditioning prefix_length bos_id",
    "VanillaConfig": "vocab_size context_length initializer_range param_dtype compute_dtype "
    "scan_layers remat platform kind decoder",
    "StackConfig": "layers width heads mlp_width rotary_fraction rotary_base",
    "EncoderConfig": "layers width heads mlp_width positions pad_id cls_id",
    "EmbedderConfig": "kind width cls_tokens concatenate encoder",
    "DataConfig": "source text_field tokenizer end_token pad_token holdout_every random_padding "
    "cache_dir",
    "OptimizerConfig": "name learning_rate schedule warmup_steps final_fraction beta1 beta2 eps "
    "moment_dtype weight_decay clip_norm",
    "LossConfig": "block_decoding block_decoding_weight auto_encoding auto_encoding_weight",
    "TrainingConfig": "steps batch_size microbatches log_every evaluate_every checkpoint_every "
    "keep_checkpoints init_from",
    "MeshConfig": "data fsdp tensor",
}

# "Class.field" -> the first format that has it, for fields that are newer than format 2.
_ADDED: dict[str, int] = {}


def to_saved(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested dicts for JSON, without the choices of this machine."""
    saved = to_dict(config)
    saved["model"] |= _EXECUTION
    return saved


def from_saved(saved: Mapping[str, Any], format_version: int) -> RunConfig:
    """Return the RunConfig of a file that `to_saved` or an older version has written.

    Fields that the file's version did not have get their defaults, which describe what that version
    did. Execution choices in the file are ignored.

    Args:
      saved: the nested dicts.
      format_version: the format of the file.

    Raises:
      UserError: a field that the file's version had is missing, or as `from_config_dict`.
    """

    def has(cls: type, field: str) -> bool:
        if field in _FORMAT_1.get(cls.__name__, "").split():
            return True
        return _ADDED.get(f"{cls.__name__}.{field}", 2) <= format_version

    return build_config(_portable(saved), has)


def without_execution(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nested dicts of a config without the fields of execution choices."""
    model = saved.get("model") if isinstance(saved, Mapping) else None
    if not isinstance(model, Mapping):
        return saved
    return {**saved, "model": {k: x for k, x in model.items() if k not in _EXECUTION}}


def _portable(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nested dicts of a config with execution choices at their defaults."""
    model = saved.get("model") if isinstance(saved, Mapping) else None
    if not isinstance(model, Mapping):
        return saved
    auto = {name: value for name, value in _EXECUTION.items() if name in model}
    return {**saved, "model": {**model, **auto}}
