"""reports.py and its card: many reports, from exports to splits; workers, kills, stale states."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_tables import IDS, OUTPUTS, everything, lines, outputs, reasons, rows, write_csv

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "assets"), str(ROOT / "bench")]
import make_raw  # noqa: E402
import prepare as bench  # noqa: E402

from radllama import deid, duplicates, intake, reports, store  # noqa: E402
from radllama.data import read_examples  # noqa: E402
from radllama.reports import Options, Settings, main, prepare, pseudonym  # noqa: E402
from radllama.sections import leaks  # noqa: E402


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_csv(tmp_path / "export.csv", rows(400))
    arguments = [str(source), "--out", str(tmp_path / "out"), "--id", "uid", "--patient", "mrn", "--shares", "70/10/20"]
    assert main(arguments) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(OUTPUTS)
    found = {name: read_examples(tmp_path / "out" / f"{name}.jsonl") for name in duplicates.SPLITS}
    assert {"train", "validation", "test"} == {name for name, examples in found.items() if examples}
    gone = lines(tmp_path / "out" / "quarantine.jsonl")
    assert sum(map(len, found.values())) + len(gone) == 400
    assert {row["reason"] for row in gone} <= {"duplicate_across_splits", "copies_over_cap", "near_held_out"}
    patients = [{example.fields["patient_id"] for example in examples} for examples in found.values()]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]
    texts = [{duplicates.normalise(e.findings) for e in examples} for examples in found.values()]
    assert not texts[0] & (texts[1] | texts[2])
    assert not any(leaks(e.impression, e.findings) for examples in found.values() for e in examples)
    assert "m1" not in {name for side in patients for name in side}  # numbers, no record numbers
    assert "400  read" in capsys.readouterr().out


def test_funnel_and_card(tmp_path: Path) -> None:
    table = rows(60)
    table[3]["impression"] = ""
    table[4]["findings"] = "Clear lungs."
    table[5]["findings"] += " Seen by Dr. Jane Miller."
    table[6]["impression"] = "Unchanged from the prior study."
    source = write_csv(tmp_path / "export.csv", table)
    summary = prepare([source], tmp_path / "out", Settings(columns=IDS))
    written = json.loads((tmp_path / "out" / "funnel.json").read_text(encoding="utf-8"))
    assert written == summary
    stages = summary["stages"]
    assert [stage["reports"] for stage in stages[:5]] == [60, 60, 59, 58, 57]
    assert stages[2]["dropped"] == {"no_impression": 1}
    assert stages[3]["dropped"] == {"short_findings": 1}
    assert stages[4]["dropped"] == {"identifier": 1}
    assert stages[5]["reports"] == sum(split["reports"] for split in summary["splits"].values())
    assert summary["identifiers"]["quarantined"] == {"name": 1}
    assert summary["contamination"]["now"]["test"]["same pair"] == 0
    assert sum(split["flags"].get("prior", 0) for split in summary["splits"].values()) == 1
    assert (tmp_path / "out" / "funnel.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out" / "DATASET.md").read_text(encoding="utf-8")
    for told in (
        "screening, not certification",
        "`export.csv`",
        "| CT |",
        "test: same pair",
        "Residual risks",
        "rensa",
    ):
        assert told in card
    assert str(tmp_path) not in card
    held = {row["reason"]: row for row in lines(tmp_path / "out" / "quarantine.jsonl")}
    assert "Jane Miller" in held["identifier"]["findings"]
    assert held["identifier"]["detail"] == "name:1"
    assert (held["no_impression"]["source"], held["no_impression"]["line"]) == (source.as_posix(), 5)
    assert (tmp_path / "out" / "quarantine.jsonl").stat().st_mode & 0o077 == 0
    prepare([source], tmp_path / "bare", Settings(columns=IDS, keep_text=False))
    assert not any(
        {"findings", "impression", "text"} & row.keys() for row in lines(tmp_path / "bare" / "quarantine.jsonl")
    )
    assert reasons(tmp_path / "bare") == reasons(tmp_path / "out")


def test_workers_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "CHUNK_ROWS", 40)
    source = write_csv(tmp_path / "export.csv", rows(300))
    one, two = Settings(columns=IDS), Settings(columns=IDS)
    prepare([source], tmp_path / "one", one, workers=1)
    prepare([source], tmp_path / "two", two, workers=2)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_splits_stay_as_data_grows(tmp_path: Path) -> None:
    table = rows(400)
    prepare([write_csv(tmp_path / "a.csv", table[:300])], tmp_path / "a", Settings(columns=IDS, shares=(70, 10, 20)))
    prepare([write_csv(tmp_path / "b.csv", table)], tmp_path / "b", Settings(columns=IDS, shares=(70, 10, 20)))
    sides = [
        {row["id"]: name for name in duplicates.SPLITS for row in lines(tmp_path / run / f"{name}.jsonl")}
        for run in "ab"
    ]
    both = sides[0].keys() & sides[1].keys()
    assert len(both) > 250
    assert all(sides[0][name] == sides[1][name] for name in both)


def test_ids_are_unique_and_made_where_there_are_none(tmp_path: Path) -> None:
    table = rows(20)
    table[7]["uid"] = "r3"
    prepare([write_csv(tmp_path / "a.csv", table)], tmp_path / "a", Settings(columns=IDS))
    assert [row["line"] for row in lines(tmp_path / "a" / "quarantine.jsonl") if row["reason"] == "repeated_id"] == [9]
    bare = [{name: row[name] for name in ("findings", "impression")} for row in table]
    prepare([write_csv(tmp_path / "export.csv", bare)], tmp_path / "b", Settings())
    assert {row["id"] for row in everything(tmp_path / "b")} <= {f"export-{line}" for line in range(2, 22)}


def test_keys_make_pseudonyms(tmp_path: Path) -> None:
    table = [row | {"date": "2016-03-04"} for row in rows(40)]
    source = str(write_csv(tmp_path / "a.csv", table))
    run = [source, "--id", "uid", "--patient", "mrn", "--near", "off"]
    secret = tmp_path / "key"
    assert main([*run, "--out", str(tmp_path / "a"), "--key-file", str(secret)]) == 0
    assert secret.stat().st_mode & 0o077 == 0
    made = everything(tmp_path / "a")
    assert pseudonym("r0", secret.read_bytes().strip(), "r") in {row["id"] for row in made}
    assert pseudonym("m0", secret.read_bytes().strip(), "p") in {row["patient_id"] for row in made}
    shifted = {row["patient_id"]: row["study_date"] for row in made}
    assert len(set(shifted.values())) > 5
    assert all("2015-03-04" <= date < "2016-03-04" for date in shifted.values())
    assert main([*run, "--out", str(tmp_path / "b"), "--key-file", str(secret)]) == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    assert secret.read_text().strip() not in (tmp_path / "a" / "funnel.json").read_text()
    assert main([*run, "--out", str(tmp_path / "c")]) == 0
    assert {row["study_date"] for row in everything(tmp_path / "c")} == {"2016"}
    assert main([*run, "--out", str(tmp_path / "d"), "--deid", "off"]) == 0
    assert everything(tmp_path / "d")[0]["study_date"] == "2016-03-04"
    assert everything(tmp_path / "d")[0]["patient_id"].startswith("m")


def test_a_hold_out_by_date(tmp_path: Path) -> None:
    table = [row | {"date": f"{2010 + k // 20}-06-01"} for k, row in enumerate(rows(200))]
    source = str(write_csv(tmp_path / "a.csv", table))
    assert (
        main([source, "--out", str(tmp_path / "a"), "--id", "uid", "--patient", "mrn", "--test-from", "2018-01-01"])
        == 0
    )
    assert {row["study_date"] for row in lines(tmp_path / "a" / "test.jsonl")} == {"2018", "2019"}
    assert max(row["study_date"] for row in lines(tmp_path / "a" / "train.jsonl")) == "2017"


# ---- ends and beginnings


class Stop(Exception):
    pass


def interrupted(source: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    calls, scan = 0, reports.scan

    def failing(packed: bytes, given: Settings) -> store.Scanned:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop
        return scan(packed, given)

    with monkeypatch.context() as patch:
        patch.setattr(reports, "scan", failing)
        with pytest.raises(Stop):
            prepare([source], out, Settings(columns=IDS, **options))


def test_a_second_run_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "CHUNK_ROWS", 25)
    source = write_csv(tmp_path / "a.csv", rows(300))
    prepare([source], tmp_path / "clean", Settings(columns=IDS))
    interrupted(source, tmp_path / "out", 7, monkeypatch)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    scan, calls = reports.scan, 0

    def counting(packed: bytes, given: Settings) -> store.Scanned:
        nonlocal calls
        calls += 1
        return scan(packed, given)

    monkeypatch.setattr(reports, "scan", counting)
    prepare([source], tmp_path / "out", Settings(columns=IDS))
    assert calls == 12 - 7
    assert outputs(tmp_path / "out") == outputs(tmp_path / "clean")


@pytest.mark.parametrize("change", ["input", "options", "shorter", "torn", "lost"])
def test_a_stale_state_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(intake, "CHUNK_ROWS", 25)
    table, options = rows(200), {}
    source = write_csv(tmp_path / "a.csv", table)
    interrupted(source, tmp_path / "out", 5, monkeypatch)
    work = tmp_path / "out" / ".work"
    if change == "input":
        table[60]["impression"] = "Another impression."
    elif change == "shorter":
        table = table[:75]  # three whole chunks
    elif change == "options":
        options = {"options": Options(min_impression_words=4)}
    elif change == "torn":  # an append that was cut short
        with (work / "pairs.txt").open("ab") as file:
            file.write(b'"a.csv", 7\t{"id": "half')
        with (work / "journal.jsonl").open("ab") as file:
            file.write(b'{"digest": "ab')
    else:
        with (work / "pairs.txt").open("r+b") as file:
            file.truncate(2000)
    source = write_csv(tmp_path / "a.csv", table)
    prepare([source], tmp_path / "out", Settings(columns=IDS, **options))
    prepare([source], tmp_path / "clean", Settings(columns=IDS, **options))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "clean")


KILLED = """
import os, signal, sys
from radllama import intake, reports, store
intake.CHUNK_ROWS = 25
append, left = store.Store.append, [int(sys.argv[1])]
def killing(self, digest, scanned):
    left[0] -= 1
    if not left[0]:
        self._open[3].write(scanned.files[3][:100])  # in the middle of an append
        self._open[3].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, digest, scanned)
store.Store.append = killing
sys.exit(reports.main(sys.argv[2:]))
"""


def test_kill_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "CHUNK_ROWS", 25)
    source = str(write_csv(tmp_path / "a.csv", rows(200)))
    run = [source, "--id", "uid", "--patient", "mrn", "--out"]
    assert main([*run, str(tmp_path / "clean")]) == 0
    for after in ("2", "4"):
        killed = subprocess.run([sys.executable, "-c", KILLED, after, *run, str(tmp_path / "out")], timeout=60)
        assert killed.returncode == -signal.SIGKILL
    journal = (tmp_path / "out" / ".work" / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(journal) == 1 + 1 + 3
    assert main([*run, str(tmp_path / "out")]) == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "clean")
    assert not (tmp_path / "out" / ".work").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = store.Store(tmp_path / "out" / ".work", "a")
    with pytest.raises(ValueError, match="another run"):
        store.Store(tmp_path / "out" / ".work", "a")
    first.close()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Any, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    store.Store(tmp_path / ".work", "a").close()
    assert "has no locks (Function not implemented); start no second run there" in caplog.text


def test_without_the_extra_exact_duplicates_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rensa", "duckdb", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    source = str(write_csv(tmp_path / "a.csv", rows(60)))
    run = [source, "--id", "uid", "--patient", "mrn", "--out", str(tmp_path / "out")]
    assert main(run) == 2
    assert "radllama[reports]" in capsys.readouterr().err
    assert main([*run, "--near", "off"]) == 0
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(b"")
    for name in ("b.jsonl.zst", "c.parquet"):
        assert main([str(tmp_path / name), "--near", "off", "--out", str(tmp_path / "no")]) == 2
        assert "radllama[reports]" in capsys.readouterr().err


def test_nothing_of_torch_is_loaded() -> None:
    code = "import sys, radllama.reports; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_bench_tells_what_became_of_what_was_planted(tmp_path: Path) -> None:
    make_raw.write_export(tmp_path / "raw.jsonl", 300, 1)
    found = bench.measure(tmp_path / "raw.jsonl", tmp_path, 300, 1)
    assert set(found["stages"]) == {title for _, title in bench.STAGES.values()}
    assert 0 < found["disk MB"] < 10
    for kind in ("exact_duplicate", "restyled_duplicate"):
        told = found["duplicates"][kind]
        assert told["one group"] == told["with original"] > 0
    assert found["faults"]["no_impression"]["dropped"] == {"no_impression": found["faults"]["no_impression"]["planted"]}
    assert found["faults"]["prior"]["flagged"]["prior"] > 0
    assert json.loads(json.dumps(found))["reports"] == 300
    bench.show(found)
    assert reports.near_held_out.__module__ == "radllama.held_out"


class Analyzer:
    """Stands for presidio_analyzer.AnalyzerEngine: it knows one name."""

    def analyze(self, text: str, language: str) -> list[SimpleNamespace]:
        start = text.find("Jolanta")
        return [SimpleNamespace(entity_type="PERSON", start=start, end=start + 7)] if start >= 0 else []


def test_presidio_joins_the_rules_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows(20)
    table[3]["findings"] += " Jolanta walked in."
    run = [str(write_csv(tmp_path / "a.csv", table)), "--id", "uid", "--patient", "mrn", "--near", "off", "--out"]
    presidio = ["--deid-backend", "presidio"]
    deid._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    assert main([*run, str(tmp_path / "none"), *presidio]) == 2
    assert "radllama[presidio]" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=Analyzer))
    try:
        for out, more in (("rules", []), ("both", presidio), ("redacted", [*presidio, "--deid", "redact"])):
            assert main([*run, str(tmp_path / out), *more]) == 0
    finally:
        deid._analyzer.cache_clear()
    assert "identifier" not in reasons(tmp_path / "rules").values()
    assert reasons(tmp_path / "both")["r3"] == "identifier"
    assert any("[NAME] walked in." in row["findings"] for row in everything(tmp_path / "redacted"))
