"""Files in and out: what is read is bounded before memory is taken, and faults are named without quoting the text;
what is written is the old file or the new one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

LONGEST_LINE = 2**20  # bytes of a JSON line: more is no report
LONGEST_ID = 1000  # characters: messages show ids
LARGEST_JSON = 2**20  # bytes of a JSON file, unless more is allowed


def some(items: Sequence[object], limit: int = 5) -> str:
    shown = [f"{item!s:.{LONGEST_ID}}" for item in items[:limit] or ["none"]]
    return ", ".join(shown) + f" and {len(items) - limit} more" * (len(items) > limit)


def raise_if(problems: list[str], limit: int = 20) -> None:
    if problems:
        more = [f"... and {len(problems) - limit} more"] * (len(problems) > limit)
        raise ValueError("\n  ".join(["the input cannot be used:", *problems[:limit], *more]))


def read_json(path: Path, *, most: int = LARGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes.

    Raises FileNotFoundError, and ValueError, naming the file, for what is no object, too deep, not UTF-8, or holds a
    key twice or a number that is not finite.
    """
    if not path.is_file() and path.exists():
        raise ValueError(f"{path}: expected a file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path}: {size:,} bytes; expected at most {most:,}")
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_each_once, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON (not UTF-8 at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # of the hooks below, or a number of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:80]!r} stands there twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def check_links(folder: Path) -> None:
    """ValueError if a file of a model or adapter folder is none, or a link that leads out of the folder.

    A downloaded folder with such a link would have us read, and copy beside the trained weights, what lies elsewhere on
    this machine. The links of Hugging Face's cache (snapshots/<commit>/file -> blobs/<hash>) are all right, and so is
    a link to the folder itself.
    """
    root = folder.resolve()
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    for file in sorted(entry for place in (root, root / "original") if place.is_dir() for entry in place.iterdir()):
        target = file.resolve() if file.is_symlink() else file
        if not any(target.is_relative_to(place) for place in (root, *blobs)):
            raise ValueError(f"{folder / file.relative_to(root)}: a link out of its folder; put the file itself there")
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(f"{folder / file.relative_to(root)}: neither a file nor a folder; remove it")


def lines_of(stream: BinaryIO, seen: Callable[[bytes], object] = len) -> Iterator[bytes]:
    """The lines of a file; of one that is too long only the first LONGEST_LINE + 1 bytes, for the caller to refuse.

    `seen` is called with every byte of the file, in order.
    """
    while line := stream.readline(LONGEST_LINE + 1):
        seen(line)
        rest = line
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE + 1)
            seen(rest)
        yield line


def read_jsonl(path: Path, fields: Sequence[str], problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows whose `fields` are strings, not empty but for `prediction`. Others go into `problems`."""
    rows, before = [], len(problems)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(lines_of(file), 1):
                if not line.strip():
                    continue
                if len(line) > LONGEST_LINE:
                    problems.append(f"{path} line {number}: longer than {LONGEST_LINE:,} bytes; that is no report")
                    continue
                try:
                    row = dict(json.loads(line.decode("utf-8-sig")))
                    # Half a surrogate pair is no text, and NaN could not be written again.
                    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
                except (ValueError, TypeError, RecursionError) as error:
                    reason = getattr(error, "msg", None) or getattr(error, "reason", "not an object, or too deep")
                    problems.append(f"{path} line {number}: invalid JSON ({reason}); write one object a line, in UTF-8")
                    continue
                if isinstance(key := row.get("id"), str) and len(key) > LONGEST_ID:
                    problems.append(f"{path} line {number}: id must have at most {LONGEST_ID} characters")
                elif wrong := [
                    key
                    for key in fields
                    if not isinstance(row.get(key), str) or not (row[key].strip() or key == "prediction")
                ]:
                    problems.append(
                        f"{path} line {number}: {', '.join(wrong)} must be given as a string, not empty "
                        "(only prediction may be); complete the row or delete it"
                    )
                else:
                    rows.append((number, row))
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); check the path")
    if not rows and len(problems) == before:
        problems.append(f"{path}: holds no rows; expected one JSON object a line")
    return rows


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one file, checked as by `read_jsonl`; ValueError lists the faulty lines."""
    problems: list[str] = []
    rows = [row for _, row in read_jsonl(path, fields, problems)]
    raise_if(problems)
    return rows


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[IO[str]]:
    """A text file to write, under a name beside `path`; renamed at the end, removed where that is not reached.

    `private`: for the owner's eyes only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves an empty file under the name
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Write a file, or a folder's entries, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    with replacing(path, private=private) as file:
        file.write(text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], *, private: bool = False) -> None:
    """One JSON object a line. A number that JSON does not know (NaN) raises ValueError."""
    with replacing(path, private=private) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
