"""Text in, text out: a trained checkpoint, ready to generate."""

import dataclasses
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from jax.sharding import Mesh, Sharding

from blocktx.checkpoint import load_params, load_tokenizer
from blocktx.config import RunConfig
from blocktx.data import Tokenizer
from blocktx.decode.generate import Generated, generate_blocks
from blocktx.decode.prompts import Placement
from blocktx.decode.stream import TextStream
from blocktx.model import build, for_decoding

_LOOK_EVERY = 8  # blocks between two looks for a stop string


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was written after one prompt.

    Attributes:
      text: as `Engine.generate` returns it.
      tokens: the tokens drawn, with the one that ended them: the end of the document, a stop token,
        or the last of a stop string, none of which is in the text.
      logprobs: the natural logarithm of each token's probability by the model, at temperature 1 and
        among all tokens, whatever it was sampled with.
      finish_reason: "stop", or "length" where the budget ended it.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Engine:
    """A model with its parameters and tokenizer.

    Attributes:
      config: the `RunConfig` that the checkpoint was trained with, but with `scan_layers` False and
        `param_dtype` as `compute_dtype`.
      params: parameters of `model`, one subtree a layer. Where they are spread over a mesh, so is
        what is computed with them.
      tokenizer: the `Tokenizer` saved with the run.
      model: the Flax module.
    """

    def __init__(self, config: RunConfig, params: dict[str, Any], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.model, self.params = for_decoding(build(config.model), params)
        self.config = dataclasses.replace(config, model=self.model.config)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | int | Sequence[str | int] = (),
        placement: Placement | None = None,
        return_logprobs: bool = False,
        stream: bool = False,
    ) -> str | list[str] | Generation | list[Generation] | Iterator[str] | Iterator[list[str]]:
        """What the model writes after each prompt: a string for a string, a list for several.

        Calls of as many prompts (up to the next power of two), of similar lengths and budgets,
        share one compiled program, whatever else changes.

        Args:
          prompts: texts of any lengths, or lists of their token ids. An empty one continues from
            the start of a document.
          max_new_tokens: at most so many tokens, for all or one number a prompt; a text also ends
            where its document would.
          temperature: 0 always takes the likeliest token; 1 samples as the model says.
          top_k: sample from the k likeliest tokens; 0 from all.
          top_p: sample from the fewest tokens that together have this probability.
          min_p: sample from the tokens that have this share of the likeliest one's probability.
          seed: same seed, same text, whatever the other prompts are. One for all, of which each
            prompt gets draws of its own, or one a prompt.
          stop: strings, wherever tokens begin and end, and token ids that end a text before them.
          placement: what to do with a prompt that is not whole blocks: "pad" or "force", see
            `blocktx.decode.prompts`; None: "pad" if the model was trained with random padding.
          return_logprobs: return a `Generation` for each prompt instead of its text.
          stream: return an iterator over the texts' parts, which come as blocks are finished: a
            string for a string, for several prompts a list with a part, maybe empty, for each. The
            parts make up the text that is returned otherwise. To abandon the iterator is to stop.

        Raises:
          ValueError: at the call and before anything is traced: see
            `blocktx.decode.generate.generate_blocks`; or a prompt that is no text, or of which the
            tokenizer knows nothing.
        """
        if return_logprobs and stream:
            raise ValueError("return_logprobs: is not for stream; leave one of them False")
        ids, strings = _split_stop(stop)
        tokens_BxT, mask_BxT = self._encode(prompts)
        if placement is None:
            placement = "pad" if self.config.data.random_padding else "force"
        every = {"every": 1} if stream else {"every": _LOOK_EVERY} if strings else {}
        results = generate_blocks(
            self.model,
            self.params,
            tokens_BxT,
            mask_BxT,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=[self.tokenizer.end_id, *ids],
            placement=placement,
            pad_id=self.tokenizer.pad_id,
            return_logprobs=return_logprobs,
            **every,
        )
        single = isinstance(prompts, str)
        texts = [TextStream(self.tokenizer.decode, strings) for _ in tokens_BxT]
        parts = self._follow(results, texts)
        if stream:
            return (new[0] if single else new for _, new in parts if any(new))
        *_, (last, _) = parts
        written = [text.text for text in texts]
        if return_logprobs:
            written = [_generation(last, row, text) for row, text in enumerate(texts)]
        return written[0] if single else written

    def _follow(
        self, results: Iterator[Generated], texts: list[TextStream]
    ) -> Iterator[tuple[Generated, list[str]]]:
        """The results, each with what it adds to the texts, until no text can grow."""
        for generated in results:
            new = []
            for row, text in enumerate(texts):
                count = generated.count_B[row] - generated.ended_B[row]  # without its stop token
                tokens = generated.tokens_BxM[row, :count].tolist()
                new.append(text.update(tokens, finished=bool(generated.finished_B[row])))
            yield generated, new
            if all(generated.finished_B | [text.stopped for text in texts]):
                return

    def _encode(
        self, prompts: str | Sequence[str | Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded tokens and their mask."""
        given = [prompts] if isinstance(prompts, str) else prompts
        if not (isinstance(given, Sequence) and given and all(map(_is_prompt, given))):
            raise ValueError(
                f"prompts: got {prompts!r}, expected a string or a list of strings or token ids"
            )
        rows = []
        for row, prompt in enumerate(given):
            ids = self._encode_text(prompt, row) if isinstance(prompt, str) else list(prompt)
            rows.append(ids or [self.tokenizer.end_id])
        longest = max(len(row) for row in rows)
        pad_id = self.tokenizer.pad_id
        tokens_BxT = np.array([[pad_id] * (longest - len(row)) + row for row in rows], np.int32)
        return tokens_BxT, np.arange(longest)[::-1] < np.array([[len(row)] for row in rows])

    def _encode_text(self, text: str, row: int) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts: row {row} is not valid Unicode: {error}") from None
        ids = self.tokenizer.encode(text)
        if text and not ids:
            raise ValueError(f"prompts: row {row}, {text!r}, has nothing the tokenizer knows")
        return ids


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str | bytes):
        return isinstance(prompt, str)
    return isinstance(prompt, Sequence) and all(isinstance(id_, numbers.Integral) for id_ in prompt)


def _split_stop(stop: str | int | Sequence[str | int]) -> tuple[list[int], list[str]]:
    """Token ids and strings."""
    given = [stop] if isinstance(stop, str | numbers.Integral) else stop
    if not isinstance(given, Sequence):
        raise ValueError(f"stop: got {stop!r}, expected strings and token ids")
    ids = [item for item in given if isinstance(item, numbers.Integral)]
    strings = [item for item in given if isinstance(item, str) and item]
    if len(ids) + len(strings) != len(given):
        raise ValueError(f"stop: got {stop!r}, expected strings, none empty, and token ids")
    return ids, strings


def _generation(generated: Generated, row: int, text: TextStream) -> Generation:
    tokens = generated.tokens_BxM[row, : generated.count_B[row]].tolist()
    if text.stopped:
        tokens = tokens[: text.tokens_to_stop(tokens)]
    stopped = text.stopped or generated.ended_B[row]
    return Generation(
        text=text.text,
        tokens=tokens,
        logprobs=generated.logprobs_BxM[row, : len(tokens)].tolist(),
        finish_reason="stop" if stopped else "length",
    )


def load(path: epath.PathLike, sharding: Mesh | Sharding | None = None) -> Engine:
    """The latest checkpoint of a run folder, or the one at `path`, with the run's tokenizer.

    Args:
      path: of the checkpoint.
      sharding: where its parameters go, as of `blocktx.load_params`; over a mesh, the
        engine generates on all of it.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`, or no tokenizer beside it.
      ValueError: what is there is not a blocktx checkpoint, is damaged, or does not fit its config.
    """
    loaded = load_params(path, sharding)
    return Engine(loaded.config, loaded.params, load_tokenizer(loaded))
