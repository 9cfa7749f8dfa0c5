"""Loss of a model on text: in nats, as perplexity, in bits per byte, and by position."""

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from blocktx.config import RunConfig
from blocktx.data import Corpus, Documents, heldout_batches, heldout_size, text_batches
from blocktx.evaluate.next_logits import cross_entropy, map_logits
from blocktx.model import Model, loss_mask
from blocktx.parallel import HostRows, batch_parts, constrain


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    loss_by_position: tuple[float, ...]  # nats per token, for each position in a block
    tokens: int  # scored ones

    def __str__(self) -> str:
        by_position = " ".join(f"{loss:.3f}" for loss in self.loss_by_position)
        return (
            f"loss={self.loss:.4f} perplexity={self.perplexity:.2f} "
            f"bits/byte={self.bits_per_byte:.4f} by position {by_position}"
        )

    def scalars(self) -> dict[str, float]:
        """Return the values by name, positions counted from 1."""
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
    """Return the loss over `batches`, summed in float64.

    Args:
      model: a block or vanilla model.
      params: its parameters.
      batches: `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`. One program is compiled for
        each shape.
      bytes_per_token: UTF-8 bytes of the text divided by its number of tokens. Bits per byte are
        the bits of the average token divided by it. They do not depend on the tokenizer.

    Raises:
      ValueError: no token in the batches is scored.
    """
    return summary(sums_by_place(model, params, batches), bytes_per_token)


def sums_by_place(
    model: Model, params: dict[str, Any], batches: Iterable[dict[str, np.ndarray]]
) -> np.ndarray:
    """Return the last of `running_sums`."""
    return _last(running_sums(model, params, batches), default=_no_sums(model))


def running_sums(
    model: Model, params: dict[str, Any], batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[np.ndarray]:
    """Yield sums over the batches so far, by position in a context, once for each batch.

    Each is float64 `[3, N - 1, K]`: the cross-entropy of the scored tokens in nats, the number of
    these tokens, and the squares of their cross-entropies. Entry j is of block j + 1, because the
    first block is never predicted. If a batch has `first`, int32 `[B]`, row b is scored from block
    `first[b]` on.
    """
    total_3xMxK, pending_3xMxK = _no_sums(model), None
    for batch in batches:  # read one batch late: the host prepares the next one meanwhile
        sums_3xMxK = _sums(model, params, batch["tokens"], batch["mask"], batch.get("first"))
        if pending_3xMxK is not None:
            total_3xMxK = total_3xMxK + np.asarray(pending_3xMxK)
            yield total_3xMxK
        pending_3xMxK = sums_3xMxK
    if pending_3xMxK is not None:
        yield total_3xMxK + np.asarray(pending_3xMxK)


def _last(sums: Iterable[np.ndarray], default: np.ndarray | None = None) -> np.ndarray:
    kept = collections.deque(sums, maxlen=1)
    return kept[0] if kept else default


def _no_sums(model: Model) -> np.ndarray:
    return np.zeros((3, model.config.blocks - 1, model.config.block_length))


def summary(sums_3xMxK: np.ndarray, bytes_per_token: float) -> Evaluation:
    """Return the means of sums of `running_sums`.

    Raises:
      ValueError: no token was scored.
    """
    nats_K, count_K = sums_3xMxK[:2].sum(1)
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
    mask_BxNxK = mask_BxNxK.astype(bool)
    scored_BxMxK = loss_mask(mask_BxNxK)
    if first_B is not None:
        blocks_M = jnp.arange(1, tokens_BxNxK.shape[1])
        scored_BxMxK &= (blocks_M >= first_B[:, None])[..., None]
    nats_BxMxK = map_logits(model, params, tokens_BxNxK, mask_BxNxK, cross_entropy)
    nats_BxMxK = jnp.where(scored_BxMxK, nats_BxMxK, 0)
    sums_3xMxK = jnp.stack(
        [
            nats_BxMxK.sum(0),
            scored_BxMxK.sum(0, dtype=jnp.float32),
            jnp.square(nats_BxMxK).sum(0),
        ]
    )
    return constrain(sums_3xMxK, None, None, None)


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
    """Return the last of `running_text_sums`."""
    options = dict(batch_size=batch_size, stride=stride)
    return _last(running_text_sums(model, params, documents, pad_id, mesh, **options))


def running_text_sums(
    model: Model,
    params: dict[str, Any],
    documents: Documents,
    pad_id: int,
    mesh: Mesh,
    *,
    batch_size: int,
    stride: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield `running_sums` over all contexts of documents, computed by the devices of `mesh`.

    Args:
      model: a block or vanilla model. `mesh` is set, and `params` are on it.
      params: its parameters.
      documents: the text to predict.
      pad_id: the padding token.
      mesh: the devices.
      batch_size: contexts in a batch, rounded up to a multiple of the data-parallel devices. It
        does not change the sums.
      stride: see `blocktx.data.text_batches`.

    Raises:
      ValueError: the text has no second block, or the stride does not fit.
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
    return running_sums(model, params, map(host_rows.place, batches))


def heldout_evaluation(
    config: RunConfig, model: Model, corpus: Corpus, mesh: Mesh
) -> Callable[[int, dict[str, Any]], dict[str, float]] | None:
    """Return a function of step and parameters that prints and returns the held-out loss.

    All processes call it, and the first prints. It returns scalars by name. Returns None and prints
    a warning if no text is held out.
    """
    documents = corpus.heldout
    host_rows = HostRows(heldout_size(config), mesh)
    batches = heldout_batches(documents, config, corpus.tokenizer.pad_id, host_rows.rows)
    if batches is None:
        if jax.process_index() == 0:
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
