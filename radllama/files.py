"""Files in and out: JSON lines with all their faults named, and writing that leaves the old file or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def some(items: Sequence[object], limit: int = 5) -> str:
    return ", ".join(map(str, items[:limit] or ["none"])) + f" and {len(items) - limit} more" * (len(items) > limit)


def raise_if(problems: list[str], limit: int = 20) -> None:
    if problems:
        more = [f"... and {len(problems) - limit} more"] * (len(problems) > limit)
        raise ValueError("\n  ".join(["the input cannot be used:", *problems[:limit], *more]))


def read_jsonl(path: Path, fields: Sequence[str], problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows whose `fields` are strings, not empty but for `prediction`. Others go into `problems`."""
    rows, before = [], len(problems)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = dict(json.loads(line.decode("utf-8-sig")))
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                except (ValueError, TypeError, RecursionError) as error:
                    reason = getattr(error, "msg", None) or getattr(error, "reason", "not an object, or too deep")
                    problems.append(f"{path} line {number}: invalid JSON ({reason}); write one object a line, in UTF-8")
                    continue
                if wrong := [
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
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    with replacing(path, private=private) as file:
        file.write(text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], *, private: bool = False) -> None:
    """One JSON object a line. A number that JSON does not know (NaN) raises ValueError."""
    with replacing(path, private=private) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
