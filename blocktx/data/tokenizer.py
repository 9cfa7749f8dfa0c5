"""Text to token ids and back: a thin layer over `tokenizers.Tokenizer`."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from blocktx.data.tokenizer_files import (
    chat_template,
    end_token_ids,
    find_tokenizer,
    read_companions,
    special_token_names,
)
from blocktx.files import write_atomic

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that a continuation is decoded after. A character has at most 4 bytes, and a
# decoder's treatment of the first token (a stripped space) then falls into the prompt.
_DECODED_CONTEXT = 16
_NAMED_TOKENS = 10  # listed in an error message


class Tokenizer:
    """A tokenizer with an end token and a padding token.

    Special tokens are never produced from text, unless `encode` is asked to, and never added.

    Attributes:
      end_token, end_id: the token that ends a document.
      end_ids: all tokens that end a generated text; `end_id` is the first.
      pad_token, pad_id: the token of padding, which may be `end_token`.
      chat_template: the Jinja template of a conversation, None if the tokenizer has none.
      special_tokens: the tokens that a chat template may name: `bos_token`, `eos_token`, ...
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        end_token: str | None = None,
        pad_token: str | None = None,
        companions: Mapping[str, str] | None = None,
    ):
        """Takes over `tokenizer`.

        Args:
          tokenizer: is changed: padding and truncation are switched off.
          end_token: None: the end token that `companions` name.
          pad_token: None: the padding token that `companions` name, else `end_token`.
          companions: contents of the files beside tokenizer.json, see `tokenizer_files`.

        Raises:
          ValueError: `end_token` or `pad_token` is not a special token of `tokenizer`, or an end
            token of `companions` is none of its tokens.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._tokenizer = tokenizer
        self._companions = dict(companions or {})
        added = tokenizer.get_added_tokens_decoder()
        self._special = {
            token.content: id_ for id_, token in sorted(added.items()) if token.special
        }
        self._special_ids = frozenset(self._special.values())
        self.special_tokens = special_token_names(self._companions)
        self.chat_template = chat_template(self._companions)
        ends = end_token_ids(self._companions)
        unknown = [id_ for id_ in ends if tokenizer.id_to_token(id_) is None]
        if unknown:
            raise ValueError(
                f"generation_config.json: eos_token_id: {unknown[0]} is no token of the tokenizer, "
                f"which has {self.vocab_size}"
            )
        if end_token is None:
            end_token = self.special_tokens.get("eos_token")
        if end_token is None and ends:
            end_token = tokenizer.id_to_token(ends[0])
        if pad_token is None:
            pad_token = self.special_tokens.get("pad_token", end_token)
        self.end_token, self.end_id = end_token, self._special_id("end_token", end_token)
        self.pad_token, self.pad_id = pad_token, self._special_id("pad_token", pad_token)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([self.end_id, *ends]))
        decoder = tokenizer.decoder
        has_byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        self._bytes = {f"<0x{i:02X}>": i for i in range(256)} if has_byte_fallback else {}

    @classmethod
    def train(
        cls, documents: Iterable[str], vocab_size: int, end_token: str, pad_token: str
    ) -> "Tokenizer":
        """Train a byte-level BPE tokenizer; the same documents give the same tokenizer.

        It has at most `vocab_size` ids, but never fewer than the 256 bytes and the special tokens:
        `end_token` with id 0 and, unless it is the same, `pad_token` with id 1.
        """
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(dict.fromkeys([end_token, pad_token])),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return cls(tokenizer, end_token, pad_token)

    @classmethod
    def load(
        cls,
        spec: str | os.PathLike[str],
        end_token: str | None = None,
        pad_token: str | None = None,
    ) -> "Tokenizer":
        """Load a tokenizer.json: its path, that of its folder, or a name on the hub.

        Other end tokens and the chat template are read from the files beside it.

        Args:
          spec: the path or name.
          end_token, pad_token: as of the constructor.

        Raises:
          FileNotFoundError: there is no such file, or the hub cannot be reached.
          ValueError: the file is not a tokenizer, or lacks one of the special tokens.
        """
        file = find_tokenizer(spec)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ValueError(
                f"config.data.tokenizer: {file} is not a tokenizer.json: {error}"
            ) from None
        return cls(tokenizer, end_token, pad_token, read_companions(file))

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id plus 1, added tokens included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokenizer's JSON, in hexadecimal."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @functools.cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """The special tokens that its own post-processor puts before a text, such as Llama's BOS.

        `encode` does not add them.
        """
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        added = itertools.takewhile(bool, encoding.special_tokens_mask)
        return tuple(encoding.ids[: len(list(added))])

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
          text: the text.
          special_tokens: whether the name of a special token in the text is that token, as in a
            text made by a chat template, or plain text.
        """
        tokenizer = self._with_special_tokens if special_tokens else self._tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, computed on several threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens; invalid UTF-8 becomes U+FFFD."""
        if not self._bytes:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)
        tokens = (self._tokenizer.id_to_token(id_) for id_ in ids)
        visible = (token for token in tokens if token is not None and token not in self._special)
        return self._tokenizer.decoder.decode(self._replace_invalid_bytes(visible))

    def continuation(
        self, prompt_ids: Sequence[int], new_ids: Sequence[int], final: bool = True
    ) -> str:
        """Return the text that `new_ids` add to the text of `prompt_ids`.

        This is not `decode(new_ids)`: some decoders strip a space before the first token, and a
        character may begin in the prompt.

        Args:
          prompt_ids: the ids before.
          new_ids: all ids generated so far.
          final: False holds back a character at the end that is not complete. The texts for a
            growing `new_ids` are then prefixes of one another and of the final one.
        """
        visible = (id_ for id_ in reversed(prompt_ids) if id_ not in self._special_ids)
        context = list(itertools.islice(visible, _DECODED_CONTEXT))[::-1]
        whole = self.decode([*context, *new_ids])
        # An incomplete character at the prompt's end may change, and is then part of the new text.
        before = self.decode(context)
        if not whole.startswith(before):
            before = before.removesuffix(_REPLACEMENT)
        text = whole[len(before) :]
        return text if final else text.rstrip(_REPLACEMENT)

    def byte_lengths(self) -> np.ndarray:
        """Return the UTF-8 bytes of each id's text, int64 [vocab_size]; special tokens have 0.

        Exact for byte-level tokenizers; others may add or strip spaces when they decode.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        for token, id_ in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if re.fullmatch("<0x[0-9A-F]{2}>", token):  # byte fallback
                lengths[id_] = 1
            else:  # a byte-level token has a character for each byte
                lengths[id_] = len(token if byte_level else token.replace("▁", " ").encode())
        for id_, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[id_] = 0 if token.special else len(token.content.encode())
        return lengths

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, and its companions beside it, that `load` reads.

        Each file is written atomically.
        """
        path = epath.Path(path)
        for name, text in self._companions.items():
            write_atomic(path.parent / name, text)
        write_atomic(path, self._tokenizer.to_str(pretty=True))

    @functools.cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def _special_id(self, field: str, token: str | None) -> int:
        if token is not None and token in self._special:
            return self._special[token]
        names = [repr(name) for name in self._special]
        listed = ", ".join(names[:_NAMED_TOKENS]) or "(it has none)"
        more = f", ... {len(names)} in all" if len(names) > _NAMED_TOKENS else ""
        shared = "; it may be the end token" if field == "pad_token" else ""
        problem = "not given, and no file beside tokenizer.json names it"
        if token is not None:
            problem = f"{token!r} is not a special token of the tokenizer"
        raise ValueError(f"config.data.{field}: {problem}; use one of {listed}{more}{shared}")

    def _replace_invalid_bytes(self, tokens: Iterable[str]) -> list[str]:
        """Put U+FFFD for byte tokens that are not UTF-8.

        The library's decoder would replace all bytes of a run that has an invalid one.
        """
        valid: list[str] = []
        for is_byte, run in itertools.groupby(tokens, self._bytes.__contains__):
            if not is_byte:
                valid += run
                continue
            text = bytes(self._bytes[token] for token in run).decode("utf-8", errors="replace")
            for character in text:
                if character == _REPLACEMENT:
                    valid.append(character)
                else:
                    valid += (f"<0x{byte:02X}>" for byte in character.encode())
        return valid
