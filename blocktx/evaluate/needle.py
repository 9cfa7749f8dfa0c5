"""Needle in a haystack: find a number that was said somewhere in a long text.

As in the paper (its authors' `needle.py`): a 7-digit number, called the magic number of a city, is
put at one of 11 depths of a text that fills the context, and 20 tokens are generated greedily. The
prompt `gemini` asks for the number; `verbatim` repeats the words that preceded the number.
"""

import os
import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from etils import epath

from blocktx import plotting
from blocktx.decode import Engine

Prompt = Literal["gemini", "verbatim"]
PROMPTS: tuple[Prompt, ...] = get_args(Prompt)
DEPTHS = tuple(range(0, 101, 10))  # percent
NEW_TOKENS = 20

_SHOWN_AS = {"gemini": "gemini\n(a question)", "verbatim": "verbatim\n(its words again)"}
_CITIES = (
    *("Amsterdam", "Athens", "Bangkok", "Barcelona", "Berlin", "Buenos Aires", "Cairo", "Chicago"),
    *("Copenhagen", "Dakar", "Delhi", "Dublin", "Helsinki", "Istanbul", "Jakarta", "Kigali"),
    *("Lagos", "Lima", "Lisbon", "Madrid", "Melbourne", "Mexico City", "Moscow", "Mumbai"),
    *("Nairobi", "Oslo", "Paris", "Rabat", "San Francisco", "Santiago", "Seattle", "Seoul"),
    *("Shanghai", "Sofia", "Sydney", "Tokyo", "Toronto", "Vancouver", "Vienna", "Yerevan"),
)
_NEEDLE = " The special magic {city} number is: {number}."
_BEFORE = "<context>\n"
_AFTER = "\n</context>\n\nWhat is the special magic {city} number?\n\n"
_ENDS = {
    "gemini": "Here is the magic number from the context:",
    "verbatim": "The special magic {city} number is:",
}


class Sample(NamedTuple):
    tokens: list[int]  # of the prompt
    number: str  # the answer


def needle_samples(
    engine: Engine, haystack: Sequence[int], *, prompt: Prompt, depth: int, count: int, seed: int
) -> list[Sample]:
    """Return prompts that fill the context, each with a random part of the haystack.

    Numbers, cities and parts depend on the seed and not on the depth.

    Args:
      engine: its context length and tokenizer are used.
      haystack: token ids of a text.
      prompt: how to ask for the number.
      depth: percent of the haystack before the needle.
      count: number of samples.
      seed: random seed.

    Raises:
      ValueError: the prompt or the depth is invalid, the context is too short for the question, or
        the haystack is too short for the context.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"prompt: got {prompt!r}, use one of {', '.join(PROMPTS)}")
    if not 0 <= depth <= 100:
        raise ValueError(f"depth: got {depth}, must be a percentage")
    rng = random.Random(seed)
    encode, config = engine.tokenizer.encode, engine.config.model
    samples = []
    for _ in range(count):
        city, number = rng.choice(_CITIES), str(rng.randint(10**6, 10**7 - 1))
        needle = encode(_NEEDLE.format(city=city, number=number))
        before = encode(_BEFORE)
        after = encode((_AFTER + _ENDS[prompt]).format(city=city))
        room = (config.context_length - NEW_TOKENS) // config.block_length * config.block_length
        size = room - len(before) - len(needle) - len(after)
        if size < 1:
            raise ValueError(
                f"the context of {config.context_length} tokens has no room for a haystack: the "
                f"question takes {room - size}, the answer {NEW_TOKENS}"
            )
        if size > len(haystack):
            raise ValueError(
                f"the haystack of {len(haystack)} tokens does not fill a context of "
                f"{config.context_length}; use {size} or more"
            )
        start = int(rng.random() * (len(haystack) - size + 1))
        split = start + round(size * depth / 100)
        hay = [*haystack[start:split], *needle, *haystack[split : start + size]]
        samples.append(Sample([*before, *hay, *after], number))
    return samples


def needle_accuracy(
    engine: Engine,
    haystack: Sequence[int],
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    depths: Sequence[int] = DEPTHS,
    count: int = 20,
    batch_size: int = 8,
    seed: int = 0,
) -> np.ndarray:
    """Return the fraction of numbers that are found, float64 `[prompts, depths]`.

    A number is found if it is the first number in `NEW_TOKENS` generated tokens.

    Raises:
      ValueError: see `needle_samples`; or `count` or `batch_size` is less than 1.
    """
    options = dict(prompts=prompts, depths=depths, count=count, batch_size=batch_size, seed=seed)
    *_, (found, tried) = running_needle(engine, haystack, **options)
    return found / tried


def running_needle(
    engine: Engine,
    haystack: Sequence[int],
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    depths: Sequence[int] = DEPTHS,
    count: int = 20,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers found and tried so far, int `[prompts, depths]`, after each batch.

    Raises:
      ValueError: see `needle_accuracy`.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, must be 1 or greater")
    found, tried = np.zeros((2, len(prompts), len(depths)), int)
    for i, prompt in enumerate(prompts):
        for j, depth in enumerate(depths):
            samples = needle_samples(
                engine, haystack, prompt=prompt, depth=depth, count=count, seed=seed
            )
            for start in range(0, count, batch_size):
                batch = samples[start : start + batch_size]
                texts = engine.generate(
                    [sample.tokens for sample in batch],
                    max_new_tokens=NEW_TOKENS,
                    temperature=0.0,
                )
                found[i, j] += sum(map(answers, texts, (sample.number for sample in batch)))
                tried[i, j] += len(batch)
                yield found.copy(), tried.copy()


def answers(text: str, number: str) -> bool:
    """Return whether the first number in a text is this one."""
    first = re.search(r"\d+", text)
    return first is not None and first[0] == number


def plot_accuracy(
    accuracy: np.ndarray,
    prompts: Sequence[str],
    depths: Sequence[int],
    path: str | os.PathLike[str],
    title: str = "",
) -> epath.Path:
    """Draw `needle_accuracy` as a heat map, and return `path`; nan cells are left empty."""
    figure, axes = plotting.new_figure(title, height=1.4 + 0.55 * len(prompts))
    axes.imshow(100 * accuracy, vmin=0, vmax=100, cmap=plotting.HEAT, aspect="auto")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set_yticks(range(len(prompts)), [_SHOWN_AS.get(prompt, prompt) for prompt in prompts])
    axes.set(xlabel="depth of the needle in the context")
    for (i, j), share in np.ndenumerate(accuracy):
        color = "black" if share > 0.6 else "white"  # on the light and the dark end of the map
        text = "" if np.isnan(share) else f"{share:.0%}"
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    return plotting.save(figure, path)
