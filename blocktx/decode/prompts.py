"""Prompts laid out in blocks, in bucketed shapes that many calls share.

A prompt rarely ends on a block boundary. There are two placements:

    pad    the prompt ends on a boundary; its first block begins with padding (as in the paper, for
           models trained with random padding)
    force  the prompt begins on a boundary; the tokens after its last whole block are forced on the
           token decoder, which continues from there (for models trained without padding)

The first block is never predicted, so nothing can be forced there: a prompt shorter than a block is
padded with both placements.
"""

import numbers
from collections.abc import Iterable
from typing import Any, Literal

import flax.struct
import numpy as np

from blocktx.config import ModelConfig
from blocktx.decode.sampling import to_python

Placement = Literal["pad", "force"]


_SMALLEST_BUCKET = 64  # tokens


@flax.struct.dataclass
class Prompts:
    """A batch of prompts with their budgets, as int32 NumPy arrays.

    A row's tokens are counted from its block 0, padding included. Rows, blocks and cache slots are
    rounded up to buckets. Rows added by rounding are finished from the start.
    """

    tokens_BxNxK: Any
    padding_B: Any  # tokens of padding at the start of block 0
    length_B: Any  # whole blocks
    begin_B: Any  # index of the first token to draw, after the prompt
    end_B: Any  # index after the last
    cache_blocks: int = flax.struct.field(pytree_node=False)  # N for prompts, the rest for new ones


def layout_prompts(
    tokens_BxT: Any,
    mask_BxT: Any,
    config: ModelConfig,
    *,
    max_new_tokens: int | Iterable[int],
    placement: Placement,
    pad_id: int,
    parts: int = 1,
    first_row: int = 0,
) -> Prompts:
    """Return left-padded prompts in blocks, with room for the new tokens.

    Args:
      tokens_BxT: int tokens, each prompt at the right end of its row. Padding within the first
        block is kept, since embedders may see it; missing padding is `pad_id`.
      mask_BxT: 1 for tokens of the prompt, 0 for padding.
      config: the model.
      max_new_tokens: one budget, or one per row.
      placement: see the module.
      pad_id: the padding token.
      parts: devices that the rows are sharded over; their number is rounded up to a multiple.
      first_row: number of the first row in error messages.

    Raises:
      ValueError: a shape or type is wrong, a row has no token or padding after one, a token is
        outside the vocabulary, or a row does not fit the context.
    """
    tokens_BxT, size_B = _checked(tokens_BxT, mask_BxT, config, pad_id, first_row)
    if placement not in ("pad", "force"):
        raise ValueError(f"placement: got {placement!r}, must be 'pad' or 'force'")
    new_B = budgets(max_new_tokens, len(size_B))
    block = config.block_length
    padded_B = (size_B < block) | (placement == "pad")
    padding_B = np.where(padded_B, -size_B % block, 0)
    begin_B = padding_B + size_B
    end_B = begin_B + new_B
    _check_fit(size_B, begin_B, new_B, config, placement, first_row)

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
        cache_blocks=blocks + new_blocks,
    )


def bucket(blocks: int, block_length: int, most: int) -> int:
    """Return `blocks` rounded up to a power of two of at least 64 tokens, but at most `most`."""
    return min(1 << (max(blocks, _SMALLEST_BUCKET // block_length) - 1).bit_length(), most)


def _checked(
    tokens_BxT: Any, mask_BxT: Any, config: ModelConfig, pad_id: int, first_row: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens, and the number of tokens of each row's prompt."""
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
            raise ValueError(
                f"row {first_row + row} of the prompts has no token; begin with a start token"
            )
        if not (mask_BxT[row] == (columns_T < size)).all():
            raise ValueError(
                f"row {first_row + row} of the mask has padding after a token; left-pad prompts"
            )
    for token in (tokens_BxT.min(), tokens_BxT.max(), pad_id):
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"tokens: {token} is not in 0..{config.vocab_size - 1} (vocab_size)")
    return tokens_BxT, size_B


def budgets(max_new_tokens: int | Iterable[int], rows: int) -> np.ndarray:
    """Return the largest number of new tokens of each row.

    Raises:
      ValueError: a number is not a positive integer, or there is not one, or one per row.
    """
    given = to_python(max_new_tokens)
    each = [to_python(x) for x in given] if isinstance(given, Iterable) else [given] * rows
    whole = all(isinstance(budget, numbers.Integral) and budget >= 1 for budget in each)
    if not whole or len(each) != rows:
        raise ValueError(
            f"max_new_tokens: got {given!r}, must be 1 or greater, and whole: one number or one a "
            f"row ({rows})"
        )
    if max(each) >= 2**31:
        raise ValueError(f"max_new_tokens: got {given!r}, must be below 2^31")
    return np.array(each, np.int64)


def _check_fit(
    size_B: np.ndarray,
    begin_B: np.ndarray,
    new_B: np.ndarray,
    config: ModelConfig,
    placement: Placement,
    first_row: int,
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
        f"the prompt of row {first_row + row} ({size} tokens) and {new} new tokens do not fit the "
        f"context of {context} tokens, in whole blocks of {block}; "
        f"{' or '.join(advice) or 'shorten both'}"
    )
