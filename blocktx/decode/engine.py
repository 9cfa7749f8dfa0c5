"""Text in, text out: a trained checkpoint, ready to generate."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, Sharding

from blocktx.checkpoint import load_params, load_tokenizer
from blocktx.config import RunConfig, with_cache_dtype
from blocktx.data import Tokenizer
from blocktx.decode.inputs import Prompt, encode_prompts, split_stop
from blocktx.decode.prompts import Placement, budgets
from blocktx.decode.sampling import SamplingConfig, SamplingOptions, per_row
from blocktx.decode.stream import Continuation
from blocktx.decode.texts import Settings, decode_batch, decode_continuously
from blocktx.model import build, for_decoding, quantize
from blocktx.parallel import MESH_AXES

_STOP_STRING_BLOCKS = 8  # blocks between two searches for stop strings
_ROWS = 32  # prompts decoded at a time


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Attributes:
      text: as `Engine.generate` returns it.
      tokens: the tokens drawn, with the one that ended them: the end of the document, a stop token,
        or the last of a stop string, none of which is in the text.
      logprobs: the natural logarithm of each token's probability by the model, at temperature 1 and
        unfiltered, whatever the sampling parameters are.
      finish_reason: "stop", or "length" if the budget ended it.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class GenerateOptions(SamplingOptions, total=False):
    """Options of `Engine.generate`, for its overloads."""

    max_new_tokens: int | Sequence[int]
    sampling: SamplingConfig | Sequence[SamplingConfig] | None
    seed: int | Sequence[int]
    stop: str | int | Sequence[str | int]
    placement: Placement | None
    rows: int


class Engine:
    """A model with its parameters and tokenizer.

    Attributes:
      config: the `RunConfig` of the checkpoint, but with `scan_layers` False and `param_dtype` as
        `compute_dtype`.
      params: parameters of `model`, one subtree per layer.
      tokenizer: the `Tokenizer` saved with the run.
      model: the Flax module.
      mesh: the mesh that generation runs on; None: the device of the parameters.
    """

    def __init__(
        self,
        config: RunConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        quantized: Literal["int8"] | None = None,
    ):
        """Prepare parameters for decoding.

        Args:
          config: of the run.
          params: parameters of `config.model`; on `mesh`, if there is one.
          tokenizer: of the run.
          mesh: a mesh made by `blocktx.parallel.create_mesh`. Parameters sharded over `fsdp` are
            gathered for every token: use a mesh with fsdp=1, as `blocktx.load` does.
          quantized: "int8": quantize the kernels, see `blocktx.load`.
        """
        self.tokenizer, self.mesh = tokenizer, mesh
        self.model, params = for_decoding(build(config.model), params)
        self.params = quantize(self.model.config, params, quantized)
        self.config = dataclasses.replace(config, model=self.model.config)

    def __repr__(self) -> str:
        model, count = self.config.model, sum(x.size for x in jax.tree.leaves(self.params))
        return f"Engine({model.kind}, {count:,} parameters, context_length={model.context_length})"

    @property
    def placement(self) -> Placement:
        """The placement of prompts that fits the model's training."""
        return "pad" if self.config.data.random_padding else "force"

    @overload
    def generate(
        self,
        prompts: str,
        *,
        return_logprobs: Literal[False] = False,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt] | np.ndarray | jax.Array,
        *,
        return_logprobs: Literal[False] = False,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompts: str,
        *,
        return_logprobs: Literal[True],
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt] | np.ndarray | jax.Array,
        *,
        return_logprobs: Literal[True],
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompts: str, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt] | np.ndarray | jax.Array,
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Iterator[list[str]]: ...
    def generate(
        self,
        prompts,
        *,
        max_new_tokens=64,
        sampling=None,
        seed=0,
        stop=(),
        placement=None,
        rows=_ROWS,
        return_logprobs=False,
        stream=False,
        **options,
    ):
        """Return the continuation of each prompt: a string for a string, a list for several.

        Calls with as many prompts (up to the next power of two), of similar lengths and budgets,
        share one compiled program. More prompts than `rows` are decoded continuously: when one
        is finished, the next takes its row.

        Args:
          prompts: a text; or a list of texts, lists or arrays of token ids; or an array of token
            ids with a prompt per row. An empty prompt starts a document.
          max_new_tokens: largest number of tokens, for all or one number per prompt. A text also
            ends where its document would.
          temperature: 0 always takes the most likely token; 1 samples from the model's
            distribution, the default.
          top_k: sample from the k most likely tokens; 0, the default: from all.
          top_p: sample from the fewest tokens that together have this probability.
          min_p: sample from the tokens with this share of the largest probability.
          sampling: in place of the four: a `SamplingConfig`, or one per prompt.
          seed: the same seed gives the same text, whatever the other prompts are. One integer, of
            which each prompt gets draws of its own, or one per prompt.
          stop: strings, wherever tokens begin and end, and token ids that end a text before them.
          placement: of prompts that are not whole blocks: "pad" or "force", see
            `blocktx.decode.prompts`. None: "pad" if the model was trained with random padding.
          rows: largest number of prompts decoded at a time.
          return_logprobs: return a `Generation` for each prompt instead of its text.
          stream: return an iterator over parts of the texts, which come as blocks are finished: a
            string for a string; for several prompts a list with a part, maybe empty, for each. The
            parts make up the text that is returned otherwise. Abandon the iterator to stop.

        Raises:
          TypeError: there is no such option.
          ValueError: at the call, before tracing: see `generate_blocks`; or a prompt is not text or
            token ids, or has no character that the tokenizer knows.
        """
        if return_logprobs and stream:
            raise ValueError("return_logprobs: cannot be combined with stream; set one to False")
        known = typing.get_type_hints(GenerateOptions)
        for name in options.keys() - SamplingOptions.__annotations__.keys():
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise TypeError(f"generate: no option {name!r}; {hint}")
        if rows < 1:
            raise ValueError(f"rows: got {rows!r}, must be 1 or greater")
        stop_ids, strings = split_stop(stop)
        ids = encode_prompts(prompts, self.tokenizer)
        settings = Settings(
            max_new_tokens=budgets(max_new_tokens, len(ids)),
            sampling=per_row(SamplingConfig.of(sampling, options), len(ids)),
            seed=seed,
            stop=[*self.tokenizer.end_ids, *stop_ids],
            placement=placement or self.placement,
            return_logprobs=return_logprobs,
        )
        texts = [Continuation(self.tokenizer, row, strings) for row in ids]
        decoding = (self.model, self.params, self.mesh, self.tokenizer.pad_id, ids, texts, settings)
        if len(ids) > rows:
            parts = decode_continuously(*decoding, rows)
        else:
            every = {"every": 1} if stream else {"every": _STOP_STRING_BLOCKS} if strings else {}
            parts = decode_batch(*decoding, **every)
        single = isinstance(prompts, str)
        if stream:
            lists = ([new.get(row, "") for row in range(len(ids))] for new in parts)
            return (new[0] if single else new for new in lists if any(new))
        for _ in parts:
            pass
        if return_logprobs:
            results = [Generation(t.text, t.tokens, t.logprobs, t.finish_reason) for t in texts]
        else:
            results = [text.text for text in texts]
        return results[0] if single else results


def load(
    path: epath.PathLike,
    sharding: Mesh | Sharding | None = None,
    *,
    quantize: Literal["int8"] | None = None,
    cache_dtype: Literal["int8"] | None = None,
) -> Engine:
    """Load the latest checkpoint of a run folder, or the one at `path`, with the run's tokenizer.

    Args:
      path: of the checkpoint.
      sharding: a mesh to generate on, or the sharding of all parameters. On a mesh, the devices of
        its `fsdp` axis count as `data`: each group of `tensor` devices holds all parameters, which
        would otherwise be gathered for every token.
      quantize: "int8": keep kernels as 8-bit integers with a scale for each output channel, which
        takes half the memory of bfloat16. The loss changes little; measure it with
        `launch/evaluate.py --quantize=int8`. On a TPU the weights are read as integers. Where
        products are a library's, as cuBLAS's, XLA first writes the weights in the compute dtype:
        that saves memory and no time.
      cache_dtype: "int8": keep keys and values of the cache as 8-bit integers with a scale for each
        head, which takes about half the memory of bfloat16. None: `compute_dtype`. The loss is that
        of `launch/evaluate.py --cache_dtype=int8`.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`, or no tokenizer beside it.
      ValueError: what is there is not a blocktx checkpoint, is damaged, or does not fit its config;
        or there is no such `quantize` or `cache_dtype`.
    """
    mesh = None
    if isinstance(sharding, Mesh) and sharding.axis_names == MESH_AXES:
        devices = sharding.devices.reshape(-1, 1, sharding.shape["tensor"])
        sharding = mesh = Mesh(devices, MESH_AXES, axis_types=sharding.axis_types)
    loaded = load_params(path, sharding)
    model = with_cache_dtype(loaded.config.model, cache_dtype)
    config = dataclasses.replace(loaded.config, model=model)
    return Engine(config, loaded.params, load_tokenizer(loaded), mesh, quantize)
