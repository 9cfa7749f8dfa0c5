"""Text out of tokens that come a few at a time."""

import bisect
from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one row as it grows, up to the first of its stop strings.

    All tokens are decoded each time, because what a token reads as may depend on those before it.
    Held back is what may still change: the bytes of a character that is not complete, which decode
    as U+FFFD, and what a stop string may begin with.

    Attributes:
      text: all that was given out so far.
      stopped: whether a stop string was found; it and what follows it are no part of the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, stop
        self.text, self.stopped = "", False

    def update(self, tokens: Sequence[int], finished: bool) -> str:
        """What is new in the text of `tokens`, which are all that there are so far."""
        if self.stopped:
            return ""
        text = self._decode(tokens)
        cut = self._find(text)
        if cut is not None:
            self.stopped, text = True, text[:cut]
        elif not finished:
            text = text.rstrip(_REPLACEMENT)
            text = text[: len(text) - self._begun(text)]
        # By length: some decoders take back a character when bytes that cannot follow it come.
        new = text[len(self.text) :]
        self.text += new
        return new

    def tokens_to_stop(self, tokens: Sequence[int]) -> int:
        """How many tokens it takes until their text has a stop string."""

        def found(count: int) -> bool:
            return self._find(self._decode(tokens[:count])) is not None

        return bisect.bisect_left(range(len(tokens) + 1), True, key=found)

    def _find(self, text: str) -> int | None:
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(found, default=None)

    def _begun(self, text: str) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
