r"""Models in EleutherAI's lm-evaluation-harness, as `--model blocktx`.

    python -m blocktx.lm_eval --model blocktx --model_args checkpoint=runs/quickstart \
        --batch_size auto --tasks piqa

is the command line of the harness, `lm_eval`, with this model registered. In Python, `import
blocktx.lm_eval` and then `lm_eval.simple_evaluate(model="blocktx", model_args={"checkpoint": ...},
tasks=[...])`. With `--use_cache=FILE` an interrupted evaluation continues where it was.

`blocktx/lm_eval/tasks` is a folder for `--include_path`.
"""

import json
from collections.abc import Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from blocktx.decode import Placement, load
from blocktx.evaluate import Score, iterate_scores, longest_row
from blocktx.progress_bar import ProgressBar

_DEFAULT_BATCH_SIZE = 16
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")  # what `Engine.generate` takes


@register_model("blocktx")
class HarnessModel(TemplateLM):
    """A block or vanilla model of a checkpoint.

    Models trained with random padding get block_length - 1 padding tokens before the first token,
    others none (`blocktx.evaluate.scoring`).
    """

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = _DEFAULT_BATCH_SIZE,
        max_gen_toks: int | None = None,
        placement: Placement | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Load a checkpoint onto JAX's first device.

        Args:
          checkpoint: as for `blocktx.load`.
          batch_size: rows in a batch; "auto": 16 (the harness's default is 1). It does not change
            results.
          max_gen_toks: tokens to generate if a task does not set it; None: 256, or half of the
            context if that is less.
          placement: "pad" or "force"; None: by the checkpoint's training.
          device, max_batch_size: passed by the harness to every model; ignored.

        Raises:
          FileNotFoundError, ValueError: see `blocktx.load`; or an option is out of range.
        """
        super().__init__()
        del device, max_batch_size
        try:
            self._batch_size = _DEFAULT_BATCH_SIZE if batch_size == "auto" else int(batch_size)
        except ValueError:
            self._batch_size = 0
        if self._batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, must be a number of rows, or 'auto'")
        if placement not in (None, "pad", "force"):
            raise ValueError(f"placement: got {placement!r}, must be 'pad' or 'force'")
        self.engine = load(checkpoint)
        config = self.engine.config
        trained = "pad" if config.data.random_padding else "force"
        self._placement: Placement = placement or trained
        self._max_gen_toks = max_gen_toks or min(256, config.model.context_length // 2)

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.end_id

    @property
    def tokenizer_name(self) -> str:
        return f"blocktx-{self.engine.tokenizer.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        del add_special_tokens, kwargs
        return self.engine.tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one.

        Raises:
          ValueError: a request has no continuation.
        """
        for number, request in enumerate(requests):
            context, continuation = request.args
            if not continuation:
                raise ValueError(
                    f"request {number} has no continuation to score (its context ends with "
                    f"{context[-40:]!r}); see doc_to_target and doc_to_choice of the task"
                )
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        for number, ((context, continuation), _, ids) in enumerate(requests):
            if not ids:
                raise ValueError(
                    f"request {number}: the continuation {continuation!r} has no token of its own "
                    f"after a context that ends with {context[-40:]!r}"
                )
        pairs = [(context or [self.eot_token_id], ids) for _, context, ids in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, found in self._scores(pairs):
            answer = (float(found.logprobs_J.sum(dtype="float64")), bool(found.likeliest_J.all()))
            answers[index] = answer
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, after an end token.

        A text longer than the context is scored in parts. Each part is preceded by one token of the
        part before, or by a block without padding; the last part by as many as the context holds.

        Raises:
          ValueError: a document is empty.
        """
        del disable_tqdm
        config = self.engine.config.model
        # The most that fits with block_length - 1 tokens before the first.
        longest = longest_row(config, "pad") - 1
        seen = config.block_length if self._placement == "force" else 1
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(*request.args)
            if not ids:
                raise ValueError(f"document {number} is empty: there is no token to score")
            for window in get_rolling_token_windows(
                ids, self.eot_token_id, max_seq_len=longest, context_len=min(seen, longest)
            ):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        missing = [owners.count(number) for number in range(len(requests))]
        for index, found in self._scores(pairs):
            owner = owners[index]
            totals[owner] += float(found.logprobs_J.sum(dtype="float64"))
            missing[owner] -= 1
            if not missing[owner]:
                args = requests[owner].args
                self.cache_hook.add_partial("loglikelihood_rolling", args, totals[owner])
        return totals

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Score]]:
        """Yield scores as they are computed; --use_cache then keeps them if Ctrl-C comes."""
        return iterate_scores(
            self.engine.model,
            self.engine.params,
            pairs,
            placement=self._placement,
            pad_id=self.engine.tokenizer.pad_id,
            batch_size=self._batch_size,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to the first stop string.

        If a context does not fit together with its continuation, its beginning is dropped.

        Raises:
          ValueError: an option is unknown to `Engine.generate`, or a context has no room.
        """
        del disable_tqdm
        groups: dict[str, list[int]] = {}  # requests that can share a batch, by their options
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        asked = [self._settings(json.loads(options)) for options in groups]  # all before any runs
        rooms = [self._room(settings["max_new_tokens"]) for settings in asked]
        with ProgressBar(total=len(requests), desc="generating", unit=" requests") as bar:
            for settings, room, numbers in zip(asked, rooms, groups.values(), strict=True):
                prompts = {n: self.tok_encode(requests[n].args[0])[-room:] for n in numbers}
                numbers.sort(key=lambda n: -len(prompts[n]))
                for start in range(0, len(numbers), self._batch_size):
                    batch = numbers[start : start + self._batch_size]
                    generated = self.engine.generate(
                        [prompts[n] for n in batch],
                        **settings | {"seed": [settings["seed"] + n for n in batch]},
                        placement=self._placement,
                    )
                    for n, text in zip(batch, generated, strict=True):
                        texts[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(batch))
        return texts

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the harness's options of generation as those of `Engine.generate`."""
        options = dict(normalize_gen_kwargs(options, self._max_gen_toks))
        settings = {
            "max_new_tokens": options.pop("max_gen_toks"),
            "stop": [text for text in options.pop("until") if text],
            "temperature": 0.0,
            "seed": 0,
        }
        del options["do_sample"]  # the temperature says it
        unknown = [name for name in options if name not in _SAMPLING]
        if unknown:
            raise ValueError(
                f"generation option {unknown[0]}={options[unknown[0]]!r}: not known; use until, "
                f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
            )
        return settings | options

    def _room(self, new_tokens: int) -> int:
        """Return the number of prompt tokens that fit before `new_tokens`."""
        config = self.engine.config.model
        room = (config.context_length - new_tokens) // config.block_length * config.block_length
        if room < 1:
            raise ValueError(
                f"max_gen_toks: {new_tokens} new tokens leave no room for a prompt in a context of "
                f"{config.context_length}; use {config.context_length - config.block_length} or "
                "fewer (--gen_kwargs max_gen_toks=...)"
            )
        return room
