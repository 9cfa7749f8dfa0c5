"""The files of a tokenizer: tokenizer.json, and the files of Hugging Face that accompany it.

tokenizer.json            the tokenizer itself
tokenizer_config.json     names of the special tokens, maybe the chat template
chat_template.jinja       the chat template, where it has a file of its own
generation_config.json    ids of all end tokens
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from blocktx.files import is_bucket, write_atomic

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_COMPANIONS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def find_tokenizer(spec: str | os.PathLike[str]) -> epath.Path:
    """Return the tokenizer.json that `spec` names: a file, a folder, or a name on the hub.

    Raises:
      FileNotFoundError: `spec` is none of these, or the hub cannot be reached.
      ValueError: it is a pipe or a device.
    """
    path = epath.Path(spec).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"config.data.tokenizer: the folder {os.fspath(spec)!r} has no tokenizer.json"
            )
        return path / "tokenizer.json"
    if path.exists():
        if is_bucket(path) or os.path.isfile(path):  # reading a pipe would block
            return path
        raise ValueError(f"config.data.tokenizer: {os.fspath(spec)!r} is not a regular file")
    if path.suffix == ".json":  # a mistyped path; do not ask the hub
        raise FileNotFoundError(
            f"config.data.tokenizer: the file {os.fspath(spec)!r} does not exist"
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = ["tokenizer.json", "config.json", *_COMPANIONS]
        file = epath.Path(snapshot_download(os.fspath(spec), allow_patterns=patterns))
        file = file / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError("the repository has no tokenizer.json")
    except Exception as error:
        raise FileNotFoundError(
            f"config.data.tokenizer: {os.fspath(spec)!r} is neither an existing file nor reachable "
            "on the hub; use 'train', the path of a tokenizer.json, or a hub name such as "
            f"'EleutherAI/pythia-70m' ({type(error).__name__}: {error})"
        ) from error
    return file


def read_companions(file: epath.PathLike) -> dict[str, str]:
    """Return the contents, by name, of the files that accompany a tokenizer.json.

    If there is no generation_config.json, the end tokens of a model's config.json take its place.
    """
    folder = epath.Path(file).expanduser().parent
    found = {name: folder / name for name in _COMPANIONS}
    texts = {name: _text(path) for name, path in found.items() if path.is_file()}
    if "generation_config.json" not in texts and (folder / "config.json").is_file():
        config = _parse(folder / "config.json", _text(folder / "config.json"))
        ids = {name: config[name] for name in ("eos_token_id",) if name in config}
        if ids:
            texts["generation_config.json"] = json.dumps(ids) + "\n"
    return texts


def read_tokenizer_files(file: epath.PathLike) -> dict[str, str]:
    """Return the contents, by name, of a tokenizer.json and of the files that accompany it."""
    return {**read_companions(file), "tokenizer.json": _text(epath.Path(file).expanduser())}


def copy_tokenizer(file: epath.PathLike, folder: epath.PathLike) -> None:
    """Copy a tokenizer.json and the files that accompany it into an existing folder."""
    for name, text in read_tokenizer_files(file).items():
        write_atomic(epath.Path(folder) / name, text)


def end_token_ids(companions: Mapping[str, str]) -> list[int]:
    """Return the ids of all end tokens that generation_config.json names.

    Raises:
      ValueError: the file is not JSON, or its `eos_token_id` is not an id or a list of ids.
    """
    name = "generation_config.json"
    said = _parse(name, companions[name]).get("eos_token_id") if name in companions else None
    ids = [] if said is None else said if isinstance(said, list) else [said]
    if any(type(id_) is not int or id_ < 0 for id_ in ids):
        raise ValueError(f"{name}: eos_token_id: got {said!r}, must be an id or a list of ids")
    return ids


def special_token_names(companions: Mapping[str, str]) -> dict[str, str]:
    """Return `bos_token`, `eos_token`, ... as tokenizer_config.json names them.

    Raises:
      ValueError: the file is not JSON, or one of them is not a token.
    """
    file = "tokenizer_config.json"
    config = _parse(file, companions[file]) if file in companions else {}
    names = {}
    for field in _SPECIAL:
        token = config.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{file}: {field}: got {config[field]!r}, must be a token")
        if token is not None:
            names[field] = token
    return names


def chat_template(companions: Mapping[str, str]) -> str | None:
    """Return the Jinja template of a conversation, the one named "default" if there are several.

    Raises:
      ValueError: tokenizer_config.json is not JSON, or its template is not text.
    """
    if "chat_template.jinja" in companions:
        return companions["chat_template.jinja"]
    file = "tokenizer_config.json"
    template = _parse(file, companions[file]).get("chat_template") if file in companions else None
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{file}: chat_template: got {template!r}, must be text")
    return template


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None


def _parse(name: epath.PathLike, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}: a {type(content).__name__}, must be an object")
    return content
