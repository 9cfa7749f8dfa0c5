"""Loss of a model on held-out text: in nats, as perplexity, in bits a byte, and by position."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from blocktx.config import RunConfig
from blocktx.data import Corpus, Documents, heldout_batches, heldout_size, text_batches
from blocktx.model import Model, token_losses
from blocktx.parallel import HostRows, batch_parts, constrain


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens."""

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float
    loss_by_position: tuple[float, ...]  # nats a token, for each position in a block
    tokens: int  # that were scored

    def __str__(self) -> str:
        by_position = " ".join(f"{loss:.3f}" for loss in self.loss_by_position)
        return (
            f"loss={self.loss:.4f} perplexity={self.perplexity:.2f} "
            f"bits/byte={self.bits_per_byte:.4f} by position {by_position}"
        )

    def scalars(self) -> dict[str, float]:
        """The values by name, positions counted from 1."""
        by_position = {f"loss_at_{i}": loss for i, loss in enumerate(self.loss_by_position, 1)}
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **by_position,
        }


def evaluate(
    model: Model,
    params: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    bytes_per_token: float,
) -> Evaluation:
    """The loss over `batches`, computed batch by batch and summed in float64.

    Args:
      model: any model of `blocktx.model.build.build`.
      params: its parameters.
      batches: `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`; where they are all of one
        shape, one program is compiled.
      bytes_per_token: UTF-8 bytes of the text over its number of tokens. Bits a byte are the bits
        that the average token costs over that, which does not depend on the tokenizer.

    Raises:
      ValueError: if the batches hold no token that is scored.
    """
    return summary(sums_by_place(model, params, batches), bytes_per_token)


def sums_by_place(
    model: Model, params: dict[str, Any], batches: Iterable[dict[str, np.ndarray]]
) -> np.ndarray:
    """Float64 `[2, N - 1, K]`: nats, and tokens that they are the loss of, by place in a context.

    Entry j is of block j + 1: the first is never predicted. Where a batch has `first`, int32 `[B]`,
    its rows are scored from their block of that number on.
    """
    total_2xMxK = pending_2xMxK = np.zeros((2, model.config.blocks - 1, model.config.block_length))
    for batch in batches:  # read one batch late: the host prepares the next one meanwhile
        sums_2xMxK = _sums(model, params, batch["tokens"], batch["mask"], batch.get("first"))
        total_2xMxK = total_2xMxK + np.asarray(pending_2xMxK)
        pending_2xMxK = sums_2xMxK
    return total_2xMxK + np.asarray(pending_2xMxK)


def summary(sums_2xMxK: np.ndarray, bytes_per_token: float) -> Evaluation:
    """What `sums_by_place` found, as means.

    Raises:
      ValueError: if no token was scored.
    """
    nats_K, count_K = sums_2xMxK.sum(1)
    tokens = int(count_K.sum())
    if tokens == 0:
        raise ValueError("there is nothing to evaluate: no token in the batches is scored")
    loss = float(nats_K.sum() / tokens)
    with np.errstate(invalid="ignore", over="ignore"):  # an unscored position is nan
        return Evaluation(
            loss=loss,
            perplexity=float(np.exp(loss)),
            bits_per_byte=loss / math.log(2) / bytes_per_token,
            loss_by_position=tuple((nats_K / count_K).tolist()),
            tokens=tokens,
        )


@functools.partial(jax.jit, static_argnames="model")
def _sums(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    first_B: jax.Array | None,
) -> jax.Array:
    nats_BxMxK, scored_BxMxK = token_losses(model, params, tokens_BxNxK, mask_BxNxK)
    if first_B is not None:
        blocks_M = jnp.arange(1, tokens_BxNxK.shape[1])
        scored_BxMxK &= (blocks_M >= first_B[:, None])[..., None]
    nats_BxMxK = jnp.where(scored_BxMxK, nats_BxMxK, 0)
    sums_2xMxK = jnp.stack([nats_BxMxK.sum(0), scored_BxMxK.sum(0, dtype=jnp.float32)])
    return constrain(sums_2xMxK, None, None, None)


def text_sums(
    model: Model,
    params: dict[str, Any],
    documents: Documents,
    pad_id: int,
    mesh: Mesh,
    *,
    batch_size: int,
    stride: int | None = None,
) -> np.ndarray:
    """`sums_by_place` of all contexts of documents, over the devices of `mesh`.

    Args:
      model: any model, with `params` over `mesh`, which is set.
      documents: what it is to predict.
      pad_id: the padding token.
      batch_size: contexts at a time, rounded up to what the devices can share. It changes nothing.
      stride: see `blocktx.data.pipeline.text_batches`.

    Raises:
      ValueError: there is no block but the first, or the stride does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, must be 1 or greater")
    parts = batch_parts(mesh)
    host_rows = HostRows(-(-batch_size // parts) * parts, mesh)
    batches = text_batches(
        documents, model.config, pad_id, size=host_rows.size, stride=stride, rows=host_rows.rows
    )
    if batches is None:
        raise ValueError(
            f"the text is {documents.token_count} token{'s' * (documents.token_count > 1)} long "
            "(with its end), which is one block, and the first block is never predicted; use more "
            f"than {model.config.block_length} tokens"
        )
    return sums_by_place(model, params, map(host_rows.place, batches))


def heldout_evaluation(
    config: RunConfig, model: Model, corpus: Corpus, mesh: Mesh
) -> Callable[[int, dict[str, Any]], dict[str, float]] | None:
    """A function of step and parameters that prints the held-out loss and returns it as scalars.

    None, with a warning, if nothing is held out. All processes take part, and the first prints.
    """
    documents = corpus.heldout
    host_rows = HostRows(heldout_size(config), mesh)
    batches = heldout_batches(documents, config, corpus.tokenizer.pad_id, host_rows.rows)
    if batches is None:
        print(
            "warning: no held-out text to evaluate on "
            f"(config.data.holdout_every is {config.data.holdout_every})",
            flush=True,
        )
        return None

    def evaluate_heldout(step: int, params: dict[str, Any]) -> dict[str, float]:
        bytes_per_token = documents.text_bytes / documents.token_count
        evaluation = evaluate(model, params, map(host_rows.place, batches), bytes_per_token)
        if jax.process_index() == 0:
            tqdm.write(f"held-out step={step} {evaluation}")  # to stdout, above the bar
            sys.stdout.flush()
        return {f"heldout/{name}": value for name, value in evaluation.scalars().items()}

    return evaluate_heldout
