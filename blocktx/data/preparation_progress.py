"""Progress of a preparation: documents/s, tokens/s and time left."""

import sys
import time

from tqdm import tqdm

from blocktx.config import UserError
from blocktx.data.tokenize_part import Progress, too_many

_EVERY = 10  # seconds, between lines if stderr is no terminal


class PreparationProgress:
    """Counts documents that are done, and those that cannot be read.

    A bar on a terminal, else a line every few seconds. Used in a `with` block.
    """

    def __init__(self, sizes: dict[int, int], done: int, bad: int, allowed: int):
        """Show nothing but what is done.

        Args:
          sizes: bytes of input of each part that will be worked on.
          done: the number of parts that an earlier call has finished.
          bad: the number of bad documents that earlier calls have skipped.
          allowed: the number of bad documents that may be skipped in all.
        """
        self._left = {i: max(1, size) for i, size in sizes.items()}
        self._allowed = allowed
        self._finished, self._total = 0, sum(self._left.values())
        self._text_bytes = dict.fromkeys(sizes, 0)
        self._inflation = 1.0  # bytes of text for a byte of input
        self.documents = self.tokens = 0
        self.bad = bad
        self._bar = None
        if done and sizes:
            print(f"{done} of {done + len(sizes)} parts are done already", file=sys.stderr)

    def __enter__(self) -> "PreparationProgress":
        self._start = self._shown = time.monotonic()
        if sys.stderr.isatty():
            shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=self._total, desc="Tokenizing", bar_format=shape)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._start > _EVERY:
            self._print(time.monotonic())

    def add(self, part: int, counts: Progress) -> None:
        """Count a batch.

        Raises:
          UserError: there are more bad documents than are allowed.
        """
        self.documents += counts.documents
        self.tokens += counts.tokens
        self._text_bytes[part] += counts.text_bytes
        for message in counts.bad:
            self.bad += 1
            if self.bad > self._allowed:
                raise UserError(too_many(message, self.bad - 1))
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        self._show()

    def finish(self, part: int) -> None:
        self._finished += self._left.pop(part)
        texts = sum(self._text_bytes[i] for i in self._text_bytes if i not in self._left)
        self._inflation = max(texts / max(1, self._finished), 1e-3)
        self._show()

    def _done(self) -> float:
        under_way = (
            min(self._text_bytes[i] / self._inflation, 0.99 * size)
            for i, size in self._left.items()
        )
        return self._finished + sum(under_way)

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            seconds = max(now - self._start, 1e-6)
            rates = (
                f"{self.documents / seconds:,.0f} documents/s {self.tokens / seconds:,.0f} tokens/s"
            )
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(max(0, int(self._done()) - self._bar.n))
        elif now - self._shown > _EVERY:
            self._print(now)

    def _print(self, now: float) -> None:
        self._shown, seconds = now, now - self._start
        done = self._done() / max(1, self._total)
        left = tqdm.format_interval(seconds * (1 - done) / done) if done else "?"
        documents, tokens = self.documents / seconds, self.tokens / seconds
        print(
            f"tokenized {done:.0%}, {self.documents:,} documents ({documents:,.0f}/s), "
            f"{self.tokens:,} tokens ({tokens:,.0f}/s), {left} left",
            file=sys.stderr,
            flush=True,
        )
