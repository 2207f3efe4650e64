"""files.py: faulty JSON lines are named; a write that fails leaves what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from radllama.files import read_rows, replace_text, write_rows


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "line 1"), ('{"id": "a"}\n{"id": 1}\n', "line 2: id"), ("[1]\n", "line 1"), ("\n\n", "no rows")],
)
def test_rows_that_cannot_be_read(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        read_rows(tmp_path / "rows.jsonl", ("id",))
    assert "rows.jsonl" in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"text": "Zweck – ß"}])
    assert read_rows(path, ("text",)) == [{"text": "Zweck – ß"}]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rows(path, [{"good": 1}, {"bad": object()}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_rows(path, [{"bad": float("nan")}])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_private_files_are_the_owners_alone(tmp_path: Path) -> None:
    replace_text(tmp_path / "new" / "a", "x", private=True)
    assert (tmp_path / "new" / "a").stat().st_mode & 0o077 == 0
    replace_text(tmp_path / "b", "x")
    replace_text(tmp_path / "b", "line\r\n")
    assert (tmp_path / "b").read_bytes() == b"line\r\n"
