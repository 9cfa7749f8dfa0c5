"""Initial or restored train state, and checks before training."""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from blocktx.checkpoint import Checkpoints, load_params, tokenizer_file
from blocktx.config import RunConfig, UserError, is_storage_full, user_errors
from blocktx.data import PACKING, Corpus, Tokenizer, prepare
from blocktx.model import Model
from blocktx.train.step import TrainState, abstract_state, create_state, state_of


def require_no_run(workdir: epath.Path) -> None:
    """Raise a FileExistsError if `workdir` holds a run."""
    found = [n for n in ("checkpoints", "config.json", "metrics.jsonl") if (workdir / n).exists()]
    if found:
        raise FileExistsError(
            f"{workdir}: there is a run in it ({', '.join(found)}); pass --resume to go on with "
            "it, or choose another workdir"
        )


def require_tokenizer_of_first_params(config: RunConfig) -> None:
    """Raise a UserError if a tokenizer would be trained for parameters that know another."""
    path = config.training.init_from
    if path and config.data.tokenizer == "train" and not tokenizer_file(path).exists():
        raise UserError(
            f"config.training.init_from: there is no {tokenizer_file(path)}, and a newly "
            "trained tokenizer cannot be the one that the parameters know; pass that one, as "
            "--config.data.tokenizer=..."
        )


def prepare_corpus(config: RunConfig) -> Corpus:
    """Return the tokenized corpus.

    Raises:
      FileNotFoundError: the source or the tokenizer does not exist.
      UserError: the documents or the tokenizer cannot be used, or no space is left for them.
    """
    try:
        with user_errors():
            return prepare(config.data, config.model.vocab_size)
    except OSError as error:
        if is_storage_full(error):
            raise UserError(
                f"config.data.cache_dir: no space left in {config.data.cache_dir!r} for the "
                f"tokenized documents ({error}); use another folder"
            ) from error
        raise


def check_special_tokens(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise a UserError if ids in the model's configuration are not the tokenizer's.

    An encoder counts positions over tokens other than `pad_id`, so that must be the token that
    fills blocks. `cls_id` and `bos_id` must not be tokens of text.
    """
    model = config.model
    if model.kind != "block":
        return
    special = {}
    if model.embedder.kind in ("encoder", "cls"):
        encoder = model.embedder.encoder
        if encoder.pad_id != tokenizer.pad_id:
            raise UserError(
                f"config.model.embedder.encoder.pad_id: got {encoder.pad_id}, but the tokenizer's "
                f"{config.data.pad_token!r} is {tokenizer.pad_id}; use {tokenizer.pad_id}"
            )
    if model.embedder.kind == "cls":
        special["embedder.encoder.cls_id"] = model.embedder.encoder.cls_id
    if model.conditioning != "prefix":
        special["bos_id"] = model.bos_id
    for name, token in special.items():
        beyond = token >= tokenizer.vocab_size  # a row that no text uses
        if not beyond and tokenizer.decode([token]):  # special tokens decode to nothing
            raise UserError(
                f"config.model.{name}: {token} is the token of the text "
                f"{tokenizer.decode([token])!r}; use a special token, such as "
                f"{tokenizer.end_id} ({config.data.end_token!r})"
            )


def first_state(config: RunConfig, model: Model, tokenizer: Tokenizer, mesh: Mesh) -> TrainState:
    """Return the state of step 0: new, or with the parameters of `config.training.init_from`."""
    path = config.training.init_from
    if not path:
        return create_state(config, model)
    checkpoint = load_params(path, mesh, model=config.model)
    beside = tokenizer_file(path)
    if beside.exists():
        known = Tokenizer.load(beside, config.data.end_token, config.data.pad_token)
        if known.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"config.training.init_from: the parameters in {path} know another tokenizer than "
                f"config.data gives (tokenizer {config.data.tokenizer!r}); pass "
                f"--config.data.tokenizer={beside}"
            )
    return state_of(checkpoint.params, config)


def resumed_state(
    config: RunConfig,
    corpus: Corpus,
    checkpoints: Checkpoints,
    workdir: epath.Path,
    mesh: Mesh,
    step: int | None = None,
) -> tuple[TrainState, Any]:
    """Return the state of a checkpoint, sharded over `mesh`, and that of its input pipeline.

    `step` is as for `Checkpoints.restore`.
    """
    _require_same_tokenizer(workdir, corpus.tokenizer, config)
    wanted = abstract_state(config, mesh)
    resumed = checkpoints.restore(wanted.params, wanted.opt_state, step)
    if resumed.data.get("packing") != PACKING:
        raise UserError(
            f"{workdir}: the run was saved by a blocktx with another packing of documents, which "
            "cannot be continued; begin a new run with its parameters, by the same command with "
            f"another --workdir, without --resume, with --config.training.init_from={workdir} "
            f"--config.data.tokenizer={workdir / 'tokenizer.json'}"
        )
    if resumed.data.get("corpus") != corpus.digest:
        raise UserError(
            f"config.data.source: {config.data.source!r} has other documents than when the run in "
            f"{workdir} was saved; restore them, or choose another workdir"
        )
    step = jax.device_put(jnp.int32(resumed.step), wanted.step.sharding)
    return TrainState(step, resumed.params, resumed.opt_state), resumed.data["batches"]


def _require_same_tokenizer(workdir: epath.Path, now: Tokenizer, config: RunConfig) -> None:
    path = workdir / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; the run cannot be resumed without it")
    with user_errors():
        saved = Tokenizer.load(path, config.data.end_token, config.data.pad_token)
    if saved.fingerprint != now.fingerprint:
        raise UserError(
            f"{path}: the run was trained with another tokenizer than config.data gives now "
            f"(source {config.data.source!r}, tokenizer {config.data.tokenizer!r}); restore what "
            "has changed there, or choose another workdir"
        )
