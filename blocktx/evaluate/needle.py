"""Needle in a haystack: does a model find a number again that stands somewhere in a long text?

As the paper has it (its authors' `needle.py`): a 7-digit number, said to be the magic number of a
city, at 11 depths of a text that fills the context; 20 tokens are generated greedily. There are two
prompts: `gemini` asks for the number, `verbatim` repeats the words that the number stood behind.
"""

import os
import pathlib
import random
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from matplotlib.figure import Figure

from blocktx.decode import Engine
from blocktx.files import write_png

Prompt = Literal["gemini", "verbatim"]


PROMPTS: tuple[Prompt, ...] = get_args(Prompt)


DEPTHS = tuple(range(0, 101, 10))  # percent


NEW_TOKENS = 20


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
    number: str  # that is to follow


def needle_samples(
    engine: Engine, haystack: Sequence[int], *, prompt: Prompt, depth: int, count: int, seed: int
) -> list[Sample]:
    """Prompts that fill the context, each of another part of the haystack, number and city.

    The same seed gives the same numbers and cities, and at each depth the same parts.

    Args:
      engine: whose context and tokenizer.
      haystack: token ids of a text.
      prompt: how the number is asked for.
      depth: what stands before the needle, in percent of the haystack.
      count: of samples.
      seed: of what is random.

    Raises:
      ValueError: the prompt or the depth is not known, the context is too short for the question,
        or the haystack for the context.
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
    """The share of numbers that are found, float64 `[prompts, depths]`.

    Found is a number if it is the first that the model writes in `NEW_TOKENS` tokens.

    Raises:
      ValueError: as `needle_samples`, or `count` or `batch_size` is not 1 or greater.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, must be 1 or greater")
    accuracy = np.zeros((len(prompts), len(depths)))
    for i, prompt in enumerate(prompts):
        for j, depth in enumerate(depths):
            samples = needle_samples(
                engine, haystack, prompt=prompt, depth=depth, count=count, seed=seed
            )
            found = 0
            for start in range(0, count, batch_size):
                batch = samples[start : start + batch_size]
                written = engine.generate(
                    [sample.tokens for sample in batch],
                    max_new_tokens=NEW_TOKENS,
                    temperature=0.0,
                )
                found += sum(map(answers, written, (sample.number for sample in batch)))
            accuracy[i, j] = found / count
    return accuracy


def answers(text: str, number: str) -> bool:
    """Whether the first number in a text is this one."""
    first = re.search(r"\d+", text)
    return first is not None and first[0] == number


def plot_accuracy(
    accuracy: np.ndarray,
    prompts: Sequence[str],
    depths: Sequence[int],
    path: str | os.PathLike[str],
    title: str = "",
) -> pathlib.Path:
    """Draws `needle_accuracy` as a heat map into a PNG at `path`, and returns `path`."""
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(prompts)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set_yticks(range(len(prompts)), prompts)
    axes.set(xlabel="depth of the needle", title=title)
    for (i, j), share in np.ndenumerate(accuracy):
        axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="found")
    return pathlib.Path(write_png(path, figure))
