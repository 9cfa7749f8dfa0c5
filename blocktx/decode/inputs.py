"""Prompts and stop conditions as users give them, checked."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from blocktx.data import Tokenizer
from blocktx.decode.sampling import to_python

# A text, or token ids in a list or in an array of one axis.
Prompt = str | Sequence[int] | np.ndarray


def encode_prompts(prompts: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each prompt; an empty one becomes the end token.

    Args:
      prompts: a string; a sequence of strings, of sequences of token ids, or of NumPy or JAX arrays
        of them; or an array with a prompt per row.
      tokenizer: encodes strings.

    Raises:
      ValueError: a prompt is something else, is not valid Unicode, or has no known character.
    """
    given = [prompts] if isinstance(prompts, str) else to_python(prompts)
    if not (isinstance(given, Sequence) and given):
        given = [None]
    rows = [to_python(prompt) for prompt in given]
    if not all(map(_is_prompt, rows)):
        raise ValueError(
            f"prompts: got {prompts!r:.200}, expected a string, or a list that has a string or a "
            "list of token ids for each prompt"
        )
    ids = [
        encode_text(p, tokenizer, row) if isinstance(p, str) else p for row, p in enumerate(rows)
    ]
    return [list(row) or [tokenizer.end_id] for row in ids]


def encode_text(
    text: str, tokenizer: Tokenizer, row: int = 0, special_tokens: bool = False
) -> list[int]:
    """Return the token ids of a text.

    Args:
      text: the text.
      tokenizer: encodes it.
      row: its number, for messages.
      special_tokens: whether the names of special tokens in it are these tokens.

    Raises:
      ValueError: it is not valid Unicode, or has no character that the tokenizer knows.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompts: row {row} is not valid Unicode: {error}") from None
    ids = tokenizer.encode(text, special_tokens=special_tokens)
    if text and not ids:
        raise ValueError(f"prompts: row {row}, {text!r:.200}, has nothing the tokenizer knows")
    return ids


def split_stop(stop: Any) -> tuple[list[int], list[str]]:
    """Return token ids and strings of one stop condition or a sequence of them.

    Raises:
      ValueError: an item is neither, or an empty string.
    """
    stop = to_python(stop)
    given = [stop] if isinstance(stop, str | numbers.Integral) else stop
    if not isinstance(given, Sequence):
        raise ValueError(f"stop: got {stop!r}, expected strings and token ids")
    given = [to_python(item) for item in given]
    ids = [item for item in given if isinstance(item, numbers.Integral)]
    strings = [item for item in given if isinstance(item, str) and item]
    if len(ids) + len(strings) != len(given):
        raise ValueError(f"stop: got {stop!r}, expected strings, none empty, and token ids")
    return ids, strings


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str | bytes):
        return isinstance(prompt, str)
    return isinstance(prompt, Sequence) and all(isinstance(id_, numbers.Integral) for id_ in prompt)
