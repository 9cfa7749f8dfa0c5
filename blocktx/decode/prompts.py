"""Prompts laid out in blocks, in shapes that many calls share: checked, before anything is traced.

A prompt seldom ends where a block does. There are two ways to place it:

    pad    its blocks end with it, and the first of them begins with padding (the paper's way, right
           for models that were trained with random padding)
    force  its blocks begin with it; what follows the last whole block is forced on the token
           decoder, which goes on from there (right for models trained without)

The first block is never predicted, so nothing can be forced there: a prompt shorter than a block is
padded in either way.
"""

import numbers
from collections.abc import Iterable
from typing import Any, Literal

import flax.struct
import numpy as np

from blocktx.config import ModelConfig

Placement = Literal["pad", "force"]


_SMALLEST_BUCKET = 64  # tokens


@flax.struct.dataclass
class Prompts:
    """A batch of prompts and of what is wanted after them, int32 NumPy arrays.

    Each row begins at its block 0, and its tokens are counted from there, padding included. Rows,
    blocks and slots are rounded up to buckets; the rows that this adds are finished from the start.
    """

    tokens_BxNxK: Any
    padding_B: Any  # tokens of padding that the first block begins with
    length_B: Any  # whole blocks
    begin_B: Any  # the place of the first token to draw, behind the prompt
    end_B: Any  # the place behind the last
    slots: int = flax.struct.field(pytree_node=False)  # blocks: N for prompts, others for new ones


def place_prompts(
    tokens_BxT: Any,
    mask_BxT: Any,
    config: ModelConfig,
    *,
    max_new_tokens: int | Iterable[int],
    placement: Placement,
    pad_id: int,
    parts: int = 1,
) -> Prompts:
    """Left-padded prompts in blocks, with room for the new tokens; rows go to `parts` devices.

    Padding that a prompt brings is kept as it is where there is padding, since embedders may see
    it; what is missing is `pad_id`.

    Raises:
      ValueError: on other shapes or types, a row without a token or with padding behind one, a
        token outside the vocabulary, or a row that does not fit the context.
    """
    tokens_BxT, size_B = _checked(tokens_BxT, mask_BxT, config, pad_id)
    if placement not in ("pad", "force"):
        raise ValueError(f"placement: got {placement!r}, must be 'pad' or 'force'")
    new_B = _budgets(max_new_tokens, len(size_B))
    block = config.block_length
    padded_B = (size_B < block) | (placement == "pad")
    padding_B = np.where(padded_B, -size_B % block, 0)
    begin_B = padding_B + size_B
    end_B = begin_B + new_B
    _check_fit(size_B, begin_B, new_B, config, placement)

    blocks = bucket(-(-int(begin_B.max()) // block), block, config.blocks)
    length_B = begin_B // block
    new_blocks = bucket(int((-(-end_B // block) - length_B).max()), block, config.blocks)
    rows = -(-(1 << (len(size_B) - 1).bit_length()) // parts) * parts
    placed_BxT = np.full((rows, blocks * block), pad_id, np.int32)
    for row, (size, padding, begin) in enumerate(zip(size_B, padding_B, begin_B, strict=True)):
        brought = min(padding, tokens_BxT.shape[1] - size)
        text_T = tokens_BxT[row, tokens_BxT.shape[1] - size - brought :]
        placed_BxT[row, begin - text_T.size : begin] = text_T

    def fill(value_B: np.ndarray, filler: int) -> np.ndarray:
        extra = (0, rows - len(value_B))
        return np.pad(value_B, extra, constant_values=filler).astype(np.int32)

    return Prompts(
        tokens_BxNxK=placed_BxT.reshape(rows, blocks, block),
        padding_B=fill(padding_B, 0),
        length_B=fill(length_B, 1),
        begin_B=fill(begin_B, block),
        end_B=fill(end_B, block),
        slots=blocks + new_blocks,
    )


def bucket(blocks: int, block_length: int, most: int) -> int:
    """`blocks` rounded up to a power of two of 64 tokens or more, but to no more than `most`."""
    return min(1 << (max(blocks, _SMALLEST_BUCKET // block_length) - 1).bit_length(), most)


def _checked(
    tokens_BxT: Any, mask_BxT: Any, config: ModelConfig, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, and how many each row has."""
    tokens_BxT, mask_BxT = np.asarray(tokens_BxT), np.asarray(mask_BxT).astype(bool)
    if tokens_BxT.ndim != 2 or tokens_BxT.shape != mask_BxT.shape or not len(tokens_BxT):
        raise ValueError(
            f"tokens {tokens_BxT.shape} and mask {mask_BxT.shape} must both be [batch, length], "
            "with a row or more"
        )
    if not np.issubdtype(tokens_BxT.dtype, np.integer):
        raise ValueError(f"tokens: got {tokens_BxT.dtype}, expected integers")
    size_B = mask_BxT.sum(1)
    columns_T = np.arange(tokens_BxT.shape[1])[::-1]
    for row, size in enumerate(size_B):
        if size == 0:
            raise ValueError(f"row {row} of the prompts has no token; begin with a start token")
        if not (mask_BxT[row] == (columns_T < size)).all():
            raise ValueError(f"row {row} of the mask has padding behind a token; left-pad prompts")
    for token in (tokens_BxT.min(), tokens_BxT.max(), pad_id):
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"tokens: {token} is not in 0..{config.vocab_size - 1} (vocab_size)")
    return tokens_BxT, size_B


def _budgets(max_new_tokens: int | Iterable[int], rows: int) -> np.ndarray:
    given = max_new_tokens
    budgets = list(given) if isinstance(given, Iterable) else [given] * rows
    whole = all(isinstance(budget, numbers.Integral) and budget >= 1 for budget in budgets)
    if not whole or len(budgets) != rows:
        raise ValueError(
            f"max_new_tokens: got {given!r}, must be 1 or greater, and whole: one number or one a "
            f"row ({rows})"
        )
    if max(budgets) >= 2**31:
        raise ValueError(f"max_new_tokens: got {given!r}, must be below 2^31")
    return np.array(budgets, np.int64)


def _check_fit(
    size_B: np.ndarray,
    begin_B: np.ndarray,
    new_B: np.ndarray,
    config: ModelConfig,
    placement: Placement,
) -> None:
    row = int((begin_B + new_B).argmax())
    size, begin, new = size_B[row], begin_B[row], new_B[row]
    block, context = config.block_length, config.context_length
    if begin + new <= context:
        return
    advice, left = [], context - new
    if placement == "pad" or left < block:
        left -= left % block
    if left > 0:
        advice.append(f"keep prompts to {left} tokens")
    if begin < context:
        advice.append(f"ask for at most {context - begin} new tokens")
    raise ValueError(
        f"the prompt of row {row} ({size} tokens) and {new} new tokens do not fit the context of "
        f"{context} tokens, in whole blocks of {block}; {' or '.join(advice) or 'shorten both'}"
    )
