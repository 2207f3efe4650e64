"""Read exports of radiology reports: CSV, TSV, JSON lines, Parquet, folders of plain text, each also .gz or .zst.

The reading process only cuts files into chunks of rows; `records` turns a chunk into records, in whatever process has
time for it. What cannot be read becomes a `Bad` with its line, and the reading goes on.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

CHUNK_ROWS = 2000
CHUNK_BYTES = 16 * 2**20  # a chunk is closed earlier when its rows are this long
LONGEST_LINE = 16 * 2**20  # bytes of a JSON line: more is no report

# What a record may hold -> the columns that are taken for it where none is named.
GUESSES = {
    "id": "id report_id study_id uid accession accession_number exam_id name",
    "text": "text report report_text full_report full_text",
    "findings": "findings finding",
    "impression": "impression impressions conclusion",
    "patient_id": "patient_id patient subject_id patientid mrn pid",
    "study_date": "study_date date exam_date studydate report_date",
    "modality": "modality",
    "body_part": "body_part bodypart body_part_examined anatomy region",
    "indication": "indication clinical_indication history clinical_history",
    "comparison": "comparison",
}
FIELDS = tuple(GUESSES)
TEXTS = ("text", "findings", "impression", "indication", "comparison")
PLAIN = ("name", "folder", "text")  # the columns of a plain-text file: its path, its folder's name, what it holds
_KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
_EXTRA = "pip install 'radllama[reports]'"

# A stream that ends too soon, or is no such stream at all. zstandard's own error is an Exception and is turned into
# an EOFError below.
_BROKEN = (EOFError, zlib.error, OSError)


@dataclass(frozen=True, slots=True)
class Bad:
    """A row, or the rest of a file, that could not be read. `text`: what can be shown of it."""

    reason: str  # undecodable, ragged_row, malformed_row, bad_json, wrong_type, truncated_file, unreadable_file
    detail: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """How to read: field -> column for what is named, the rest is guessed; the text encoding; CSV's delimiter."""

    names: tuple[tuple[str, str], ...] = ()
    encoding: str = "utf-8"
    delimiter: str = ""  # "": a comma, in a .tsv a tab


@dataclass(frozen=True, slots=True)
class Source:
    """One file. `name` is what messages and the quarantine call it, `plain` the id of a plain-text file."""

    path: Path
    name: str
    kind: str
    packing: str  # "", ".gz", ".zst"
    plain: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one file (of several, if plain text), each with its first line; `header` names their columns."""

    source: str
    kind: str
    header: tuple[str, ...]
    mapping: tuple[tuple[str, str], ...]  # field -> column
    rows: list[tuple[int, Any]]  # list[str] | tuple | bytes | (name, folder, bytes) | Bad


def sources(inputs: Iterable[str | Path]) -> Iterator[Source]:
    """The files to read, one at a time (there may be millions), folders in sorted order.

    ValueError for a path that is missing or of no known kind.
    """
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if path.is_file() and not _kind(path)[0]:
            raise ValueError(f"{path}: unknown kind of file; expected a name ending in {_known()}")
        count = 0
        for file in _walk(path) if path.is_dir() else [path]:
            kind, packing = _kind(file)
            if not kind:
                continue
            count += 1
            plain = (file.relative_to(path) if path.is_dir() else Path(file.name)).as_posix()
            plain = plain[: len(plain) - len(packing) - len(".txt")] if kind == "text" else ""
            yield Source(file, file.as_posix(), kind, packing, plain)
        if not count:
            raise ValueError(f"{path}: holds no reports; expected files {_known()}")


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def total_bytes(inputs: Iterable[str | Path]) -> int:
    """Of all files, as they are on disk; the same errors as `sources`."""
    return sum(source.path.stat().st_size for source in sources(inputs))


def _known() -> str:
    return ", ".join(_KINDS) + " (each also .gz or .zst)"


def _kind(path: Path) -> tuple[str, str]:
    name = path.name.lower()
    packing = next((p for p in (".gz", ".zst") if name.endswith(p)), "")
    return _KINDS.get(Path(name.removesuffix(packing)).suffix, ""), packing


# ---- streams


class _Zstandard(io.RawIOBase):
    """A .zst file, decompressed. zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            self.library = import_module("zstandard")
        except ImportError:
            raise ValueError(f"reading .zst files needs zstandard: {_EXTRA}") from None
        self.raw, self.ready, self.decoder = raw, b"", self.library.ZstdDecompressor().decompressobj()
        self.inside = False  # a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.decoder.unused_data if self.decoder.eof else b""
            if self.decoder.eof:  # frames may follow each other
                self.decoder, self.inside = self.library.ZstdDecompressor().decompressobj(), False
            packed = packed or self.raw.read(1 << 17)
            if not packed:
                if self.inside:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self.inside = True
            try:
                self.ready = self.decoder.decompress(packed)
            except self.library.ZstdError as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def _unpacked(raw: BinaryIO, packing: str) -> BinaryIO:
    if packing == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if packing == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(raw), 1 << 17))
    return raw


# ---- rows: each reader yields (first line, row), a Bad for a row included


def _csv_rows(stream: BinaryIO, encoding: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """The header first, as a tuple."""
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    text = io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="")
    try:
        yield from _csv_values(text, encoding.removesuffix("-sig"), delimiter)
    finally:
        if not stream.closed:
            text.detach()  # or it would close the stream, whose place the caller wants to know


def _csv_values(text: io.TextIOWrapper, encoding: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(text, delimiter=delimiter)
    header: tuple[str, ...] | None = None
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Bad("malformed_row", f"lines {line} to {reader.line_num}: {error}")
            continue
        except _BROKEN as error:
            yield line, Bad("truncated_file", str(error))
            return
        if not row:
            continue
        if header is None:
            header = tuple(name.strip() for name in row)
            yield line, header
        elif len(row) != len(header):
            shown = _shown(delimiter.join(row))
            yield line, Bad("ragged_row", f"{len(row)} values in {len(header)} columns", shown)
        elif any(not value.isascii() and not encodable(value) for value in row):
            yield line, Bad("undecodable", f"not {encoding}", _shown(delimiter.join(row)))
        else:
            yield line, row


def encodable(text: str) -> bool:
    """Whether a text is Unicode: no half of a surrogate pair, and no byte that stands for itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _json_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    line = 0
    while True:
        line += 1
        try:
            row = stream.readline(LONGEST_LINE)
        except _BROKEN as error:
            yield line, Bad("truncated_file", str(error))
            return
        if not row:
            return
        if row.strip():
            yield line, row


def _parquet_rows(path: Path, packing: str) -> Iterator[tuple[int, Any]]:
    """The header first, as a tuple. Rows are numbered from 1."""
    try:
        duckdb = import_module("duckdb")
    except ImportError:
        raise ValueError(f"reading Parquet needs duckdb: {_EXTRA}") from None
    with tempfile.TemporaryDirectory(prefix="radllama-") as folder:
        number = 0
        try:
            if packing:
                plain = Path(folder) / "file.parquet"
                with path.open("rb") as raw, plain.open("wb") as copy:
                    shutil.copyfileobj(_unpacked(raw, packing), copy)
                path = plain
            with duckdb.connect(config={"memory_limit": "400MB", "threads": 1, "temp_directory": folder}) as engine:
                names = engine.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(path)]).fetchall()
                yield 0, tuple(str(name) for name, *_ in names)
                rows = engine.execute("SELECT * FROM read_parquet(?)", [str(path)])
                while batch := rows.fetchmany(CHUNK_ROWS):
                    for row in batch:
                        number += 1
                        yield number, row
        except (*_BROKEN, duckdb.Error) as error:
            reason = "truncated_file" if number else "unreadable_file"
            yield number + 1, Bad(reason, str(error).splitlines()[0])


# ---- chunks


def chunks(files: Iterable[Source], columns: Columns) -> Iterator[tuple[Chunk, int]]:
    """Chunks in the order of the files, each with the bytes read so far of what is on disk.

    Raises ValueError for columns that a file lacks, naming those it has.
    """
    done = 0
    texts: list[tuple[int, Any]] = []
    size = 0
    plain: Callable[[list[tuple[int, Any]]], Chunk] | None = None
    for file in files:
        if file.kind == "text":
            plain = plain or partial(Chunk, "", "text", PLAIN, resolve(columns, PLAIN, file.name))
            row = _text_row(file)
            texts.append((1, row))
            size += len(row[2]) if len(row) == 4 else 0
            done += file.path.stat().st_size
            if len(texts) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield plain(texts), done
                texts, size = [], 0
            continue
        with file.path.open("rb") as raw:
            for chunk in _file_chunks(file, raw, columns):
                yield chunk, done + raw.tell()
        done += file.path.stat().st_size
    if plain and texts:
        yield plain(texts), done


def _text_row(file: Source) -> Any:
    """(name, folder, bytes, source) of a plain-text file; or (Bad, source)."""
    try:
        with file.path.open("rb") as raw:
            return file.plain, file.path.parent.name, _unpacked(raw, file.packing).read(), file.name
    except _BROKEN as error:
        return Bad("truncated_file", str(error)), file.name


def _file_chunks(file: Source, raw: BinaryIO, columns: Columns) -> Iterator[Chunk]:
    header: tuple[str, ...] = ()
    if file.kind == "json":
        rows = _json_rows(_unpacked(raw, file.packing))
    elif file.kind == "parquet":
        rows = _parquet_rows(file.path, file.packing)
    else:
        tabs = file.path.name.lower().removesuffix(file.packing).endswith(".tsv")
        rows = _csv_rows(_unpacked(raw, file.packing), columns.encoding, columns.delimiter or ("\t" if tabs else ","))
    batch: list[tuple[int, Any]] = []
    size = 0
    mapping: tuple[tuple[str, str], ...] = ()

    def chunk() -> Chunk:
        nonlocal mapping, header
        if not mapping and file.kind == "json":  # keys may differ from line to line: all of the first chunk count
            header = tuple(_keys(row for _, row in batch))
            mapping = resolve(columns, header, file.name) if header else ()
        return Chunk(file.name, file.kind, header, mapping, batch)

    for line, row in rows:
        if file.kind != "json" and not header and not isinstance(row, Bad):
            header, mapping = row, resolve(columns, row, file.name)
            continue
        batch.append((line, row))
        size += len(row) if isinstance(row, bytes) else 0 if isinstance(row, Bad) else _length(row)
        if len(batch) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk()
            batch, size = [], 0
    if batch:
        yield chunk()


def _length(row: Iterable[Any]) -> int:
    return sum([len(value) for value in row if isinstance(value, str)])


def _keys(lines: Iterable[Any]) -> dict[str, None]:
    keys: dict[str, None] = {}
    for line in lines:
        row = _load(line) if isinstance(line, bytes) else line
        if isinstance(row, dict):
            keys |= dict.fromkeys(row)
    return keys


def resolve(columns: Columns, available: Iterable[str], source: str) -> tuple[tuple[str, str], ...]:
    """Field -> column: the named ones, and a guess for the rest. ValueError where a named one is missing."""
    there = list(available)
    named = dict(columns.names)
    shown = ", ".join(repr(name) for name in there)
    if missing := [f"{column!r} (for {field})" for field, column in named.items() if column not in there]:
        hint = (
            "; is the delimiter right (--delimiter)?" if len(there) == 1 and any(c in there[0] for c in ";|\t") else ""
        )
        raise ValueError(f"{source}: no column {', '.join(missing)}; the columns there are: {shown}{hint}")
    if "text" in named and {"findings", "impression"} & named.keys():
        raise ValueError("name either one text column (--text) or --findings and --impression, not both")
    lower = {name.lower().replace(" ", "_").replace("-", "_"): name for name in reversed(there)}
    for field, guesses in GUESSES.items():
        found = next((lower[guess] for guess in guesses.split() if guess in lower), None)
        if field not in named and found is not None and found not in named.values():
            named[field] = found
    if "text" in named and {"findings", "impression"} <= named.keys():
        if "text" in dict(columns.names):
            del named["findings"], named["impression"]
        else:
            del named["text"]
    if "text" not in named and not {"findings", "impression"} <= named.keys():
        raise ValueError(
            f"{source}: found no report text; name its column with --text, or two with --findings and --impression; "
            f"the columns there are: {shown}"
        )
    return tuple(sorted(named.items()))


# ---- records


def records(chunk: Chunk, encoding: str) -> Iterator[tuple[str, int, dict[str, str] | Bad]]:
    """(source, line, record) of each row; a record has the keys of FIELDS that its row has, all values texts."""
    stem = Path(chunk.source).name.split(".")[0]
    places = [(field, chunk.header.index(column)) for field, column in chunk.mapping] if chunk.kind != "json" else []
    for line, row in chunk.rows:
        source = chunk.source
        if chunk.kind == "text":
            source = row[-1]
            row = row[0] if len(row) == 2 else _text_values(row, encoding)
        if isinstance(row, Bad):
            yield source, line, row
            continue
        if isinstance(row, bytes):
            loaded = _load(row)
            if isinstance(loaded, Bad):
                yield source, line, loaded
                continue
            record = {field: loaded.get(column) for field, column in chunk.mapping}
        else:
            record = {field: row[place] for field, place in places}
        wrong = [field for field in TEXTS if field in record and not isinstance(record[field], str | None)]
        if wrong and any(isinstance(record[field], list | dict | tuple | bytes | bool) for field in wrong):
            yield source, line, Bad("wrong_type", f"{', '.join(wrong)}: expected a text")
            continue
        texts = {field: value if type(value) is str else _as_text(value) for field, value in record.items()}
        texts["id"] = texts.get("id", "").strip() or f"{stem}-{line}"
        yield source, line, texts


def _text_values(row: tuple[str, str, bytes, str], encoding: str) -> tuple[str, str, str] | Bad:
    try:
        return row[0], row[1], row[2].decode("utf-8-sig" if encoding.lower() == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        return Bad("undecodable", f"not {encoding} (byte {error.start})", row[2].decode("utf-8", "replace"))


def _load(line: bytes) -> Any:
    """The JSON object, or a Bad."""
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError as error:
        return Bad("undecodable", f"not UTF-8 (byte {error.start})", line.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        return Bad("bad_json", f"column {error.colno}: {error.msg}", line.decode("utf-8", "replace"))
    except RecursionError:
        return Bad("bad_json", "nested too deeply")
    except ValueError:
        return Bad("bad_json", "a number of thousands of digits")
    if not isinstance(row, dict):
        return Bad("bad_json", f"expected an object, found {type(row).__name__}", line.decode("utf-8", "replace"))
    return row


def _as_text(value: Any) -> str:
    if value is None or value != value:  # NaN stands for "missing" in many exports
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    return str(value)
