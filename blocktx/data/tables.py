"""Parquet files, ArrayRecord files and Hugging Face datasets: texts by row number."""

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from blocktx.config import UserError
from blocktx.data.text_files import BadDocument, json_text
from blocktx.files import is_bucket, open_binary

_ROWS = 1000  # read at a time


def parquet_row_groups(path: str) -> list[int]:
    """Return the compressed bytes of each row group of a Parquet file."""
    with open_binary(path) as file:
        metadata = _parquet(path, file).metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [
            sum(group.column(c).total_compressed_size for c in range(group.num_columns))
            for group in groups
        ]


def read_parquet(
    path: str, text_field: str, begin: int = 0, end: int | None = None
) -> Iterator[str | BadDocument]:
    """Yield the texts of row groups `begin` to `end` of a Parquet file.

    Args:
      path: the file.
      text_field: the column that holds the text, strings or UTF-8 bytes.
      begin: the first row group.
      end: the row group after the last; None: to the end.

    Raises:
      UserError: pyarrow is not installed, the file is not Parquet, or has no such column.
    """
    with open_binary(path) as file:
        table = _parquet(path, file)
        if text_field not in table.schema_arrow.names:
            raise UserError(
                f"{path}: config.data.text_field: {text_field!r} is not a column of it; it has "
                f"{', '.join(map(repr, table.schema_arrow.names))}"
            )
        metadata = table.metadata
        end = metadata.num_row_groups if end is None else end
        row = sum(metadata.row_group(i).num_rows for i in range(begin))
        groups = list(range(begin, end))
        try:
            for batch in table.iter_batches(_ROWS, row_groups=groups, columns=[text_field]):
                for value in _values(batch.column(0)):
                    row += 1
                    yield _text(value, f"{path}, row {row}", text_field)
        except OSError as error:
            raise UserError(f"{path}: not a whole Parquet file: {error}") from None


def _parquet(path: str, file: Any) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install -e '.[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _values(column: Any) -> Iterable[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not check what it reads
        return (scalar.as_buffer().to_pybytes() if scalar.is_valid else None for scalar in column)


def _text(value: Any, where: str, text_field: str) -> str | BadDocument:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return BadDocument(f"{where}: not UTF-8 at byte {error.start} ({error.reason})")
    if isinstance(value, str):
        return value
    return BadDocument(
        f"{where}: config.data.text_field: {text_field!r} is {type(value).__name__}, not a string"
    )


def array_record_count(path: str) -> int:
    """Return the number of records in an ArrayRecord file."""
    with _array_record(path) as reader:
        return reader.num_records()


def read_array_record(
    path: str, text_field: str, begin: int = 0, end: int | None = None
) -> Iterator[str | BadDocument]:
    """Yield the texts of records `begin` to `end` of an ArrayRecord file.

    The first record tells how to read all: as a serialized `tf.train.Example` with the feature
    `text_field`, as a JSON object with the field `text_field`, or else as UTF-8 text.

    Raises:
      UserError: the file is not an ArrayRecord file, or is damaged.
    """
    with _array_record(path) as reader:
        count = reader.num_records()
        end = count if end is None else end
        decode = None
        for start in range(begin, end, _ROWS):
            try:
                if decode is None:
                    decode = _record_decoder(reader.read([0])[0], text_field)
                records = reader.read(start, min(start + _ROWS, end))
            except (RuntimeError, ValueError, IndexError) as error:
                raise UserError(f"{path}: not a whole ArrayRecord file: {error}") from None
            for number, record in enumerate(records, start=start + 1):
                where = f"{path}, record {number}"
                try:
                    yield decode(record)
                except UnicodeDecodeError as error:
                    yield BadDocument(f"{where}: not UTF-8 at byte {error.start} ({error.reason})")
                except (ValueError, RecursionError, IndexError) as error:
                    yield BadDocument(f"{where}: {error}")


@contextlib.contextmanager
def _array_record(path: str) -> Iterator[Any]:
    """Open an ArrayRecord file; one in a bucket is copied to a temporary file."""
    from array_record.python import array_record_module  # a dependency of grain

    with contextlib.ExitStack() as stack:
        local = path
        if is_bucket(path):
            copy = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".array_record"))
            with open_binary(path) as file:
                shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            local = copy.name
        try:
            reader = array_record_module.ArrayRecordReader(local)
            reader.num_records()
            if not reader.ok():
                reader.close()  # raises the reason
        except Exception as error:  # an absl status
            raise UserError(f"{path}: not a whole ArrayRecord file: {error}") from None
        stack.callback(reader.close)
        yield reader


def _record_decoder(record: bytes, text_field: str) -> Any:
    if _example_text(record, text_field) is not None:
        return functools.partial(_text_of_example, text_field=text_field)
    try:
        json_text(json.loads(record), text_field)
    except (ValueError, RecursionError):
        return bytes.decode
    return lambda record: json_text(json.loads(record), text_field)


def _text_of_example(record: bytes, text_field: str) -> str:
    text = _example_text(record, text_field)
    if text is None:
        raise BadDocument(f"not a tf.train.Example with one text in feature {text_field!r}")
    return text.decode()


def _example_text(record: bytes, text_field: str) -> bytes | None:
    """Return the bytes in a feature of a serialized tf.train.Example, or None if it is not one.

    Example {1: Features {1: map entries {1: name, 2: Feature {1: BytesList {1: bytes}}}}}
    """
    try:
        for features in _fields(record):
            for entry in _fields(features):
                name, feature = _fields(entry, numbers=(1, 2))
                if name == text_field.encode():
                    (values,) = _fields(feature)
                    (text,) = _fields(values)
                    return text
    except (ValueError, IndexError):
        pass
    return None


def _fields(message: bytes, numbers: tuple[int, ...] = (1,)) -> list[bytes]:
    """Return the length-delimited fields of a protocol buffer; a ValueError if it has others."""
    found, position = [], 0
    while position < len(message):
        tag, size, shift = message[position], 0, 0
        if tag & 7 != 2 or tag >> 3 not in numbers:
            raise UserError("another field")
        while True:
            position += 1
            byte = message[position]
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        position += 1
        if position + size > len(message):
            raise UserError("a field that ends too late")
        found.append(message[position : position + size])
        position += size
    return found


def hub_rows(source: str) -> int:
    """Return the number of rows of a Hugging Face dataset."""
    return len(_hub_dataset(source))


def hub_fingerprint(source: str) -> str:
    """Return what `datasets` tells versions of a dataset by."""
    return _hub_dataset(source)._fingerprint


def read_hub(
    source: str, text_field: str, begin: int = 0, end: int | None = None
) -> Iterator[str | BadDocument]:
    """Yield the texts of rows `begin` to `end` of a Hugging Face dataset.

    Args:
      source: `hub:NAME`, `hub:NAME:SPLIT` or `hub:NAME:CONFIG:SPLIT` (the split is `train` if none
        is named), or a folder that `save_to_disk` wrote.
      text_field: the column that holds the text.
      begin: the first row.
      end: the row after the last; None: to the end.

    Raises:
      UserError: `datasets` is not installed, or the dataset has no such column.
      FileNotFoundError: there is no such dataset.
    """
    dataset = _hub_dataset(source)
    if text_field not in dataset.column_names:
        raise UserError(
            f"{source}: config.data.text_field: {text_field!r} is not a column of it; it has "
            f"{', '.join(map(repr, dataset.column_names))}"
        )
    rows = dataset.select_columns([text_field]).with_format(None)
    rows = rows.select(range(begin, len(rows) if end is None else end))
    row = begin
    for batch in rows.iter(_ROWS):
        for value in batch[text_field]:
            row += 1
            yield _text(value, f"{source}, row {row}", text_field)


@functools.lru_cache(maxsize=4)
def _hub_dataset(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"config.data.source: {source!r} needs datasets: pip install -e '.[hub]'"
        ) from None
    split = "train"
    try:
        if source.startswith("hub:"):
            name, *others = source.removeprefix("hub:").split(":")
            *config, split = others or [split]
            return datasets.load_dataset(name, *config, split=split)
        loaded = datasets.load_from_disk(source)
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"config.data.source: cannot read {source!r} as a Hugging Face dataset "
            f"({type(error).__name__}: {error})"
        ) from error
