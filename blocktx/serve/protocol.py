"""Requests of the OpenAI API, parsed and checked."""

import dataclasses
import logging
import secrets
from typing import Any

from blocktx.decode import SamplingConfig
from blocktx.serve.body import Fields, show
from blocktx.serve.errors import ApiError

TOP_LOGPROBS = 5
_STOP_STRINGS = 16
_STOP_CHARACTERS = 1000  # the search for the beginning of a longer one would hold up others
STOP_TOKENS = 4
_CHOICES = 128
_INT64 = 2**63 - 1

# Fields that change results and are not supported, with their neutral values.
_UNSUPPORTED: dict[str, tuple] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}
_IGNORED = ("user", "add_special_tokens", "metadata", "store")


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request for completions.

    Attributes:
      prompts: texts or token ids; of a conversation, one text.
      chat: whether it is a conversation.
      max_tokens: None: as many as fit.
      sampling, seed, n: of each prompt.
      stop, stop_ids, ignore_eos: what ends a completion.
      logprobs: number of most likely tokens; None: no log-probabilities.
      echo: whether the prompt is part of the answer.
      stream, include_usage: how the answer is sent.
    """

    prompts: list[str | list[int]]
    chat: bool
    max_tokens: int | None
    sampling: SamplingConfig
    seed: int
    n: int
    stop: list[str]
    stop_ids: list[int]
    ignore_eos: bool
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


def parse_completion(body: dict[str, Any], model: str) -> Completion:
    """Return the request of a body of /v1/completions.

    Raises:
      ApiError: 400 if a field has the wrong type or range, 404 for another model.
    """
    fields = Fields(body)
    check_model(fields, model)
    prompts = _prompts(fields.get("prompt"))
    echo = fields.boolean("echo")
    max_tokens = fields.integer("max_tokens", 16, 0, _INT64)
    if max_tokens == 0 and not echo:
        raise ApiError(
            "max_tokens: got 0, must be 1 or greater unless echo is true", param="max_tokens"
        )
    logprobs = fields.integer("logprobs", None, 0, TOP_LOGPROBS)
    return _completion(
        fields, prompts, chat=False, max_tokens=max_tokens, logprobs=logprobs, echo=echo
    )


def parse_chat(body: dict[str, Any], model: str) -> tuple[list[dict[str, Any]], Completion]:
    """Return the messages and the request, without a prompt, of a body of /v1/chat/completions.

    Raises:
      ApiError: 400 if a field has the wrong type or range, 404 for another model.
    """
    fields = Fields(body)
    check_model(fields, model)
    messages = fields.get("messages")
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise ApiError(
            f"messages: got {show(messages)}, must be a list of objects with role and content",
            param="messages",
        )
    limits = [
        fields.integer(name, None, 1, _INT64) for name in ("max_completion_tokens", "max_tokens")
    ]
    max_tokens = next((limit for limit in limits if limit is not None), None)
    top = fields.integer("top_logprobs", 0, 0, TOP_LOGPROBS)
    logprobs = top if fields.boolean("logprobs") else None
    return messages, _completion(
        fields, [], chat=True, max_tokens=max_tokens, logprobs=logprobs, echo=False
    )


def check_model(fields: Fields, model: str) -> None:
    """Raise an ApiError of status 404 if a request names another model."""
    name = fields.text("model")
    if name not in (None, "", model):
        raise ApiError(
            f"the model {show(name)} does not exist; this server has {model!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _completion(fields: Fields, prompts: list, **known: Any) -> Completion:
    fields.refuse(_UNSUPPORTED)
    for name in _IGNORED:
        fields.get(name)
    n = fields.integer("n", 1, 1, _CHOICES)
    seed = fields.integer("seed", None, -(2**63), _INT64)
    stop = fields.items(
        "stop",
        lambda x: isinstance(x, str) and 0 < len(x) <= _STOP_CHARACTERS,
        f"strings of 1 to {_STOP_CHARACTERS} characters",
        _STOP_STRINGS,
    )
    stream = fields.boolean("stream")
    options = fields.get("stream_options")
    if options is not None and not stream:
        raise ApiError(
            f"stream_options: got {show(options)}, must be left out unless stream is true",
            param="stream_options",
        )
    if not isinstance(options, dict | None):
        raise ApiError(
            f"stream_options: got {show(options)}, must be an object", param="stream_options"
        )
    include_usage = Fields(options or {}).boolean("include_usage")
    try:
        sampling = SamplingConfig(
            temperature=fields.real("temperature", 1.0, 0, 100),
            top_p=fields.real("top_p", 1.0, 0, 1),
            top_k=max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),  # -1: all
            min_p=fields.real("min_p", 0.0, 0, 1),
        )
    except ValueError as error:  # top_p of 0
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None
    completion = Completion(
        prompts=prompts,
        sampling=sampling,
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
        n=n,
        stop=stop,
        stop_ids=fields.items("stop_token_ids", is_id, "token ids", STOP_TOKENS),
        ignore_eos=fields.boolean("ignore_eos"),
        stream=stream,
        include_usage=include_usage,
        **known,
    )
    if unknown := list(fields.unknown()):
        logging.getLogger("blocktx.serve").info("ignored fields: %s", ", ".join(unknown)[:200])
    return completion


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(map(is_id, prompt)):
            return [prompt]
        if all(isinstance(p, str) or (isinstance(p, list) and all(map(is_id, p))) for p in prompt):
            return prompt
    raise ApiError(
        f"prompt: got {show(prompt)}, must be a string, a list of token ids, or a list of these",
        param="prompt",
    )


def is_id(value: Any) -> bool:
    """Return whether a JSON value may be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)
