"""What a run begins with, and all that has to fit before it does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from blocktx.checkpoint import Checkpoints, load_params, tokenizer_file
from blocktx.config import RunConfig
from blocktx.data import PACKING, Corpus, Tokenizer
from blocktx.model import Model
from blocktx.train.step import TrainState, abstract_state, create_state, state_of


def require_no_run(workdir: epath.Path) -> None:
    found = [n for n in ("checkpoints", "config.json", "metrics.jsonl") if (workdir / n).exists()]
    if found:
        raise FileExistsError(
            f"{workdir}: there is a run in it ({', '.join(found)}); pass --resume to go on with "
            "it, or choose another workdir"
        )


def require_tokenizer_of_first_params(config: RunConfig) -> None:
    path = config.training.init_from
    if path and config.data.tokenizer == "train" and not tokenizer_file(path).exists():
        raise ValueError(
            f"config.training.init_from: there is no {tokenizer_file(path)}, and a newly "
            "trained tokenizer cannot be the one that the parameters know; pass that one, as "
            "--config.data.tokenizer=..."
        )


def first_state(config: RunConfig, model: Model, tokenizer: Tokenizer, mesh: Mesh) -> TrainState:
    """The state of step 0: new, or with the parameters of `config.training.init_from`."""
    path = config.training.init_from
    if not path:
        return create_state(config, model)
    checkpoint = load_params(path, mesh, model=config.model)
    beside = tokenizer_file(path)
    if beside.exists():
        known = Tokenizer.load(beside, config.data.end_token, config.data.pad_token)
        if known.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"config.training.init_from: the parameters in {path} know another tokenizer than "
                f"config.data gives (tokenizer {config.data.tokenizer!r}); pass "
                f"--config.data.tokenizer={beside}"
            )
    return state_of(checkpoint.params, config)


def resumed_state(
    config: RunConfig, corpus: Corpus, checkpoints: Checkpoints, workdir: epath.Path, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state of the newest checkpoint, over `mesh`, and that of its input pipeline."""
    _require_same_tokenizer(workdir, corpus.tokenizer, config)
    wanted = abstract_state(config, mesh)
    resumed = checkpoints.restore(wanted.params, wanted.opt_state)
    if resumed.data.get("packing") != PACKING:
        raise ValueError(
            f"{workdir}: the run was saved by a blocktx with another packing of documents, which "
            "cannot be continued; begin a new run with its parameters: "
            f"--config.training.init_from={workdir}"
        )
    if resumed.data.get("corpus") != corpus.digest:
        raise ValueError(
            f"config.data.source: {config.data.source!r} has other documents than when the run in "
            f"{workdir} was saved; restore them, or choose another workdir"
        )
    step = jax.device_put(jnp.int32(resumed.step), wanted.step.sharding)
    return TrainState(step, resumed.params, resumed.opt_state), resumed.data["batches"]


def _require_same_tokenizer(workdir: epath.Path, now: Tokenizer, config: RunConfig) -> None:
    path = workdir / "tokenizer.json"
    saved = Tokenizer.load(path, config.data.end_token, config.data.pad_token)
    if saved.fingerprint != now.fingerprint:
        raise ValueError(
            f"{path}: the run was trained with another tokenizer than config.data gives now "
            f"(source {config.data.source!r}, tokenizer {config.data.tokenizer!r}); restore what "
            "has changed there, or choose another workdir"
        )


def require_same_corpus_everywhere(corpus: Corpus) -> None:
    """Raises a ValueError, in all processes, if they have read different documents.

    All processes have to come here: until then none may leave traces in the run's folder.
    """
    mine = np.frombuffer(bytes.fromhex(corpus.digest), np.uint8)
    digests = multihost_utils.process_allgather(mine).reshape(jax.process_count(), -1)
    others = np.flatnonzero((digests != digests[0]).any(1))
    if others.size:
        raise ValueError(
            "config.data: the processes have read different documents: those of process "
            f"{', '.join(map(str, others))} are not those of process 0; give all hosts the same "
            "files and tokenizer"
        )
