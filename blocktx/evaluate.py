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
from blocktx.data.corpus import Corpus
from blocktx.data.host_rows import HostRows
from blocktx.data.pipeline import heldout_batches, heldout_size
from blocktx.loss import position_sums
from blocktx.model import Model
from blocktx.sharding import constrain


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
      model: any model of `blocktx.model.build`.
      params: its parameters.
      batches: `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`; where they are all of one
        shape, one program is compiled.
      bytes_per_token: UTF-8 bytes of the text over its number of tokens. Bits a byte are the bits
        that the average token costs over that, which does not depend on the tokenizer.

    Raises:
      ValueError: if the batches hold no token that is scored.
    """
    total_2xK = np.zeros((2, model.config.block_length))
    pending_2xK = total_2xK  # read one batch late: the host prepares the next one meanwhile
    for batch in batches:
        sums_2xK = _sums(model, params, batch["tokens"], batch["mask"])
        total_2xK = total_2xK + np.asarray(pending_2xK)
        pending_2xK = sums_2xK
    nats_K, count_K = total_2xK + np.asarray(pending_2xK)
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
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> jax.Array:
    sums_2xK = jnp.stack(position_sums(model, params, tokens_BxNxK, mask_BxNxK))
    return constrain(sums_2xK, None, None)


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
        bytes_per_token = documents.text_bytes / len(documents.tokens)
        evaluation = evaluate(model, params, map(host_rows.place, batches), bytes_per_token)
        if jax.process_index() == 0:
            tqdm.write(f"held-out step={step} {evaluation}")  # to stdout, above the bar
            sys.stdout.flush()
        return {f"heldout/{name}": value for name, value in evaluation.scalars().items()}

    return evaluate_heldout
