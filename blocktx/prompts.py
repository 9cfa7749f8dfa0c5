"""Prompts in whole blocks: checked, before anything is traced."""

import numbers
from typing import Any

import numpy as np

from blocktx.model_config import ModelConfig


def in_blocks(
    tokens_BxT: Any, mask_BxT: Any, config: ModelConfig, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts in as few whole blocks as hold the longest: int32, bool `[B, N, K]`.

    What is missing to whole blocks is added in front: tokens `pad_id`, mask False. Padding that a
    prompt brings is kept as it is, since embedders may see it.

    Raises:
      ValueError: on other shapes or types, a row without a token or with padding behind one, or a
        token outside the vocabulary.
    """
    tokens_BxT, mask_BxT = np.asarray(tokens_BxT), np.asarray(mask_BxT).astype(bool)
    if tokens_BxT.ndim != 2 or tokens_BxT.shape != mask_BxT.shape or not len(tokens_BxT):
        raise ValueError(
            f"tokens {tokens_BxT.shape} and mask {mask_BxT.shape} must both be [batch, length], "
            "with a row or more"
        )
    if not np.issubdtype(tokens_BxT.dtype, np.integer):
        raise ValueError(f"tokens: got {tokens_BxT.dtype}, expected integers")
    length_B = mask_BxT.sum(1)
    columns_T = np.arange(tokens_BxT.shape[1])[::-1]
    for row, length in enumerate(length_B):
        if length == 0:
            raise ValueError(f"row {row} of the prompts has no token; begin with a start token")
        if not (mask_BxT[row] == (columns_T < length)).all():
            raise ValueError(f"row {row} of the mask has padding behind a token; left-pad prompts")
    for token in (tokens_BxT.min(), tokens_BxT.max(), pad_id):
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"tokens: {token} is not in 0..{config.vocab_size - 1} (vocab_size)")
    count = -(-int(length_B.max()) // config.block_length)
    width = count * config.block_length
    missing = ((0, 0), (max(width - tokens_BxT.shape[1], 0), 0))
    shape = (len(tokens_BxT), count, config.block_length)
    tokens_BxT = tokens_BxT[:, -width:].astype(np.int32)
    return (
        np.pad(tokens_BxT, missing, constant_values=pad_id).reshape(shape),
        np.pad(mask_BxT[:, -width:], missing).reshape(shape),
    )


def blocks_that_fit(mask_BxNxK: np.ndarray, config: ModelConfig, max_new_tokens: int) -> int:
    """The number of blocks that hold `max_new_tokens`.

    Raises:
      ValueError: the longest prompt and they do not fit the context, or there are none.
    """
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, must be 1 or greater")
    length, blocks, prompt_blocks = config.block_length, config.blocks, mask_BxNxK.shape[1]
    new_blocks = -(-max_new_tokens // length)
    if prompt_blocks + new_blocks <= blocks:
        return new_blocks
    advice = []
    if new_blocks < blocks:
        advice.append(f"keep prompts to {(blocks - new_blocks) * length} tokens")
    if prompt_blocks < blocks:
        advice.append(f"ask for at most {(blocks - prompt_blocks) * length} new tokens")
    longest_B = mask_BxNxK.sum((1, 2))
    raise ValueError(
        f"the prompt of row {longest_B.argmax()} ({longest_B.max()} tokens) and {max_new_tokens} "
        f"new tokens do not fit the context of {config.context_length} tokens, in whole blocks of "
        f"{length}; {' or '.join(advice) or 'shorten both'}"
    )
