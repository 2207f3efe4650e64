"""Raw radiology reports -> screened, filtered, de-duplicated findings/impression pairs, split by patient.

    python -m radllama.reports EXPORT.csv.gz --out DIR

`process` is the whole judgement of one report: a pure function, record in, Pair or Dropped out, which runs as well
inside `datasets.map`, Polars or Spark. The command runs it over chunks in worker processes, appends what they return to
flat files in DIR/.work, and lets `duplicates.py` decide from arrays of hashes what belongs together. A journal beside
the flat files makes a run that was killed go on where it stood. Nothing depends on the number of workers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from radllama import clinical, deid, duplicates, pairs, sections
from radllama.datacard import UNREADABLE, contamination, describe, funnel, write_card
from radllama.held_out import near_held_out
from radllama.intake import FIELDS, Bad, Chunk, Columns, chunks, records, sources, total_bytes
from radllama.pairs import FLAGS, LABELS, POLICIES, Dropped, Options, Pair, Policy, process, pseudonym
from radllama.planted import CANARIES_FILE, plant
from radllama.sections import ParsedReport, Section, parse_report
from radllama.store import FILES, KEPT, Scanned, Store

__all__ = ["Dropped", "Options", "Pair", "ParsedReport", "Section", "Settings", "main", "parse_report", "prepare",
           "process", "pseudonym"]  # fmt: skip

logger = logging.getLogger(__name__)

# ---- what a worker does with a chunk

_DATE = re.compile(r"(\d{4})[-/.]?(\d{2})[-/.]?(\d{2})(?!\d)|(\d{1,2})/(\d{1,2})/(\d{4})(?!\d)")


def scan(packed: bytes, settings: Settings) -> Scanned:
    """Process a pickled Chunk. Pure, so that the result is the same in any process."""
    chunk: Chunk = pickle.loads(packed)
    options = settings.options
    kept: list[tuple[int, ...]] = []
    lines: list[str] = []
    dropped: list[str] = []
    texts: list[list[str]] = []
    reasons: Counter[str] = Counter()
    withheld = "replaced" if options.deid == "redact" else "withheld"
    details: dict[str, Counter[str]] = {"quarantined": Counter(), withheld: Counter()}
    labels: dict[str, dict[str, int]] = {name: {"": 0} for name in LABELS}
    bad = rows = 0
    for source, line, record in records(chunk, settings.columns.encoding):
        rows += 1
        if isinstance(record, Bad):
            bad += 1
            reasons[record.reason] += 1
            entry = {"source": source, "line": line, "reason": record.reason, "detail": record.detail}
            dropped.append(_line(entry | ({"text": record.text} if settings.keep_text else {})))
            continue
        result = process(record, options)
        if isinstance(result, Dropped):
            reasons[result.reason] += 1
            if result.reason == "identifier":
                details["quarantined"].update(_counts(result.detail))
            entry = {"source": source, "line": line, "reason": result.reason, "detail": result.detail}
            held = {name: text for name, text in record.items() if text and (settings.keep_text or name not in _BODY)}
            dropped.append(_line(entry | held))
            continue
        if result.identifiers:
            details[withheld].update(_counts(result.identifiers))
        findings, impression = duplicates.words(result.findings), duplicates.words(result.impression)
        date = _date(result.study_date)
        key = options.key or _OPEN_KEY
        both = " ".join(findings), " ".join(impression)
        kept.append(
            (duplicates.digest(result.id), duplicates.digest("\x1f".join(both), key), duplicates.digest(both[0]),
             duplicates.digest(both[1]), (duplicates.digest(result.patient_id, key) or 1) if result.patient_id else 0,
             date, min(len(result.findings.split()), 65535), min(len(result.impression.split()), 65535),
             sum(1 << FLAGS.index(flag) for flag in result.flags),
             *(labels[name].setdefault(getattr(result, name), len(labels[name])) for name in LABELS), 0)
        )  # fmt: skip
        texts.append(findings + impression)
        lines.append(f"{json.dumps(source)}, {line}\t{_line(_outgoing(result, date, options))}")
    table = np.array(kept, dtype=KEPT)
    bands = grams = np.zeros(0, np.uint32)
    if settings.near:
        grams, table["grams"] = duplicates.shingles(texts)
        bands = duplicates.band_keys(grams, table["grams"].astype(np.int64))
    parts = table.tobytes(), bands.tobytes(), grams.tobytes(), "".join(lines).encode(), "".join(dropped).encode()
    return Scanned(parts, rows, bad, dict(reasons), details, {name: list(labels[name]) for name in LABELS})


_OPEN_KEY = b"radllama"  # without a key of the site the splits can be drawn again by anybody
_BODY = frozenset(("text", "findings", "impression", "indication", "comparison"))


def _counts(kinds: str) -> dict[str, int]:
    return {kind: int(count) for kind, count in (item.split(":") for item in kinds.split())}


_encode = json.JSONEncoder(ensure_ascii=False).encode
_WRITTEN = tuple(entry.name for entry in fields(Pair) if entry.name != "identifiers")


def _line(value: Mapping[str, Any]) -> str:
    return _encode(value).encode("utf-8", "replace").decode() + "\n"


def _outgoing(pair: Pair, date: int, options: Options) -> dict[str, Any]:
    """The line of a pair. Unless de-identification is off, no patient id goes out (the writer adds a pseudonym), and of
    the date only the year, or with a key the shifted date; with a key the id is a pseudonym, too."""
    row = {name: value for name in _WRITTEN if (value := getattr(pair, name))}
    if options.deid == "off":
        return row
    owner = row.pop("patient_id", "")
    row.pop("study_date", None)
    if options.key:
        row["id"] = pseudonym(pair.id, options.key, "r")
        if owner:
            row["patient_id"] = pseudonym(owner, options.key, "p")
    if date and options.key:
        iso = f"{date // 10000:04}-{date // 100 % 100:02}-{date % 100:02}"
        found = [deid.Identifier("date", 0, len(iso), "column")]
        row["study_date"] = deid.replace(iso, key=options.key, patient=owner or pair.id, found=found)
    elif date:
        row["study_date"] = str(date // 10000)
    return row


@lru_cache(maxsize=50_000)
def _date(text: str) -> int:
    """YYYYMMDD, 0 where there is no date to be read: ISO, 20180131, or 1/31/2018."""
    if not (match := _DATE.match(text)):
        return 0
    year, month, day = (match[1], match[2], match[3]) if match[1] else (match[6], match[4], match[5])
    valid = 1 <= int(month) <= 12 and 1 <= int(day) <= 31
    return int(year) * 10000 + int(month) * 100 + int(day) if valid else 0


# ---- the run


@dataclass(frozen=True)
class Settings:
    """A run, but for what does not change its result."""

    options: Options = field(default_factory=Options)
    columns: Columns = field(default_factory=Columns)
    shares: tuple[float, float, float] = (0.9, 0.05, 0.05)  # of train, validation, test
    cap: int = 10
    near: float = 0.8  # 0: exact duplicates alone
    test_from: int = 0  # YYYYMMDD
    max_bad: float = 0.05
    keep_text: bool = True
    canaries: int = 0  # planted in train


def _fingerprint(settings: Settings) -> str:
    """Of all that decides what `scan` gives for a chunk: the settings, and the rules themselves."""
    state = blake2b(repr((settings.options, settings.columns, settings.near > 0, settings.keep_text)).encode())
    state.update(settings.options.key)
    names = "sections deid deid_rules deid_words clinical faithful lexicon intake duplicates held_out pairs"
    for file in sorted(
        file for name in (*names.split(), "reports", "store") for file in Path(__file__).parent.glob(f"{name}.*")
    ):
        state.update(file.read_bytes())
    return state.hexdigest()


def _workers() -> BaseContext:
    """Workers are forked from a server that has imported everything once and has no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["radllama.reports"])
    return context


def _scan_all(files: Sequence[Path | str], store: Store, settings: Settings, workers: int) -> None:
    """Bring the store up to date with the inputs; chunks keep their order, however many workers there are."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's threads: the workers are the parallelism
    waiting: deque[tuple[str, int, Future[Scanned]]] = deque()
    reused = len(store.entries)
    number = 0
    pool = ProcessPoolExecutor(workers, mp_context=_workers()) if workers > 1 else None
    bar = tqdm(total=total_bytes(files), desc="read and screen", unit="B", unit_scale=True, smoothing=0.05)

    def finish() -> None:
        digest, done, future = waiting.popleft()
        store.append(digest, future.result())
        _check_bad(store, settings.max_bad, least=20_000)
        bar.update(done - bar.n)

    try:
        for chunk, done in chunks(sources(files), settings.columns):
            packed = pickle.dumps(chunk, protocol=5)
            digest = blake2b(packed, digest_size=16).hexdigest()
            if number < reused and store.entries[number]["digest"] == digest:
                number += 1
                bar.update(done - bar.n)
                continue
            if number < reused:
                store.keep(number)
                reused = number
            if pool:
                waiting.append((digest, done, pool.submit(scan, packed, settings)))
            else:
                future: Future[Scanned] = Future()
                future.set_result(scan(packed, settings))
                waiting.append((digest, done, future))
            while len(waiting) > (2 * workers if pool else 0):
                finish()
        while waiting:
            finish()
        if number < reused:  # the inputs have become shorter
            store.keep(number)
    except BrokenProcessPool:
        raise ValueError("a worker was ended from outside (out of memory?); run again: it goes on from here") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        bar.close()
    _check_bad(store, settings.max_bad, least=1)


def _check_bad(store: Store, limit: float, least: int) -> None:
    rows, bad = (sum(entry[name] for entry in store.entries) for name in ("rows", "bad"))
    if rows >= least and bad > limit * rows:
        reasons = Counter[str]()
        for entry in store.entries:
            reasons.update({name: n for name, n in entry["reasons"].items() if name in UNREADABLE})
        shown = ", ".join(f"{name} {n}" for name, n in reasons.most_common())
        raise ValueError(
            f"{bad} of {rows} rows cannot be read ({shown}), more than --max-bad {limit:g} allows; they are listed in "
            f"{store.folder / FILES[4]}. Is the encoding or the delimiter another one (--encoding, --delimiter)?"
        )


def _decide(store: Store, settings: Settings) -> tuple[NDArray[np.int8], NDArray[np.int8], dict[str, Any]]:
    """(split, reason to drop) of every report that `scan` kept, and the contamination."""
    ids, pair, findings = (store.column(name) for name in ("id", "pair", "findings"))
    dropped = np.zeros(len(ids), np.int8)
    dropped[duplicates.first_of(ids) != np.arange(len(ids))] = duplicates.REASONS.index("repeated_id")
    del ids
    clusters = duplicates.exact_clusters(pair, findings)
    del findings
    sets = duplicates.Shingles(store.folder / FILES[2], store.column("grams")) if settings.near else None
    if sets:
        clusters = duplicates.near_clusters(clusters, store.bands(), sets, settings.near)
    split, reason = duplicates.assign(
        clusters, pair, store.column("patient"), shares=settings.shares, cap=settings.cap, dropped=dropped,
        date=store.column("date") if settings.test_from else None, test_from=settings.test_from,
    )  # fmt: skip
    held_out = None
    if sets:
        held_out = near_held_out(sets, split, reason == 0, settings.near)
        reason[held_out.other] = duplicates.REASONS.index("near_held_out")
        sets.close()
    return split, reason, contamination(store.column, clusters.leader, split, reason, settings.shares, held_out)


def _write(store: Store, settings: Settings, split: NDArray[np.int8], reason: NDArray[np.int8], folder: Path) -> None:
    """The three splits and the quarantine, in the order of the input."""
    patient = store.column("patient")
    named = settings.options.deid != "off" and not settings.options.key
    number = np.unique(patient, return_inverse=True)[1] + int(not (patient == 0).any()) if named else patient
    number = number.astype(np.int64)
    codes = np.where(reason == 0, split, len(duplicates.SPLITS)).tolist()
    paths = [folder / f"{name}.jsonl" for name in (*duplicates.SPLITS, "quarantine")]
    shutil.copyfile(store.folder / FILES[4], paths[-1])
    paths[-1].chmod(0o600)
    files = [path.open("wb" if path is not paths[-1] else "ab") for path in paths]
    try:
        with (store.folder / FILES[3]).open("rb") as lines:
            rows = tqdm(lines, desc="write", total=len(split), unit="report", smoothing=0.05)
            for index, row in enumerate(rows):
                place, _, line = row.partition(b"\t")
                if named and number[index]:
                    line = line[:-2] + b', "patient_id": "p%07d"}\n' % number[index]
                if codes[index] == len(duplicates.SPLITS):
                    line = _late(place, line, duplicates.REASONS[reason[index]], settings.keep_text)
                files[codes[index]].write(line)
    finally:
        for file in files:
            file.close()


def _late(place: bytes, line: bytes, reason: str, keep_text: bool) -> bytes:
    """A pair's line as one of the quarantine."""
    source, number = json.loads(b"[" + place + b"]")
    row = {name: value for name, value in json.loads(line).items() if keep_text or name not in _BODY}
    return _line({"source": source, "line": number, "reason": reason} | row).encode()


def _identifiers(store: Store) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for entry in store.entries:
        for what, kinds in entry["details"].items():
            found.setdefault(what, Counter()).update(kinds)
    return {what: dict(sorted(kinds.items())) for what, kinds in found.items()}


def _told(settings: Settings) -> dict[str, Any]:
    """The settings without the secret."""
    told = asdict(settings.options) | {name: getattr(settings, name) for name in ("near", "cap", "max_bad", "canaries")}
    shares = dict(zip(duplicates.SPLITS, settings.shares, strict=True))
    return told | {"key": bool(settings.options.key), "test_from": settings.test_from, "shares": shares}


def _versions(settings: Settings) -> dict[str, str]:
    ours = {module.__name__.split(".")[-1]: module.VERSION for module in (sections, deid, clinical, pairs, duplicates)}
    return ours | ({"rensa": version("rensa")} if settings.near else {})


def prepare(inputs: Sequence[str | Path], out: str | Path, settings: Settings, *, workers: int = 1) -> dict[str, Any]:
    """The whole way from exports to the files in `out`; returns what funnel.json holds.

    ValueError says what is wrong with an input, a column or an option. Whatever ends a run, a second one with the same
    arguments goes on where it stood and gives the same bytes.
    """
    folder = Path(out)
    total_bytes(inputs)  # says at once which path is wrong
    if settings.near:
        duplicates.band_keys(np.ones(1, np.uint32), np.ones(1, np.int64))  # or that rensa is missing
    if settings.options.deid != "off" and settings.options.deid_backend == "presidio":
        try:
            deid.screen_with_presidio("")
        except ImportError:
            raise ValueError(
                "--deid-backend presidio needs Presidio: pip install 'radllama[presidio]' and a spaCy model, or leave "
                "--deid-backend out for the rules alone"
            ) from None
    work = folder / ".work"
    store = Store(work, _fingerprint(settings))
    try:
        _scan_all(inputs, store, settings, workers)
        split, reason, leaked = _decide(store, settings)
        ready = work / "ready"
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        _write(store, settings, split, reason, ready)
        (folder / CANARIES_FILE).unlink(missing_ok=True)  # of an earlier run: this one's train may not hold them
        plant(ready, settings.canaries, seed="".join(entry["digest"] for entry in store.entries))
        summary = {
            "sources": [Path(given).name for given in inputs],
            "stages": funnel(store.entries, reason),
            "splits": {
                name: describe(store.column, store.labels, (reason == 0) & (split == number))
                for number, name in enumerate(duplicates.SPLITS)
            },
            "identifiers": _identifiers(store),
            "contamination": leaked,
            "settings": _told(settings),
            "versions": _versions(settings),
        }
        write_card(summary, ready)
        for file in sorted(ready.iterdir(), key=lambda file: file.name == "funnel.json"):  # the last says: complete
            file.replace(folder / file.name)
    finally:
        store.close()
    shutil.rmtree(work)
    return summary


# ---- command line


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m radllama.reports", description="Raw radiology reports -> findings/impression pairs, in splits."
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="CSV, TSV, JSONL, Parquet or text files (.gz, .zst), or folders")
    add("--out", required=True, type=Path, metavar="DIR")
    columns = parser.add_argument_group("columns", "what is not named is guessed; a text file has name, folder, text")
    for name in FIELDS:
        flag = {"patient_id": "patient", "study_date": "date"}.get(name, name).replace("_", "-")
        columns.add_argument(f"--{flag}", dest=f"column_{name}", metavar="COLUMN")
    columns.add_argument("--columns", type=Path, metavar="JSON", help='a file: {"id": "uid", "patient_id": "mrn", ...}')
    columns.add_argument("--encoding", default="utf-8")
    columns.add_argument("--delimiter", default="", help="of CSV files")
    judge = parser.add_argument_group("filters (flag: keep and name it in flags; drop; off: do not look)")
    default = Options()
    for name in POLICIES:
        judge.add_argument(f"--{name}", choices=get_args(Policy), default=getattr(default, name))
    judge.add_argument("--min-findings-words", type=int, default=default.min_findings_words, metavar="N")
    judge.add_argument("--min-impression-words", type=int, default=default.min_impression_words, metavar="N")
    judge.add_argument("--max-placeholders", type=float, default=default.max_placeholders, metavar="SHARE")
    judge.add_argument("--addendum", choices=("drop", "append", "quarantine"), default=default.addendum)
    hide = parser.add_argument_group("de-identification (screening, not certification)")
    hide.add_argument("--deid", choices=("screen", "redact", "off"), default=default.deid)
    backend = "presidio: the rules, and Presidio's names and places (slow; needs radllama[presidio])"
    hide.add_argument("--deid-backend", choices=("rules", "presidio"), default=default.deid_backend, help=backend)
    hide.add_argument("--surrogates", action="store_true", help="with --deid redact: other names, shifted dates")
    hide.add_argument("--key-file", type=Path, metavar="FILE", help="the site's secret; made where there is none")
    hide.add_argument("--no-text", action="store_true", help="keep report text out of quarantine.jsonl")
    split = parser.add_argument_group("duplicates and splits")
    split.add_argument("--shares", default="90/5/5", metavar="A/B/C", help="train/validation/test (default 90/5/5)")
    split.add_argument("--test-from", default="", metavar="DATE", help="test holds the reports from 2018-01-01 on, say")
    split.add_argument("--cap", type=int, default=10, metavar="N", help="copies kept in train of a report (0: all)")
    split.add_argument("--near", default="0.8", metavar="JACCARD", help="of 3-grams (default 0.8), or off")
    add("--plant-canaries", type=int, default=0, metavar="N", help="made-up reports in train that measure memorisation")
    add("--workers", type=int, default=1, metavar="N", help="processes that parse and screen")
    add("--max-bad", type=float, default=0.05, metavar="SHARE", help="more unreadable rows stop the run")
    return parser.parse_args(argv)


def _settings(args: argparse.Namespace) -> Settings:
    named = {}
    if args.columns:
        named = _column_file(args.columns)
    named |= {name: column for name in FIELDS if (column := getattr(args, f"column_{name}"))}
    try:
        shares = tuple(float(part) for part in args.shares.split("/"))
        if len(shares) != 3 or min(shares) < 0 or not sum(shares):
            raise ValueError
    except ValueError:
        raise ValueError(f"--shares: expected three numbers like 90/5/5, not {args.shares!r}") from None
    try:
        near = 0.0 if args.near == "off" else float(args.near)
        if near and not duplicates.LOWEST <= near <= 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--near: expected off or a number from {duplicates.LOWEST} to 1, not {args.near!r}") from None
    test_from = _date(args.test_from)
    if args.test_from and not test_from:
        raise ValueError(f"--test-from: expected a date like 2018-01-01, not {args.test_from!r}")
    if args.workers < 1 or min(args.cap, args.plant_canaries) < 0 or not 0 <= args.max_bad <= 1:
        raise ValueError("expected --workers of at least 1, --cap and --plant-canaries of at least 0, --max-bad "
                         "between 0 and 1")  # fmt: skip
    judged = {entry.name: getattr(args, entry.name) for entry in fields(Options) if entry.name != "key"}
    options = Options(**judged, key=_key(args.key_file))
    columns = Columns(tuple(sorted(named.items())), args.encoding, args.delimiter.replace("\\t", "\t"))
    return Settings(options, columns, (shares[0], shares[1], shares[2]), args.cap, near, test_from, args.max_bad,
                    not args.no_text, args.plant_canaries)  # fmt: skip


def _column_file(path: Path) -> dict[str, str]:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON object of fields and columns ({error})") from None
    if not isinstance(named, dict) or not all(isinstance(column, str) for column in named.values()):
        raise ValueError(f'{path}: expected an object of texts, like {{"id": "uid"}}')
    if unknown := sorted(set(named) - set(FIELDS)):
        raise ValueError(f"{path}: unknown field {', '.join(unknown)}; expected some of {', '.join(FIELDS)}")
    return named


def _key(path: Path | None) -> bytes:
    if path is None:
        return b""
    if not path.exists():
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        logger.warning("%s: a new key; keep it secret, and keep it: the same key gives the same pseudonyms", path)
    key = path.read_bytes().strip()
    if len(key) < 16:
        raise ValueError(f"{path}: expected a secret of at least 16 bytes; delete the file to have one made")
    return key


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _arguments(argv)
    try:
        summary = prepare(args.inputs, args.out, _settings(args), workers=args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for stage in summary["stages"]:
        dropped = ", ".join(f"{name} {count}" for name, count in stage["dropped"].items())
        print(f"{stage['reports']:>10}  {stage['stage']}" + (f"  (less {dropped})" if dropped else ""))
    print("  ".join(f"{name} {about['reports']}" for name, about in summary["splits"].items()))
    return 0


if __name__ == "__main__":
    from radllama.reports import main as canonical_main  # workers import the module by its name, not as __main__

    sys.exit(canonical_main())
