"""Log-probabilities of prompts by one teacher-forced pass, as `blocktx.evaluate.score` places them.

    pad    after block_length - 1 tokens of padding: all tokens but the first are predicted
    force  without padding; the first block, which is not predicted then, comes from a second pass
           with padding

So the tokens after a context of a block or more get the scores of `blocktx.lm_eval`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.decode import Engine, bucket, use_mesh
from blocktx.evaluate import map_logits
from blocktx.model import Model


class PromptScore(NamedTuple):
    """Scores of the tokens of a prompt but the first."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]  # most likely tokens and their log-probabilities


class PromptScorer:
    """Scores one prompt at a time, in programs for buckets of lengths."""

    def __init__(self, engine: Engine, top: int):
        """Prepare the scorer; `top` is the number of most likely tokens."""
        self._engine, self._top = engine, top
        # Prompts are prefilled without reading the cache, so its dtype does not matter.
        formulations = engine.model.formulations
        formulations = dataclasses.replace(formulations, cache_dtype="compute_dtype")
        self._model = engine.model.clone(formulations=formulations)
        self._config = engine.config.model

    @property
    def longest(self) -> int:
        """The largest number of tokens of a prompt."""
        config = self._config
        padding = config.block_length - 1 if self._engine.placement == "pad" else 0
        return config.context_length - padding

    def compile(self) -> None:
        """Compile the programs of all buckets."""
        length = 2
        while length < self.longest:
            self.score([0] * length)
            blocks = self._bucket(length + self._config.block_length - 1)
            length = blocks * self._config.block_length + 1
        self.score([0] * self.longest)

    def score(self, tokens: Sequence[int]) -> PromptScore:
        """Return the scores of a prompt of 2 to `longest` tokens."""
        block = self._config.block_length
        if self._engine.placement == "pad" or block == 1:
            return self._pass(tokens, block - 1)
        first = self._pass(tokens[:block], block - 1)
        if len(tokens) <= block:
            return first
        rest = self._pass(tokens, 0)
        return PromptScore(first.logprobs + rest.logprobs, first.top + rest.top)

    def _pass(self, tokens: Sequence[int], padding: int) -> PromptScore:
        block, engine = self._config.block_length, self._engine
        blocks, end = self._bucket(padding + len(tokens)), padding + len(tokens)
        tokens_T = np.full(blocks * block, engine.tokenizer.pad_id, np.int32)
        tokens_T[padding:end] = tokens
        place_T = np.arange(tokens_T.size)
        mask_T = (padding <= place_T) & (place_T < end)
        shape = (1, blocks, block)
        with use_mesh(engine.mesh):
            scores = _score(
                self._model,
                engine.params,
                tokens_T.reshape(shape),
                mask_T.reshape(shape),
                top=self._top,
            )
        # The result begins with block 1; with padding, its first token is the prompt's second.
        new = slice(0, end - block)
        logprobs_T, ids_TxJ, top_TxJ = (x[new].tolist() for x in jax.device_get(scores))
        top = [list(zip(*pair, strict=True)) for pair in zip(ids_TxJ, top_TxJ, strict=True)]
        return PromptScore(logprobs_T, top)

    def _bucket(self, tokens: int) -> int:
        block = self._config.block_length
        return bucket(max(2, -(-tokens // block)), block, self._config.blocks)


@functools.partial(jax.jit, static_argnames=("model", "top"))
def _score(
    model: Model,
    params: dict[str, Any],
    tokens_1xNxK: jax.Array,
    mask_1xNxK: jax.Array,
    *,
    top: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities `[T]`, most likely tokens `[T, J]` and theirs, from block 1 on."""

    def of_chunk(logits_BxCxKxV: jax.Array, tokens_BxCxK: jax.Array) -> tuple[jax.Array, ...]:
        norm_BxCxK = jax.nn.logsumexp(logits_BxCxKxV, axis=-1)
        own = jnp.take_along_axis(logits_BxCxKxV, tokens_BxCxK[..., None], axis=-1)[..., 0]
        values, ids = jax.lax.top_k(logits_BxCxKxV, top)
        unstacked = (jnp.moveaxis(x, -1, 0) for x in (ids, values - norm_BxCxK[..., None]))
        return own - norm_BxCxK, *map(tuple, unstacked)

    own, ids, values = map_logits(model, params, tokens_1xNxK, mask_1xNxK, of_chunk)
    flat = (jnp.stack(x, axis=-1).reshape(-1, top) for x in (ids, values))
    return own.reshape(-1), *flat
