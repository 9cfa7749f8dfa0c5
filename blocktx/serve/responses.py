"""Answers of the OpenAI API: objects, stream chunks, log-probabilities."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from blocktx.decode import Engine

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
DONE = b"data: [DONE]\n\n"


def server_sent_event(data: dict[str, Any]) -> bytes:
    """Return an object as one event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


class Envelope:
    """The fields that all objects of one answer share."""

    def __init__(self, model: str, chat: bool, stream: bool):
        """Create an id and a time."""
        kind = "chat.completion" if chat else "text_completion"
        self._chat = chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + ".chunk" if chat and stream else kind,
            "created": int(time.time()),
            "model": model,
        }

    def wrap(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return an answer or a chunk with these choices."""
        return {**self._common, "choices": choices} | ({"usage": usage} if usage else {})

    def choice(
        self, index: int, text: str, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text}}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def delta(
        self, index: int, text: str, logprobs: Any, finish_reason: str | None, first: bool
    ) -> dict[str, Any]:
        """Return a choice of a chunk; `first` is whether it is the first one of its index."""
        content: dict[str, Any] = {"text": text}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            content = {"delta": {**role, "content": text}}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Return the usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


class Logprobs:
    """Log-probabilities of one choice, formatted as its tokens come."""

    def __init__(self, engine: Engine, top: int, chat: bool, before: Sequence[int]):
        """Begin after the tokens `before`; `top` is the number of most likely tokens to list."""
        self._tokenizer, self._top, self._chat = engine.tokenizer, top, chat
        self._ids, self._offset = list(before), 0

    def format(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[list[tuple[int, float]] | None],
    ) -> dict[str, Any]:
        """Return the object for new tokens.

        Args:
          tokens: new tokens.
          logprobs: theirs, None for a token that is not predicted.
          top: most likely tokens, likeliest first, and their log-probabilities.
        """
        entries = []
        for token, logprob, likely in zip(tokens, logprobs, top, strict=True):
            entries.append((token, logprob, likely, self._offset))
            self._offset += len(self._tokenizer.continuation(self._ids[-16:], [token], False))
            self._ids.append(token)
        return self._chat_object(entries) if self._chat else self._completion_object(entries)

    def _completion_object(self, entries: list) -> dict[str, Any]:
        top_logprobs = []
        for token, logprob, likely, _ in entries:
            if logprob is None:
                top_logprobs.append(None)
                continue
            listed: dict[str, float] = {}
            for id_, value in [*likely[: self._top], (token, logprob)]:
                listed.setdefault(self._name(id_), _finite(value))
            top_logprobs.append(listed)
        return {
            "tokens": [self._name(token) for token, *_ in entries],
            "token_logprobs": [None if x is None else _finite(x) for _, x, *_ in entries],
            "top_logprobs": top_logprobs,
            "text_offset": [offset for *_, offset in entries],
        }

    def _chat_object(self, entries: list) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            name = self._name(token)
            return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode())}

        return {
            "content": [
                {**one(token, x), "top_logprobs": [one(*pair) for pair in likely[: self._top]]}
                for token, x, likely, _ in entries
            ]
        }

    def _name(self, token: int) -> str:
        """Return the text of a token, or its id if it has none of its own."""
        text = self._tokenizer.decode([token])
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token_id:{token}"


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
