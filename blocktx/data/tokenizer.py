"""Text to token ids and back: a thin layer over `tokenizers.Tokenizer`."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from blocktx.files import write_atomic


class Tokenizer:
    """A tokenizer whose text never turns into special tokens, and that adds none by itself."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_token: str, pad_token: str):
        """Takes over `tokenizer`. The two tokens may be the same.

        Raises:
          ValueError: `end_token` or `pad_token` is not a special token of `tokenizer`.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        for field, token in (("end_token", end_token), ("pad_token", pad_token)):
            if token not in special:
                raise ValueError(
                    f"config.data.{field}: {token!r} is not a special token of the tokenizer; "
                    f"use one of {', '.join(map(repr, special)) or '(it has none)'}"
                )
        self._tokenizer = tokenizer
        self.special_tokens = (end_token, pad_token)
        self.end_id: int = special[end_token]
        self.pad_id: int = special[pad_token]

    @classmethod
    def train(
        cls, documents: Iterable[str], vocab_size: int, end_token: str, pad_token: str
    ) -> "Tokenizer":
        """A byte-level BPE tokenizer, the same one for the same documents.

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
    def load(cls, spec: str | os.PathLike[str], end_token: str, pad_token: str) -> "Tokenizer":
        """The tokenizer of a tokenizer.json, of a folder that holds one, or of a hub name.

        Raises:
          FileNotFoundError: `spec` is none of these, or the hub cannot be reached.
          ValueError: the file is not a tokenizer, or lacks one of the special tokens.
        """
        path = epath.Path(spec).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
            if not path.exists():
                raise FileNotFoundError(
                    f"config.data.tokenizer: the folder {os.fspath(spec)!r} holds no tokenizer.json"
                )
        elif path.suffix == ".json" and not path.exists():  # spares a lost path the wait for a hub
            raise FileNotFoundError(
                f"config.data.tokenizer: the file {os.fspath(spec)!r} does not exist"
            )
        if path.exists():
            try:
                tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            except Exception as error:  # what the Rust side raises is a bare Exception
                raise ValueError(
                    f"config.data.tokenizer: {path} is not a tokenizer.json: {error}"
                ) from None
        else:
            try:
                tokenizer = tokenizers.Tokenizer.from_pretrained(os.fspath(spec))
            except Exception as error:
                raise FileNotFoundError(
                    f"config.data.tokenizer: {os.fspath(spec)!r} is neither an existing file nor "
                    "reachable on the hub; use 'train', the path of a tokenizer.json, or a hub "
                    f"name such as 'EleutherAI/pythia-70m' ({type(error).__name__}: {error})"
                ) from error
        return cls(tokenizer, end_token, pad_token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokenizer's JSON, in hexadecimal."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

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
        """Writes a tokenizer.json that `load` takes: all of it or nothing."""
        write_atomic(path, self._tokenizer.to_str(pretty=True))
