"""Text of token sequences that grow by a few tokens at a time."""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Literal

from blocktx.data import Tokenizer


class TextStream:
    """The text of one row as it grows, up to the first of its stop strings.

    All tokens are decoded each time, because the text of a token may depend on those before it.
    Text that may still change is held back: an incomplete character, and the beginning of a stop
    string.

    Attributes:
      text: all text returned so far.
      stopped: whether a stop string was found. It and the text after it are not returned.
    """

    def __init__(self, decode: Callable[[Sequence[int], bool], str], stop: Sequence[str] = ()):
        """Begin with an empty text.

        Args:
          decode: maps tokens to their text. With False as second argument it leaves out an
            incomplete character at the end.
          stop: stop strings.
        """
        self._decode, self._stop = decode, stop
        self.text, self.stopped = "", False

    def update(self, tokens: Sequence[int], finished: bool) -> str:
        """Return the text that is new in that of `tokens`, all tokens so far."""
        if self.stopped:
            return ""
        text = self._decode(tokens, finished)
        cut = self._find(text)
        if cut is not None:
            self.stopped, text = True, text[:cut]
        elif not finished:
            text = text[: len(text) - self._begun(text)]
        # By length: some decoders change a character when bytes that cannot follow it come.
        new = text[len(self.text) :]
        self.text += new
        return new

    def tokens_to_stop(self, tokens: Sequence[int]) -> int:
        """Return the smallest number of tokens whose text has a stop string."""

        def found(count: int) -> bool:
            return self._find(self._decode(tokens[:count], True)) is not None

        return bisect.bisect_left(range(len(tokens) + 1), True, key=found)

    def _find(self, text: str) -> int | None:
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(found, default=None)

    def _begun(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0


class Continuation:
    """Tokens and text of the continuation of one prompt, as they come.

    Attributes:
      tokens: all tokens drawn. The last one may be a stop token, or the last of a stop string.
      logprobs: their log-probabilities, if they are given.
      text: the text that was returned so far.
      finish_reason: "stop" after a stop token or string, "length" at the end of the budget, None
        before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        """Begin with no tokens; `stop` are stop strings."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._stream = TextStream(functools.partial(tokenizer.continuation, prompt_ids), stop)

    @property
    def text(self) -> str:
        return self._stream.text

    def add(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        finish_reason: Literal["stop", "length"] | None,
    ) -> str:
        """Return the text that new tokens add.

        Args:
          tokens: the new tokens.
          logprobs: theirs, or nothing.
          finish_reason: None if there will be more; "stop" if the last is a stop token, which does
            not appear in the text.
        """
        if self.finish_reason:
            return ""
        self.tokens += tokens
        self.logprobs += logprobs
        shown = self.tokens[:-1] if finish_reason == "stop" else self.tokens
        new = self._stream.update(shown, finished=finish_reason is not None)
        self.finish_reason = finish_reason
        if self._stream.stopped:
            self.finish_reason = "stop"
            count = self._stream.tokens_to_stop(shown)
            del self.tokens[count:], self.logprobs[count:]
        return new
