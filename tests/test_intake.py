"""intake.py through the whole preparation: formats, columns, and input that cannot be read."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import duckdb
import pytest
import zstandard
from report_tables import IDS, Row, columns, everything, lines, rows, write_csv

from radllama import duplicates, intake
from radllama.reports import Settings, main, prepare


def packed(path: Path, how: str) -> Path:
    content = path.read_bytes()
    target = path.with_name(path.name + how)
    target.write_bytes(gzip.compress(content) if how == ".gz" else zstandard.compress(content))
    path.unlink()
    return target


def written(table: list[Row], folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind in (".csv", ".tsv"):
        return write_csv(folder / f"in{kind}", table, "\t" if kind == ".tsv" else ",")
    if kind == ".jsonl":
        path = folder / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
        return path
    if kind == ".parquet":
        write_csv(folder / "in.csv", table)
        query = f"COPY (FROM read_csv('{folder}/in.csv', all_varchar=true)) TO '{folder}/in.parquet' (FORMAT parquet)"
        duckdb.sql(query)
        return folder / "in.parquet"
    for row in table:
        (folder / row["mrn"]).mkdir(exist_ok=True)
        text = f"FINDINGS: {row['findings']}\n\nIMPRESSION: {row['impression']}\n"
        (folder / row["mrn"] / f"{row['uid']}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet", "folder"])
def test_all_formats_give_the_same_pairs(tmp_path: Path, kind: str, how: str) -> None:
    table = rows(60)
    prepare([write_csv(tmp_path / "plain.csv", table)], tmp_path / "plain", Settings(columns=IDS))
    source = written(table, tmp_path / "source", kind)
    if how and kind == "folder":
        for file in list(source.rglob("*.txt")):
            packed(file, how)
    elif how:
        source = packed(source, how)
    given = IDS if kind != "folder" else columns(patient_id="folder")
    prepare([source], tmp_path / "out", Settings(columns=given))

    def texts(folder: Path) -> list[tuple[str, str, str]]:
        found = [(row["id"].split("/")[-1], row["findings"], row["impression"]) for row in everything(folder)]
        return sorted(found)

    if kind == "folder":  # files come in the order of their names, so that other copies are the first
        unique = {text[1:] for text in texts(tmp_path / "plain")}
        assert {text[1:] for text in texts(tmp_path / "out")} == unique
    else:
        assert texts(tmp_path / "out") == texts(tmp_path / "plain")


def test_a_wrong_column_names_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_csv(tmp_path / "a.csv", rows(3)))
    assert main([source, "--out", str(tmp_path / "out"), "--id", "nope"]) == 2
    message = capsys.readouterr().err
    for told in ("a.csv", "'nope' (for id)", "'uid'", "'mrn'", "'findings'"):
        assert told in message
    (tmp_path / "b.csv").write_text("a;b\n1;2\n", encoding="utf-8")
    assert main([str(tmp_path / "b.csv"), "--out", str(tmp_path / "out"), "--text", "b"]) == 2
    assert "--delimiter" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert main([str(tmp_path / "c.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "found no report text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.csv"], "no such file or folder"),
        (["a.docx"], "unknown kind of file"),
        (["empty"], "holds no reports"),
        (["a.csv", "--shares", "9/1"], "--shares"),
        (["a.csv", "--near", "0.2"], "--near"),
        (["a.csv", "--test-from", "soon"], "--test-from"),
        (["a.csv", "--columns", "map.json"], "unknown field"),
        (["a.csv", "--text", "findings", "--findings", "findings"], "not both"),
        (["a.csv", "--surrogates", "--deid", "redact"], "--key-file"),
        (["a.csv", "--workers", "0"], "--workers"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "a.csv", rows(3))
    (tmp_path / "a.docx").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "map.json").write_text('{"patient": "mrn"}', encoding="utf-8")
    assert main([*arguments, "--out", "out"]) == 2
    assert told in capsys.readouterr().err


def test_a_column_file(tmp_path: Path) -> None:
    source = str(write_csv(tmp_path / "a.csv", rows(20)))
    (tmp_path / "map.json").write_text('{"id": "uid", "patient_id": "mrn"}', encoding="utf-8")
    assert main([source, "--out", str(tmp_path / "a"), "--columns", str(tmp_path / "map.json")]) == 0
    assert {row["id"] for row in everything(tmp_path / "a")} <= {f"r{k}" for k in range(20)}


def test_bad_rows_go_to_quarantine(tmp_path: Path) -> None:
    table = rows(50)
    text = write_csv(tmp_path / "a.csv", table).read_text(encoding="utf-8").splitlines()
    text[3] += ",one too many"
    text[5] = text[5].replace("r4", "r\udce9")
    (tmp_path / "a.csv").write_text("\n".join(text) + "\n", encoding="utf-8", errors="surrogateescape")
    good = [json.dumps(row | {"uid": "j" + row["uid"]}) for row in rows(50, seed=1)]
    good[2] = good[2][:-5]
    good[4] = "[1, 2]"
    good[6] = json.dumps({"uid": "x", "findings": ["a", "list"], "impression": "No disease."})
    (tmp_path / "b.jsonl").write_bytes("\n".join(good).encode() + b'\n{"uid": "\xff"}\n')
    content = gzip.compress(
        ("\n".join(json.dumps(row | {"uid": "z" + row["uid"]}) for row in rows(50, seed=2))).encode()
    )
    (tmp_path / "c.jsonl.gz").write_bytes(content[:-40])
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "f.txt").write_bytes(b"FINDINGS: \xff\xfe")
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"FINDINGS: all well")[:-4])
    files = [tmp_path / name for name in ("a.csv", "b.jsonl", "c.jsonl.gz", "e.parquet", "f.txt", "g.txt.gz")]
    prepare(files, tmp_path / "out", Settings(max_bad=0.2))
    gone = [row for row in lines(tmp_path / "out" / "quarantine.jsonl") if row["reason"] not in duplicates.REASONS]
    bad = {(Path(row["source"]).name, row["line"], row["reason"]) for row in gone}
    last = max(line for name, line, _ in bad if name == "c.jsonl.gz")
    assert bad == {
        ("a.csv", 4, "ragged_row"), ("a.csv", 6, "undecodable"), ("b.jsonl", 3, "bad_json"), ("b.jsonl", 5, "bad_json"),
        ("b.jsonl", 7, "wrong_type"), ("b.jsonl", 51, "undecodable"), ("c.jsonl.gz", last, "truncated_file"),
        ("e.parquet", 1, "unreadable_file"), ("f.txt", 1, "undecodable"), ("g.txt.gz", 1, "truncated_file"),
    }  # fmt: skip
    assert len(everything(tmp_path / "out")) > 90


def test_a_truncated_zst_is_noticed(tmp_path: Path) -> None:
    plain = "\n".join(json.dumps(row) for row in rows(3000)).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(plain)[:-300])
    prepare([tmp_path / "a.jsonl.zst"], tmp_path / "out", Settings(near=0))
    assert "truncated_file" in {row["reason"] for row in lines(tmp_path / "out" / "quarantine.jsonl")}
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(plain) + zstandard.compress(b"\n" + plain))  # two frames
    summary = prepare([tmp_path / "b.jsonl.zst"], tmp_path / "two", Settings(near=0))
    assert summary["stages"][0]["reports"] == summary["stages"][1]["reports"] == 6000


def test_too_many_bad_rows_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_csv(tmp_path / "a.csv", rows(20)).read_text(encoding="utf-8").splitlines()
    text[3:6] = [line + ",x" for line in text[3:6]]
    (tmp_path / "a.csv").write_text("\n".join(text), encoding="utf-8")
    run = [str(tmp_path / "a.csv"), "--out", str(tmp_path / "out"), "--id", "uid", "--patient", "mrn"]
    assert main(run) == 2
    assert "3 of 20 rows cannot be read (ragged_row 3), more than --max-bad 0.05 allows" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert main([*run, "--max-bad", "0.2"]) == 0


def test_a_multi_line_field_keeps_its_line(tmp_path: Path) -> None:
    table = rows(6)
    table[0]["findings"] = table[0]["findings"].replace(". ", ".\n")
    table[2]["impression"] = ""
    prepare([write_csv(tmp_path / "a.csv", table)], tmp_path / "a", Settings(columns=IDS))
    assert [row["line"] for row in lines(tmp_path / "a" / "quarantine.jsonl")] == [7]


def test_other_encodings(tmp_path: Path) -> None:
    table = rows(6)
    table[0]["findings"] += " Café au lait spot."
    path = write_csv(tmp_path / "a.csv", table)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    prepare([path], tmp_path / "a", Settings(columns=IDS))
    path.write_text(path.read_text(encoding="utf-8-sig"), encoding="cp1252")
    prepare([path], tmp_path / "b", Settings(columns=intake.Columns(IDS.names, "cp1252")))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert "Café" in everything(tmp_path / "a")[0]["findings"] or len(everything(tmp_path / "a")) == 6


def test_csv_of_strings_with_everything() -> None:
    """Quotes, delimiters and line ends inside a field come back as they were written."""
    stream = io.BytesIO(b'a,b\r\n"x,""y""\nz",2\r\n')
    assert list(intake._csv_rows(stream, "utf-8", ",")) == [(1, ("a", "b")), (2, ['x,"y"\nz', "2"])]
