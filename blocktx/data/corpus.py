"""A corpus as token ids on disk: tokenised once, memory-mapped, split into train and held-out."""

import array
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tqdm

from blocktx.config import DataConfig
from blocktx.data import sources
from blocktx.data.disk_cache import cached_folder
from blocktx.data.tokenizer import Tokenizer

_FORMAT = 2  # of the cached files; a change makes old ones unknown


_BATCH_CHARACTERS = 1 << 20  # tokenised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Token ids of D documents, one after the other, each ended by the end token."""

    tokens: np.ndarray  # uint16 or uint32 [tokens], memory-mapped
    offsets: np.ndarray  # int64 [D + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
    text_bytes: int  # of all texts, in UTF-8

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    tokenizer: Tokenizer
    train: Documents
    heldout: Documents  # has no documents where holdout_every is 0 or there is only one
    digest: str  # SHA-256 of all tokens and offsets, in hexadecimal


def prepare(config: DataConfig, vocab_size: int) -> Corpus:
    """The tokenised corpus, from the cache if nothing that it depends on has changed.

    Every `holdout_every`-th document is held out, or the last one of two and more if there are
    fewer than that. A tokenizer to be trained sees the training documents only.

    Args:
      config: `config.data`.
      vocab_size: `config.model.vocab_size`; what a tokenizer to be trained may use.

    Raises:
      FileNotFoundError: source or tokenizer is not there.
      ValueError: the source is empty or not readable, the tokenizer lacks a special token or has
        more ids than `vocab_size`, or the cache cannot be written to.
    """
    split = {
        "format": _FORMAT,
        "source": sources.fingerprint(config.source),
        "text_field": config.text_field,
        "holdout_every": config.holdout_every,
    }
    tokenizer = _tokenizer(config, vocab_size, split)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"config.model.vocab_size: {vocab_size} is less than the {tokenizer.vocab_size} ids of "
            f"the tokenizer (config.data.tokenizer {config.tokenizer!r}); use "
            f"{tokenizer.vocab_size} or more"
        )
    key = {"documents": split, "tokenizer": tokenizer.fingerprint, "end_id": tokenizer.end_id}
    folder = cached_folder(
        config.cache_dir,
        key,
        lambda folder: _write(folder, _split_documents(config, "Tokenising"), tokenizer),
    )
    digest = (folder / "digest").read_text()
    return Corpus(tokenizer, _open(folder, "train"), _open(folder, "heldout"), digest)


def read_in_memory(source: str, text_field: str, tokenizer: Tokenizer) -> Documents:
    """All documents of `source`, none held out and nothing kept on disk, for evaluation.

    Raises:
      FileNotFoundError, ValueError: as `blocktx.data.sources.read_documents`.
    """
    texts = sources.read_documents(source, text_field)
    texts = tqdm.tqdm(texts, desc="Tokenising", unit=" documents", disable=None)
    tokens, offsets, text_bytes = array.array("I"), [0], 0
    for batch in _batches((text, False) for text in texts):
        for (text, _), ids in zip(
            batch, tokenizer.encode_batch([text for text, _ in batch]), strict=True
        ):
            tokens.extend([*ids, tokenizer.end_id])
            offsets.append(len(tokens))
            text_bytes += len(text.encode())
    return Documents(np.frombuffer(tokens, np.uintc), np.array(offsets, np.int64), text_bytes)


def _tokenizer(config: DataConfig, vocab_size: int, split: dict[str, Any]) -> Tokenizer:
    if config.tokenizer != "train":
        return Tokenizer.load(config.tokenizer, config.end_token, config.pad_token)

    def train(folder: pathlib.Path) -> None:
        documents = _split_documents(config, "Training the tokenizer")
        training = (text for text, heldout in documents if not heldout)
        tokenizer = Tokenizer.train(training, vocab_size, config.end_token, config.pad_token)
        tokenizer.save(folder / "tokenizer.json")

    special = [config.end_token, config.pad_token]
    key = {"tokenizer": split, "vocab_size": vocab_size, "special_tokens": special}
    folder = cached_folder(config.cache_dir, key, train)
    return Tokenizer.load(folder, config.end_token, config.pad_token)


def _split_documents(config: DataConfig, doing: str) -> Iterator[tuple[str, bool]]:
    """Yields each document and whether it is held out."""
    every = config.holdout_every
    documents = sources.read_documents(config.source, config.text_field)
    documents = iter(tqdm.tqdm(documents, desc=doing, unit=" documents", disable=None))
    text, count = next(documents), 1
    for following in documents:
        yield text, every > 0 and count % every == 0
        text, count = following, count + 1
    last_of_few = 2 <= count < every
    yield text, last_of_few or (every > 0 and count % every == 0)


def _batches(pairs: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, characters = [], 0
    for text, heldout in pairs:
        batch.append((text, heldout))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(folder: pathlib.Path, pairs: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    names = ("train", "heldout")
    offsets = [array.array("q", [0]) for _ in names]
    text_bytes = [0 for _ in names]
    digests = [hashlib.sha256() for _ in names]  # as they are written: of all, however many
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{name}.tokens").open("wb")) for name in names]
        for batch in _batches(pairs):
            ids = tokenizer.encode_batch([text for text, _ in batch])
            for (text, heldout), document in zip(batch, ids, strict=True):
                tokens = np.array([*document, tokenizer.end_id], dtype).tobytes()
                files[heldout].write(tokens)
                digests[heldout].update(tokens)
                offsets[heldout].append(offsets[heldout][-1] + len(document) + 1)
                text_bytes[heldout] += len(text.encode())
    for i, name in enumerate(names):
        np.save(folder / f"{name}.offsets.npy", np.array(offsets[i], np.int64))
        description = {"dtype": np.dtype(dtype).name, "text_bytes": text_bytes[i]}
        (folder / f"{name}.json").write_text(json.dumps(description))
        digests[i].update(offsets[i].tobytes())
    whole = hashlib.sha256(b"".join(digest.digest() for digest in digests))
    (folder / "digest").write_text(whole.hexdigest())


def _open(folder: pathlib.Path, name: str) -> Documents:
    description = json.loads((folder / f"{name}.json").read_text())
    offsets = np.load(folder / f"{name}.offsets.npy")
    dtype = np.dtype(description["dtype"])
    if len(offsets) == 1:  # an empty file cannot be mapped
        tokens = np.empty(0, dtype)
    else:
        tokens = np.memmap(folder / f"{name}.tokens", dtype, mode="r")
    return Documents(tokens, offsets, description["text_bytes"])
