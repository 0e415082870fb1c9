"""Prompt sources: a file of one of six formats, a published set, or a callable named by its import path."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from vipo.config.prompts import is_called, is_published
from vipo.foreign import foreign, resolve
from vipo.prompts.prompt import PromptError
from vipo.regular import read_regular

MOST_BYTES = 2**29
"""Of a source: the file, and what a Parquet file unpacks to."""
_BATCH = 256
# That a row counts for, beside its texts.
_ROW_BYTES = 64

Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """The rows of a source with their numbers (from 1: the line of a text file, the record elsewhere) and its SHA-256.

    The hash is of the file's bytes; of a callable's rows in canonical JSON.
    """

    rows: tuple[Row, ...]
    sha256: str


def read_source(name: str, text_key: str, root: Path, section: str = "prompts") -> Source:
    """Read every row of a source. Rows are mappings; a line of a txt file becomes ``{text_key: line}``.

    Args:
        name: file name with a known suffix (relative to `root`), or ``package.module:object``, a callable that
            takes `root` and gives an iterable of mappings.
        text_key: key that holds the prompt.
        root: folder that relative names start at.
        section: that names the source, for messages: ``prompts`` or ``prompts.eval``.

    Raises:
        PromptError: the source is missing, no regular file, larger than `MOST_BYTES`, empty, not text, not of its
            format, or the callable failed.
    """
    if is_published(name):
        return _published(name, text_key, root, section)
    if is_called(name):
        return _called(name, root, section)
    reader = _READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise PromptError(
            f"{section}.source {name!r}: choose a file that ends in {', '.join(_READERS)}, "
            "or an import path 'package.module:object'"
        )
    try:
        data = read_regular(root / name, MOST_BYTES)
    except OSError as error:
        raise PromptError(
            f"{section}.source {name}: cannot be read ({error.strerror}); give an existing file"
        ) from error
    if not data.strip():
        raise PromptError(f"{name}: is empty; write at least one prompt into it")
    return Source(tuple(reader(name, data, text_key)), hashlib.sha256(data).hexdigest())


def _published(name: str, text_key: str, root: Path, section: str) -> Source:
    # Imports the hub's client, which few prompts need.
    from vipo.prompts.published import fetch_published, published_key, published_rows

    digest, key, rows = hashlib.sha256(), published_key(name, text_key), {}
    for path, data in fetch_published(name, root, section).items():
        reader = _READERS.get(Path(path).suffix.lower())
        if reader is None:
            raise PromptError(f"{section}.source {name}: {path} is of no known format: {', '.join(_READERS)}")
        digest.update(hashlib.sha256(data).digest())
        rows[path] = [row for _, row in reader(path, data, key)]
    return Source(tuple(enumerate(published_rows(name, text_key, rows, section), start=1)), digest.hexdigest())


def _decoded(name: str, data: bytes) -> str:
    if b"\0" in data:
        raise PromptError(f"{name}: holds NUL bytes, so it is binary or UTF-16; save the prompts as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{name}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; if this is text in another encoding, "
            "convert it (iconv -f latin1 -t utf-8)"
        ) from error


def _text_rows(name: str, data: bytes, text_key: str) -> Iterator[Row]:
    # Not splitlines(), which also splits at U+2028 and other separators that may stand inside a prompt.
    for number, line in enumerate(io.StringIO(_decoded(name, data), newline=None), start=1):
        yield number, {text_key: line.removesuffix("\n")}


def _jsonl_rows(name: str, data: bytes, text_key: str) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(_decoded(name, data), newline=None), start=1):
        if not line.strip():
            yield number, {text_key: ""}
            continue
        try:
            row = json.loads(line, parse_constant=_not_json, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{name}: line {number}: is not JSON ({error}); write one JSON object a line") from error
        if not isinstance(row, dict):
            raise PromptError(f"{name}: line {number}: holds a {type(row).__name__}; write one JSON object a line")
        yield number, row


def _json_rows(name: str, data: bytes, text_key: str) -> Iterator[Row]:
    """A list of objects, or of texts."""
    try:
        rows = json.loads(_decoded(name, data), parse_constant=_not_json, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name}: is not JSON ({error}); write a list of objects") from error
    if not isinstance(rows, list):
        raise PromptError(f"{name}: holds a {type(rows).__name__}; write a list of objects or of texts")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict | str):
            raise PromptError(f"{name}: entry {number}: is a {type(row).__name__}; write objects or texts")
        yield number, {text_key: row} if isinstance(row, str) else row


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is named twice: {', '.join(repr(key) for key, _ in pairs)}")
    return found


@dataclass(frozen=True)
class _Fields:
    """How a line is cut into fields, and what to do where that fails."""

    delimiter: str
    quoting: Literal[0, 3]
    form: str
    fix: str


_CSV = _Fields(",", csv.QUOTE_MINIMAL, "CSV", "quote fields that hold commas or quotes")
# As tab-separated text is published: a quote is a character of the field, also at its start.
_TSV = _Fields("\t", csv.QUOTE_NONE, "TSV", "a tab ends a field, and quotes do not keep one together")


def _csv_rows(name: str, data: bytes, text_key: str, fields: _Fields = _CSV) -> Iterator[Row]:
    text = _decoded(name, data)
    # The module's own limit of 128 kB a field would refuse a long prompt instead of counting it.
    limit = csv.field_size_limit(len(text))
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), strict=True, delimiter=fields.delimiter, quoting=fields.quoting
        )
        records = [(reader.line_num, record) for record in reader]
    except csv.Error as error:
        raise PromptError(f"{name}: line {reader.line_num}: is not {fields.form} ({error}); {fields.fix}") from error
    finally:
        csv.field_size_limit(limit)
    header = records[0][1]
    if len(set(header)) != len(header):
        raise PromptError(f"{name}: a column is named twice in the first line: {', '.join(header)}")
    if text_key not in header:
        raise missing_key(name, text_key, header)
    for number, record in records[1:]:
        if record and len(record) != len(header):
            raise PromptError(
                f"{name}: line {number}: has {len(record)} fields, the first line names {len(header)}; {fields.fix}"
            )
        yield number, dict(zip(header, record, strict=True)) if record else {text_key: ""}


def _parquet_rows(name: str, data: bytes, text_key: str) -> Iterator[Row]:
    try:
        opened = pq.ParquetFile(pa.BufferReader(data))
        columns = opened.schema_arrow.names
        if len(set(columns)) != len(columns):
            raise PromptError(f"{name}: a column is named twice: {', '.join(columns)}")
        if text_key not in columns:
            raise missing_key(name, text_key, columns)
        yield from enumerate(_unpacked(name, opened), start=1)
    # A struct whose fields share a name is a ValueError.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PromptError(f"{name}: is not a Parquet file that can be read ({error})") from error


def _unpacked(name: str, opened: pq.ParquetFile) -> Iterator[Mapping[str, Any]]:
    # By pieces, because a small file may unpack to any size.
    size = 0
    for batch in opened.iter_batches(batch_size=_BATCH):
        size += batch.nbytes
        if size > MOST_BYTES:
            raise PromptError(f"{name}: unpacks to more than {MOST_BYTES} bytes; leave out columns or split it")
        yield from batch.to_pylist()


SET_KEY = "set prompts.text_key (of held-out prompts: prompts.eval.text_key) to"


def missing_key(name: str, text_key: str, keys: list[str]) -> PromptError:
    """The error for rows without the prompt's key; names the keys that exist."""
    return PromptError(f"{name}: has no key {text_key!r}; {SET_KEY} one of: {', '.join(keys)}")


_READERS: Mapping[str, Callable[[str, bytes, str], Iterator[Row]]] = MappingProxyType(
    {
        ".txt": _text_rows,
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".csv": _csv_rows,
        ".tsv": partial(_csv_rows, fields=_TSV),
        ".parquet": _parquet_rows,
    }
)


def find_source(name: str, section: str = "prompts") -> Callable[[Path], Any]:
    """The callable that an import path names, imported but not called yet; `section` as in `read_source`.

    Raises:
        PromptError: there is none.
    """
    found: Any = resolve(name, PromptError, f"{section}.source {name}")
    if not callable(found):
        raise PromptError(f"{section}.source {name}: a {type(found).__name__} is not callable")
    source: Callable[[Path], Any] = found
    return source


def _called(name: str, root: Path, section: str) -> Source:
    source, digest, rows, size = find_source(name, section), hashlib.sha256(), [], 0
    # The rows too are made by it, one by one, and may be mappings of its own.
    with foreign(PromptError, f"{section}.source {name}", name):
        for number, row in enumerate(source(root), start=1):
            if not isinstance(row, Mapping):
                raise PromptError(
                    f"{section}.source {name}: row {number}: is a {type(row).__name__}; a prompt source gives mappings"
                )
            plain = dict(row)
            rows.append((number, plain))
            # What never ends would fill the memory; an empty row takes some of it, too.
            size += _ROW_BYTES + sum(len(value) for value in plain.values() if isinstance(value, str))
            if size > MOST_BYTES:
                raise PromptError(
                    f"{section}.source {name}: has not ended after {number} rows, and {MOST_BYTES // 2**20} MiB are "
                    "the most that are read; let it end before"
                )
    for number, kept in rows:
        digest.update(json_line(name, number, kept).encode())
    return Source(tuple(rows), digest.hexdigest())


def json_line(name: str, number: int, value: Any) -> str:
    """`value` as one line of canonical JSON with its newline.

    Raises:
        PromptError: it holds something that JSON (in UTF-8) cannot: a date, bytes, NaN, a lone surrogate.
    """
    try:
        line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        line.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            f"{name}: row {number}: cannot be kept as JSON ({error}); change or leave out that key"
        ) from error
    return line
