"""The data of a run: its sources, prepared, split into training and held-out documents."""

import array
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from blocktx.config import DataConfig, UserError
from blocktx.data import sources
from blocktx.data.disk_cache import cached_folder
from blocktx.data.documents import DocumentRange, Documents, split
from blocktx.data.manifest import Manifest
from blocktx.data.preparation import prepare_folder
from blocktx.data.shards import ShardedTokens
from blocktx.data.source_files import PREPARED
from blocktx.data.sources import Source, parse_sources
from blocktx.data.text_files import pieces
from blocktx.data.tokenize_part import encoded
from blocktx.data.tokenizer import Tokenizer

PACKING = 2  # the version of how documents become batches; a change makes runs unresumable

_FORMAT = 3  # of the cached files; a change makes old ones unknown
_MANY_HELDOUT = 50_000_000  # tokens, whose evaluation takes long


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Training documents by source.

    Attributes:
      names: the sources as they were given.
      weights: the share of contexts that are of each source; they sum to 1.
      documents: those of each source.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    documents: tuple[Documents, ...]

    @property
    def document_count(self) -> int:
        return sum(map(len, self.documents))

    @property
    def token_count(self) -> int:
        return sum(documents.token_count for documents in self.documents)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The data of a run.

    Attributes:
      tokenizer: of all documents.
      train: the training documents.
      heldout: those for evaluation; none if `holdout_every` is 0 or there is only one document.
      digest: SHA-256 of all tokens, and of how they are divided and mixed, in hexadecimal.
    """

    tokenizer: Tokenizer
    train: Mixture
    heldout: Documents
    digest: str


def prepare(config: DataConfig, vocab_size: int) -> Corpus:
    """Return the tokenized data of a run. Sources that are not prepared are prepared in the cache.

    Every `holdout_every`-th document of a source is held out, or the last one of two and more if
    there are fewer than that; or, with `heldout_source`, all documents of that. A tokenizer to be
    trained sees the training documents only.

    Args:
      config: `config.data`.
      vocab_size: `config.model.vocab_size`; the most ids of a tokenizer to be trained.

    Raises:
      FileNotFoundError: a source or the tokenizer is missing.
      UserError: a source is empty or cannot be read, the tokenizer lacks a special token, has
        more ids than `vocab_size` or is not that of a prepared source, or the cache cannot be
        written to.
    """
    training = parse_sources(config.source)
    heldout = ()
    if config.heldout_source:
        heldout = parse_sources(config.heldout_source, "config.data.heldout_source")
    tokenizer = _tokenizer(config, training, heldout, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"config.model.vocab_size: {vocab_size} is less than the {tokenizer.vocab_size} ids of "
            f"the tokenizer (config.data.tokenizer {config.tokenizer!r}); use "
            f"{tokenizer.vocab_size} or more"
        )
    folders = [_prepared(config, source.spec, tokenizer) for source in (*training, *heldout)]
    return _corpus(config, tokenizer, training, heldout, folders)


def _corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    training: Sequence[Source],
    heldout: Sequence[Source],
    folders: Sequence[tuple[epath.Path, Manifest]],
) -> Corpus:
    tokens = ShardedTokens(folders, verify=config.verify_shards)
    counts = [manifest.documents for _, manifest in folders]
    bounds = np.cumsum([0, *counts]).tolist()
    every = 0 if heldout else config.holdout_every
    train_ranges, heldout_ranges = [], []
    for i in range(len(training)):
        train, held = split(bounds[i], bounds[i + 1], every)
        train_ranges.append(train)
        heldout_ranges.append(held)
    if heldout:
        heldout_ranges = [DocumentRange(bounds[len(training)], bounds[-1])]
    held_ids = np.concatenate([part.ids() for part in heldout_ranges])
    offsets, held_bytes = _read_index(tokens, bounds[-1], held_ids)
    documents = []
    for i, part in enumerate(train_ranges):
        # A held-out document's bytes are in its source's.
        held = (held_ids >= part.first) & (held_ids < part.end)
        text_bytes = folders[i][1].text_bytes - float(held_bytes[held].sum(dtype=np.float64))
        documents.append(Documents(tokens, offsets, round(text_bytes), (part,)))
    given = [source.weight for source in training]
    amounts = [d.token_count for d in documents] if None in given else given
    whole = sum(amounts)
    train = Mixture(
        tuple(source.spec for source in training),
        tuple(amount / whole for amount in amounts) if whole else (1.0,) * len(amounts),
        tuple(documents),
    )
    held = Documents(
        tokens, offsets, round(float(held_bytes.sum(dtype=np.float64))), tuple(heldout_ranges)
    )
    if held.token_count > _MANY_HELDOUT:
        print(
            f"warning: {held.token_count:,} tokens are held out, and every evaluation reads them "
            "all; raise config.data.holdout_every, or name a config.data.heldout_source",
            file=sys.stderr,
        )
    divided = [dataclasses.astuple(part) for part in (*train_ranges, *heldout_ranges)]
    identity = [PACKING, [m.digest for _, m in folders], divided, given]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Corpus(tokenizer, train, held, digest)


def _read_index(
    tokens: ShardedTokens, count: int, held_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of all documents, int64, and the bytes of text of the held-out ones."""
    offsets, place = np.zeros(count + 1, np.int64), 0
    held_bytes = np.zeros(len(held_ids), np.float32)
    for lengths, text_bytes in tokens.indices():
        end = place + len(lengths)
        np.cumsum(lengths, dtype=np.int64, out=offsets[place + 1 : end + 1])
        offsets[place + 1 : end + 1] += offsets[place]
        here = slice(*np.searchsorted(held_ids, [place, end]))
        held_bytes[here] = text_bytes[held_ids[here] - place]
        place = end
    return offsets, held_bytes


def read_in_memory(source: str, text_field: str, tokenizer: Tokenizer) -> Documents:
    """Return all documents of a source, none held out and nothing kept on disk, for evaluation.

    Raises:
      FileNotFoundError, UserError: as `blocktx.data.sources.read_documents`, or the source was
        prepared with another tokenizer.
    """
    if source.startswith(PREPARED):
        folder, manifest = _open_prepared(source, tokenizer)
        shards = ShardedTokens([(folder, manifest)])
        offsets, _ = _read_index(shards, manifest.documents, np.arange(0))
        tokens = np.concatenate(shards.read(itertools.pairwise(offsets.tolist())))
        return Documents(tokens, offsets, manifest.text_bytes)
    documents = sources.read_documents(source, text_field)
    documents = tqdm.tqdm(documents, desc="Tokenizing", unit=" documents", disable=None)
    tokens, offsets, text_bytes = array.array("I"), [0], 0
    numbered = ((i, document, source) for i, document in enumerate(documents))
    for piece in itertools.chain.from_iterable(encoded(numbered, tokenizer)):
        tokens.frombytes(piece.tokens.astype(np.uintc).tobytes())
        text_bytes += piece.text_bytes
        if piece.document_bytes is not None:
            offsets.append(len(tokens))
    return Documents(np.frombuffer(tokens, np.uintc), np.array(offsets, np.int64), text_bytes)


def _prepared(config: DataConfig, spec: str, tokenizer: Tokenizer) -> tuple[epath.Path, Manifest]:
    """Return the prepared folder of a source, and its manifest."""
    if spec.startswith(PREPARED):
        return _open_prepared(spec, tokenizer)
    key = {
        "format": _FORMAT,
        "documents": sources.fingerprint(spec),
        "text_field": config.text_field,
        "tokenizer": tokenizer.fingerprint,
        "end_id": tokenizer.end_id,
    }

    def build(folder: pathlib.Path) -> None:
        prepare_folder(
            [spec], tokenizer, folder, text_field=config.text_field, field="config.data.cache_dir"
        )

    folder = epath.Path(cached_folder(config.cache_dir, key, build))
    return folder, Manifest.load(folder)


def _open_prepared(spec: str, tokenizer: Tokenizer) -> tuple[epath.Path, Manifest]:
    folder = epath.Path(spec.removeprefix(PREPARED)).expanduser()
    manifest = Manifest.load(folder)
    found, wanted = manifest.tokenizer["fingerprint"], tokenizer.fingerprint
    if found != wanted:
        raise UserError(
            f"config.data.source: {spec!r} was prepared with another tokenizer (fingerprint "
            f"{found[:12]}, not {wanted[:12]}); use --config.data.tokenizer="
            f"{folder / 'tokenizer.json'}, or prepare it again"
        )
    if manifest.tokenizer["end_id"] != tokenizer.end_id:
        raise UserError(
            f"config.data.end_token: {spec!r} was prepared with the end token of id "
            f"{manifest.tokenizer['end_id']}, and {tokenizer.end_token!r} has id "
            f"{tokenizer.end_id}; use the same"
        )
    return folder, manifest


def _tokenizer(
    config: DataConfig, training: Sequence[Source], heldout: Sequence[Source], vocab_size: int
) -> Tokenizer:
    special = (config.end_token, config.pad_token)
    if config.tokenizer != "train":
        return Tokenizer.load(config.tokenizer, *special)
    for source in (*training, *heldout):
        if source.spec.startswith(PREPARED):
            folder = epath.Path(source.spec.removeprefix(PREPARED)).expanduser()
            Manifest.load(folder)
            return Tokenizer.load(folder / "tokenizer.json", *special)
    every = 0 if heldout else config.holdout_every
    specs = [source.spec for source in training]
    key = {
        "tokenizer": [sources.fingerprint(spec) for spec in specs],
        "text_field": config.text_field,
        "holdout_every": every,
        "vocab_size": vocab_size,
        "special_tokens": special,
    }

    def train(folder: pathlib.Path) -> None:
        tokenizer = train_tokenizer(specs, config.text_field, every, vocab_size, *special)
        tokenizer.save(folder / "tokenizer.json")

    return Tokenizer.load(cached_folder(config.cache_dir, key, train), *special)


def train_tokenizer(
    specs: Sequence[str],
    text_field: str,
    holdout_every: int,
    vocab_size: int,
    end_token: str,
    pad_token: str,
) -> Tokenizer:
    """Return a tokenizer that is trained on the training documents of sources.

    Raises:
      FileNotFoundError, UserError: as `blocktx.data.sources.read_documents`.
    """

    def texts() -> Any:
        for spec in specs:
            documents = sources.read_documents(spec, text_field)
            progress = tqdm.tqdm(
                documents, desc="Training the tokenizer", unit=" documents", disable=None
            )
            waiting, count = None, 0  # the last of a few is held out
            for document in progress:
                if waiting is not None:
                    yield from waiting
                count += 1
                held = isinstance(document, np.ndarray) or (
                    holdout_every and count % holdout_every == 0
                )
                waiting = () if held else pieces(document)  # a stream is not read yet
            if waiting is not None and not 2 <= count < holdout_every:
                yield from waiting

    return Tokenizer.train(texts(), vocab_size, end_token, pad_token)
