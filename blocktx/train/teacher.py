"""The teacher of distillation: checks before a run, parameters, and what of it a step needs."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from blocktx.checkpoint import load_config, load_params, tokenizer_file
from blocktx.config import RunConfig, UserError, VanillaConfig
from blocktx.data import Tokenizer
from blocktx.model import abstract_params, build
from blocktx.parallel import check_model_fits
from blocktx.train.distill import Teacher, hidden_layer, uses_teacher
from blocktx.train.optimizer import multipliers


def check_distillation(config: RunConfig, mesh: Mesh) -> None:
    """Check teacher, stages and multipliers of a run. Reads the teacher's configuration alone.

    Raises:
      UserError: a pattern of multipliers has no effect; or the teacher is not a vanilla model,
        differs in vocabulary, reads shorter contexts, lacks the layer or width that hidden states
        are compared at, or does not fit the mesh. All that is wrong with the teacher is listed.
      FileNotFoundError: there is no checkpoint of a teacher.
    """
    params = abstract_params(config.model, mesh)
    for stage in range(len(config.distill.stages)):
        multipliers(params, config, stage)
    if not config.distill.teacher:
        return
    path, model, student = config.distill.teacher, _saved_model(config), config.model
    if model.kind != "vanilla":
        raise UserError(f"config.distill.teacher: {path} is a {model.kind} model, must be vanilla")
    problems = []
    if model.vocab_size != student.vocab_size:
        problems.append(
            f"config.distill.teacher: vocab_size {model.vocab_size}, config.model.vocab_size "
            f"{student.vocab_size}; both must read the same tokens"
        )
    if model.context_length < student.context_length:
        problems.append(
            f"config.distill.teacher: its context_length {model.context_length} is below "
            f"config.model.context_length {student.context_length}; use at most that"
        )
    if any(stage.hidden_weight for stage in config.distill.stages):
        problems += _hidden_problems(config, model)
    if problems:
        raise UserError("\n".join([*problems, f"(the teacher is {path})"]))
    try:
        check_model_fits(model, mesh)
    except ValueError as error:
        raise UserError(f"config.distill.teacher: {path}: {error}") from error


def load_teacher(config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> Teacher | None:
    """Return the teacher with its parameters sharded over `mesh`; None if no step runs it.

    Its parameters have the student's compute dtype: they are never updated.

    Raises:
      UserError: its tokenizer is not this run's, or unknown.
      ValueError, FileNotFoundError: as `blocktx.checkpoint.load_params`.
    """
    if not config.distill.teacher:
        return None
    _require_same_tokenizer(config, tokenizer)
    if not _runs(config):
        return None
    model = _frozen_model(config)
    return Teacher(load_params(config.distill.teacher, mesh, model=model).params, build(model))


def abstract_teacher(config: RunConfig, mesh: Mesh | AbstractMesh) -> Teacher | None:
    """Return `load_teacher`'s result with ShapeDtypeStructs, without reading parameters."""
    if not config.distill.teacher or not _runs(config):
        return None
    model = _frozen_model(config)
    return Teacher(abstract_params(model, mesh), build(model))


def _runs(config: RunConfig) -> bool:
    return not config.distill.cache and any(map(uses_teacher, config.distill.stages))


def _saved_model(config: RunConfig) -> VanillaConfig:
    return load_config(config.distill.teacher)[2].model


def _frozen_model(config: RunConfig) -> VanillaConfig:
    """Return the teacher's model with the student's execution choices, and nothing recomputed."""
    student = config.model
    return dataclasses.replace(
        _saved_model(config),
        compute_dtype=student.compute_dtype,
        param_dtype=student.compute_dtype,
        platform=student.platform,
        formulations=student.formulations,
        remat="none",
    )


def _hidden_problems(config: RunConfig, model: VanillaConfig) -> list[str]:
    layer, layers = hidden_layer(config.distill, config.model), model.decoder.layers
    student, problems = config.model, []
    if layer > layers:
        default = "" if config.distill.hidden_layer else ", the depth of the block decoder,"
        problems.append(
            f"config.distill.hidden_layer: {layer}{default} is more than the teacher's {layers} "
            f"layers; use 1 to {layers}"
        )
    if student.context_width != model.decoder.width:
        problems.append(
            f"config.distill.stages: hidden_weight compares context embeddings of width "
            f"{student.context_width} (block_decoder.width x embeddings_per_block) with hidden "
            f"states of width {model.decoder.width}; use a teacher of the same width, or "
            "hidden_weight 0"
        )
    return problems


def _require_same_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    path = config.distill.teacher
    file = tokenizer_file(path)
    if not file.exists():
        if config.data.tokenizer == "train":
            raise UserError(
                f"config.distill.teacher: there is no {file}, and a newly trained tokenizer cannot "
                "be the teacher's; pass the teacher's, as --config.data.tokenizer=..."
            )
        return
    known = Tokenizer.load(file, config.data.end_token, config.data.pad_token)
    if known.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"config.distill.teacher: {path} was trained with another tokenizer than config.data "
            f"gives (tokenizer {config.data.tokenizer!r}); pass --config.data.tokenizer={file}"
        )
