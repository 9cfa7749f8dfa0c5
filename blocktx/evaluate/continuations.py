"""Greedy continuations of the same prompts by two models: agreement and repetition.

Likelihood alone can hide what a converted model has lost, so it is also compared by what it writes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from blocktx.data import Documents
from blocktx.decode import Engine

_NGRAM = 4


@dataclasses.dataclass(frozen=True)
class Continuations:
    """Greedy continuations of a model beside those of a reference.

    Attributes:
      prompts: their number.
      new_tokens: the most tokens of a continuation.
      exact: fraction of prompts that both continue with the same tokens to the end.
      matched: fraction of the reference's tokens before the first difference, mean over prompts.
      repetition: of the model, the reference and the text itself: fraction of 4-grams of a
        continuation that occurred in it before, mean over prompts.
    """

    prompts: int
    new_tokens: int
    exact: float
    matched: float
    repetition: tuple[float, float, float]


def running_continuations(
    engines: tuple[Engine, Engine],
    documents: Documents,
    *,
    count: int,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
) -> Iterator[Continuations]:
    """Yield the comparison over the prompts so far, once for each batch.

    The prompts are spread evenly over the documents that are long enough.

    Raises:
      ValueError: no document has `prompt_tokens + new_tokens` tokens, or they do not fit a context.
    """
    for engine in engines:
        context = engine.config.model.context_length
        if prompt_tokens + new_tokens > context:
            raise ValueError(
                f"prompt of {prompt_tokens} and {new_tokens} new tokens do not fit the context of "
                f"{context}"
            )
    texts = _texts(documents, count, prompt_tokens + new_tokens)
    if not texts:
        raise ValueError(
            f"no document has the {prompt_tokens + new_tokens} tokens of a prompt and its "
            "continuation"
        )
    return _run(engines, texts, prompt_tokens, new_tokens, batch_size)


def _run(
    engines: tuple[Engine, Engine],
    texts: list[list[int]],
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
) -> Iterator[Continuations]:
    exact, matched, repeated = [], [], []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        prompts = [text[:prompt_tokens] for text in batch]
        ours, theirs = (
            [
                found.tokens
                for found in engine.generate(
                    prompts, max_new_tokens=new_tokens, temperature=0.0, return_logprobs=True
                )
            ]
            for engine in engines
        )
        for own, other, text in zip(ours, theirs, batch, strict=True):
            same = common_prefix(own, other)
            exact.append(own == other)
            matched.append(same / max(len(other), 1))
            repeated.append([repetition(tokens) for tokens in (own, other, text[prompt_tokens:])])
        means = np.mean(repeated, axis=0).tolist()
        yield Continuations(
            len(exact), new_tokens, float(np.mean(exact)), float(np.mean(matched)), tuple(means)
        )


def _texts(documents: Documents, count: int, length: int) -> list[list[int]]:
    """Return up to `count` stretches of `length` tokens, at most one that begins in each window."""
    starts = [
        start
        for id_ in documents.ids()
        for start in range(
            int(documents.offsets[id_]), int(documents.offsets[id_ + 1]) - length, length
        )
    ]
    if len(starts) > count:
        starts = [starts[i * len(starts) // count] for i in range(count)]
    found = documents.read([(start, start + length) for start in starts])
    return [np.asarray(tokens).tolist() for tokens in found]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of equal tokens before the first difference."""
    differ = [x != y for x, y in zip(a, b, strict=False)]
    return differ.index(True) if True in differ else len(differ)


def repetition(tokens: Sequence[int], n: int = _NGRAM) -> float:
    """Return the fraction of n-grams that occurred before in `tokens`; 0 if there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
