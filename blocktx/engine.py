"""Text in, text out: a trained checkpoint, ready to generate."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from blocktx import checkpoint, model, sampling
from blocktx.config import RunConfig
from blocktx.data.tokenizer import Tokenizer


class Engine:
    """A model with its parameters and tokenizer.

    Attributes:
      config: the `RunConfig` that the checkpoint was trained with, but with `scan_layers` False.
      params: parameters of `model`, one subtree a layer.
      tokenizer: the `Tokenizer` saved with the run.
      model: the Flax module.
    """

    def __init__(self, config: RunConfig, params: dict[str, Any], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.model, self.params = model.build(config.model), params
        if config.model.scan_layers:
            self.model, self.params = sampling.separate_layers(self.model, params)
        self.config = dataclasses.replace(config, model=self.model.config)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """What the model writes after each prompt: a string for a string, a list for several.

        Args:
          prompts: texts of any lengths. An empty one continues from the start of a document.
          max_new_tokens: at most so many tokens; a text also ends where its document would.
          temperature: 0 always takes the likeliest token; 1 samples as the model says.
          top_k: sample from the k likeliest tokens; 0 from all.
          top_p: sample from the fewest tokens that together have this probability.
          seed: same seed, same text. Rows draw independently of each other.

        Raises:
          ValueError: see `blocktx.sampling.generate`.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not (isinstance(texts, Sequence) and texts and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"prompts: got {prompts!r}, expected a string or a list of strings")
        for row, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"prompts: row {row} is not valid Unicode: {error}") from None
        end_id, pad_id = self.tokenizer.end_id, self.tokenizer.pad_id
        rows = [self.tokenizer.encode(text) or [end_id] for text in texts]
        longest = max(len(row) for row in rows)
        tokens_BxT = np.array([[pad_id] * (longest - len(row)) + row for row in rows], np.int32)
        mask_BxT = np.arange(longest)[::-1] < np.array([[len(row)] for row in rows])
        generated_BxT = sampling.generate(
            self.model,
            self.params,
            tokens_BxT,
            mask_BxT,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            end_id=end_id,
            pad_id=pad_id,
        )
        written = [self._text(row) for row in generated_BxT.tolist()]
        return written[0] if isinstance(prompts, str) else written

    def _text(self, tokens: list[int]) -> str:
        end = self.tokenizer.end_id
        return self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


def load(path: epath.PathLike) -> Engine:
    """The latest checkpoint of a run folder, or the one at `path`, with the run's tokenizer.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`, or no tokenizer beside it.
      ValueError: what is there is not a blocktx checkpoint, is damaged, or does not fit its config.
    """
    loaded = checkpoint.load_params(path)
    file = checkpoint.tokenizer_file(loaded.path)
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: not found; a run's tokenizer stands beside its `checkpoints` folder"
        )
    data = loaded.config.data
    tokenizer = Tokenizer.load(file, data.end_token, data.pad_token)
    return Engine(loaded.config, loaded.params, tokenizer)
