"""The manifest of a prepared folder: what is in it, and how it is recognised.

manifest.json           written last: a folder without it is not finished
tokenizer.json
plan.json               what is being prepared, compared by a restart
parts/00000.json        what a part of the sources gave, which makes up the manifest
shards/00000-000.bin    see shards.py
"""

import dataclasses
import hashlib
import json
import os
from typing import Any

from etils import epath

from blocktx.config import UserError
from blocktx.files import write_atomic

FORMAT = 1
MANIFEST, PLAN = "manifest.json", "plan.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """An entry of the manifest.

    Attributes:
      name: its file in `shards/`.
      documents: D.
      tokens: of all documents.
      text_bytes: UTF-8 bytes of all texts.
      sha256: of the file.
      index_sha256: of its last 8 D bytes.
      md5: of the file in base64, as Google Cloud Storage tells it; only for one in a bucket.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int
    sha256: str
    index_sha256: str
    md5: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
      dtype: uint16 or uint32.
      tokenizer: `fingerprint`, `vocab_size`, `end_id` and `pad_id`.
      shards: in order.
      sources: the sources as they were given.
      text_field: that of the sources.
      bad_documents: messages of those that were skipped, the first of each part.
      bad_count: the number of those that were skipped.
    """

    dtype: str
    tokenizer: dict[str, Any]
    shards: tuple[Shard, ...]
    sources: tuple[str, ...] = ()
    text_field: str = ""
    bad_documents: tuple[str, ...] = ()
    bad_count: int = 0

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all shards, in hexadecimal."""
        shards = [(shard.documents, shard.tokens, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps([self.dtype, shards]).encode()).hexdigest()

    def save(self, folder: epath.PathLike) -> None:
        """Write `manifest.json`, which makes the folder a finished one."""
        fields = dataclasses.asdict(self)
        content = {
            "format": FORMAT,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "checksum": _checksum(fields),
            **fields,
        }
        write_atomic(epath.Path(folder) / MANIFEST, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: epath.PathLike, field: str = "config.data.source") -> "Manifest":
        """Read the manifest of a prepared folder.

        Raises:
          FileNotFoundError: the folder is missing, or its preparation is not finished.
          UserError: the manifest is damaged, or of a newer format.
        """
        path = epath.Path(folder) / MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            what = "is not finished" if (path.parent / PLAN).exists() else "does not exist"
            raise FileNotFoundError(
                f"{field}: the prepared folder {os.fspath(folder)!r} {what}: there is no {path}; "
                "run launch/prepare.py to its end"
            ) from None
        try:
            content = json.loads(data)
            if content["format"] > FORMAT:
                raise UserError(
                    f"{path}: format {content['format']}, this blocktx reads {FORMAT}; update it"
                )
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            if _checksum(fields) != content["checksum"]:
                raise LookupError("its checksum is another")
            fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
            for name in ("sources", "bad_documents"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except _DAMAGED as error:
            raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from None


_DAMAGED = (
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    UnicodeDecodeError,
    json.JSONDecodeError,
)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
