"""Make raw hospital exports by the million, with planted faults, and beside them the truth about each report.

    python assets/make_raw.py --count 1000000 --seed 1 --output raw.csv        # or .jsonl; each also with .gz

The rows have the columns COLUMNS. `raw.csv.truth.jsonl` says of every row, in the same order, what was planted:

    {"id": ..., "fault": "" or a key of FAULTS, "addendum": true or false}
    duplicates also    "duplicate_of": the id of an earlier row that has no fault itself
    identifiers also   "identifiers": [[kind, section, text], ...]

Report n is a function of (count, seed, n). It joins two bodies that `make_reports` made, of two exams; no two reports
but planted duplicates share both, so that their findings have a Jaccard similarity (of word 5-grams) of at most about
0.6. A near duplicate has one word or phrase of its original's findings changed: 0.85 or more. Bodies, styles and
identifiers are synthetic; whoever is named in them was drawn from two lists of names.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any, TextIO

import make_reports
from make_reports import natural, pick
from tqdm import tqdm

COLUMNS = ("report_id", "patient_id", "study_date", "modality", "body_part", "report_text")
FAULTS = {  # share of the reports; one fault a report at most
    "exact_duplicate": 0.02,  # the same text, patient and date under another id
    "restyled_duplicate": 0.02,  # the same findings and impression under other headings, of another patient
    "near_duplicate": 0.03,
    "identifiers": 0.06,
    "merged_sections": 0.02,
    "no_findings": 0.01,
    "no_impression": 0.01,
    "empty_impression": 0.005,
    "placeholders": 0.02,
    "short_findings": 0.01,  # below 10 words
    "short_impression": 0.01,  # one word
    "foreign": 0.005,
    "leak": 0.005,  # the impression stands in the findings, too
    "prior": 0.01,  # the impression compares with a prior that the findings do not know
    "number": 0.01,  # the impression measures what the findings do not
    "side": 0.01,  # the impression names a side that is wrong or unsupported
}
BOUNDS = tuple(itertools.accumulate(FAULTS.values()))
STUDIES_A_PATIENT = 2.5
MIN_WORDS = 55  # of a body's findings, so that a report has about 300 tokens
EXAM_PAIRS = (
    ("chest-ct", "abdomen-ct"),
    ("chest-xray", "joint-xray"),
    ("abdomen-us", "thyroid-us"),
    ("brain-mr", "chest-ct"),
    ("mammogram", "chest-xray"),
)
STRIDE = 1_000_003  # a prime above any pool, so that all pairs of bodies come before one comes again

SECTIONS = ("exam", "indication", "technique", "comparison", "findings", "impression")
HEADINGS = (
    ("exam", "indication", "technique", "comparison", "findings", "impression"),
    ("examination", "history", "technique", "comparison", "findings", "impression"),
    ("exam", "clinical indication", "technique", "comparison", "findings", "conclusion"),
    ("procedure", "reason for exam", "technique", "comparison", "findings", "impression"),
    ("study", "clinical history", "technique", "comparison", "findings", "opinion"),
    ("exam", "clinical information", "technique", "comparison", "findings", "summary"),
)
LAYOUTS: tuple[tuple[str, str, str], ...] = (  # heading, its case, what parts two sections
    ("{}: ", "upper", "\n"),
    ("{}:\n", "upper", "\n\n"),
    ("{}: ", "capitalize", "\n\n"),
    ("{}:\n", "title", "\n"),
    ("{}: ", "lower", "\n"),
    ("{}\n", "upper", "\n\n"),  # no colon
    ("{}\n", "capitalize", "\n\n"),
    ("{}: ", "upper", " "),  # all on one line
    ("{}: ", "capitalize", "  "),
    ("    {}:  ", "upper", "\n"),  # indented
    ("**{}:** ", "capitalize", "\n\n"),
    ("{}: ", "upper", "\r\n"),
)
NAMED = {"addendum": "addendum", "merged": "findings and impression", "name": "patient name"}

FIRST = "Alice Brian Carmen Derek Elena Farid Grace Hugo Ingrid Jamal Keiko Liam Maria Nadia Oscar Priya Rosa Tomas"
LAST = "Abbott Bianchi Castillo Dubois Eriksen Fischer Gupta Haddad Ivanov Jensen Kowalski Lindgren Moreau Nakamura"
NAMES = tuple(itertools.product(FIRST.split(), LAST.split()))
SYNONYMS = (("normal", "unremarkable"), (" seen", " identified"), ("are clear", "show no opacity"), ("No ", "Without "))
SHORT_FINDINGS = ("Clear lungs.", "As above.", "Two views of the chest.", "See the earlier report.")
SHORT_IMPRESSIONS = ("Normal.", "Stable.", "Unremarkable.", "Negative.")
MARKS = ("XXXX", "____", "[...]")
FOREIGN = (
    (
        "Die Lunge ist beidseits gut entfaltet. | Kein Nachweis eines Pleuraergusses. | Das Herz ist normal groß. | "
        "Keine frische Fraktur der Rippen. | Die Leber ist homogen und glatt begrenzt. | Die Milz misst 11 cm. | "
        "Kein Hinweis auf freie Flüssigkeit im Abdomen. | Die Nieren sind beidseits unauffällig. | Kein Aufstau.",
        "Kein Nachweis einer akuten Erkrankung.",
    ),
    (
        "Los pulmones están bien aireados. | No se observa derrame pleural. | El corazón es de tamaño normal. | "
        "No hay fractura reciente de las costillas. | El hígado es homogéneo y liso. | El bazo mide 11 cm. | "
        "No se observa líquido libre en el abdomen. | Los riñones son de aspecto normal. | No hay adenopatías.",
        "Sin evidencia de enfermedad aguda en este estudio.",
    ),
)


@dataclass(frozen=True, slots=True)
class Body:
    """What a report takes over from one made by `make_reports`."""

    label: str
    title: str
    modality: str
    indication: str
    technique: str
    findings: str
    statements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Style:
    """A layout with headings: what stands before the text of each section, and between two sections."""

    before: dict[str, str]
    gap: str


def make_styles() -> tuple[Style, ...]:
    styles = []
    for (form, case, gap), headings in itertools.product(LAYOUTS, HEADINGS):
        names = dict(zip(SECTIONS, headings, strict=True)) | NAMED
        styles.append(Style({key: form.format(getattr(name, case)()) for key, name in names.items()}, gap))
    return tuple(styles)


def make_bodies(exam: str, count: int, seed: int) -> tuple[Body, ...]:
    """`count` bodies of an exam with different findings."""
    rng = Random(f"raw {seed} {exam}")
    bodies: dict[str, Body] = {}
    while len(bodies) < count:
        report = make_reports.make_report(rng, exam)
        if len(report.findings.split()) >= MIN_WORDS:
            statements = report.statements + ((report.closing,) if report.closing else ())
            bodies[report.findings] = Body(
                report.body_part, report.title, report.modality, report.indication, report.technique, report.findings,
                statements)  # fmt: skip
    return tuple(bodies.values())


class Maker:
    """Makes report n of an export of `count` reports."""

    def __init__(self, count: int, seed: int) -> None:
        self.seed = seed
        self.patients = max(1, round(count / STUDIES_A_PATIENT))
        self.pool = max(20, math.ceil(math.sqrt(count / len(EXAM_PAIRS))))
        exams = dict.fromkeys(itertools.chain.from_iterable(EXAM_PAIRS))
        self.bodies = {exam: make_bodies(exam, self.pool, seed) for exam in exams}
        self.styles = make_styles()
        first = date(2008, 1, 1)
        self.days = tuple((first + timedelta(days=n)).isoformat() for n in range(11 * 365))
        self.rng = Random()
        self.base = seed << 40

    def identity(self, n: int) -> str:
        return f"raw{self.seed}-{n:08d}"

    def fault(self, n: int) -> str:
        """Seeds the generator for report n, whose first draw decides on its fault."""
        self.rng.seed(self.base + n)
        draw = self.rng.random()
        if draw >= BOUNDS[-1]:
            return ""
        return next(fault for fault, bound in zip(FAULTS, BOUNDS, strict=True) if draw < bound)

    def original(self, n: int) -> int | None:
        """An earlier report without a fault for report n to repeat; None if chance finds none."""
        tries = [int(self.rng.random() * n) for _ in range(20)] if n else []
        return next((other for other in tries if not self.fault(other)), None)

    def content(self, n: int) -> tuple[Body, Body]:
        turn, kind = divmod(n, len(EXAM_PAIRS))
        one, other = EXAM_PAIRS[kind]
        place = turn * STRIDE % (self.pool * self.pool)
        return self.bodies[one][place // self.pool], self.bodies[other][place % self.pool]

    def report(self, n: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The row of report n (COLUMNS) and its truth."""
        fault, source = self.fault(n), n
        truth: dict[str, Any] = {"id": self.identity(n), "fault": fault, "addendum": False}
        if fault.endswith("duplicate"):
            found = self.original(n)
            if found is None:
                fault = truth["fault"] = ""
            else:
                source = found
                truth["duplicate_of"] = self.identity(source)
            self.fault(source if fault in ("", "exact_duplicate") else n)  # draws on as that report does
        bodies = self.content(source)
        rng = self.rng
        patient, day = f"p{self.seed}-{int(rng.random() * self.patients):07d}", pick(rng, self.days)
        case = (None, None, str.upper, str.title)[source // len(EXAM_PAIRS) % 4]  # duplicates keep the organs' names
        text = write(rng, bodies, pick(rng, self.styles), case, fault, truth)
        one, other = bodies
        return (truth["id"], patient, day, one.modality, f"{one.label} and {other.label}", text), truth


def write(
    rng: Random,
    bodies: tuple[Body, Body],
    style: Style,
    case: Callable[[str], str] | None,
    fault: str,
    truth: dict[str, Any],
) -> str:
    """The text of a report; adds what it plants to `truth`. `case` writes the organs' names, where they shall stand."""
    one, other = bodies
    sections = {"exam": f"{one.title}. {other.title}.", "indication": one.indication}
    if rng.random() < 0.7:
        dose = f" Dose length product {100 + int(rng.random() * 900)} mGy-cm." if one.modality == "CT" else ""
        sections["technique"] = f"{one.technique} {other.technique}{dose}"
    if rng.random() < 0.5:
        sections["comparison"] = "None."
    lined = style.gap[0] != " "  # a report on one line has no line ends anywhere
    end = "\n" if lined else " "
    if case:
        sections["findings"] = f"{case(one.label)}: {one.findings}{end}{case(other.label)}: {other.findings}"
    else:
        sections["findings"] = f"{one.findings}{end if rng.random() < 0.5 else ' '}{other.findings}"
    statements = one.statements + other.statements
    mark = pick(rng, ("{}. {}", "{}. {}", "{}) {}", "{1}"))
    between = end if rng.random() < 0.5 else " "
    stated = plant(rng, sections, statements, fault, truth) if fault else statements
    if len(stated) == 1:
        mark = "{1}"
    sections.setdefault("impression", between.join(mark.format(k, words) for k, words in enumerate(stated, 1)))
    if rng.random() < 0.03:
        truth["addendum"] = True
        sections["addendum"] = "The images were reviewed again with the referring team. The report stands."
    if fault == "merged_sections":
        merged = f"{sections.pop('findings')}{end}{sections.pop('impression')}"
        sections = sections | {"merged": merged}
    elif fault in ("no_findings", "no_impression"):
        del sections[fault.removeprefix("no_")]
    order: tuple[str, ...] = ("name", *SECTIONS, "merged")
    order = ("addendum", *order) if rng.random() < 0.5 else (*order, "addendum")
    before, sign = style.before, sections.pop("signature", "")
    text = style.gap.join([before[name] + sections[name] for name in order if name in sections])
    if "\r" in style.gap:
        text = text.replace("\r\n", "\n").replace("\n", "\r\n")
    return f"{text}{style.gap}{sign}" if sign else text


def plant(
    rng: Random, sections: dict[str, str], statements: tuple[str, ...], fault: str, truth: dict[str, Any]
) -> tuple[str, ...]:
    """Puts a fault into the sections, and returns the statements of the impression."""
    findings = sections["findings"]
    match fault:
        case "near_duplicate":
            for old, new in SYNONYMS:
                if old in findings:
                    sections["findings"] = findings.replace(old, new, 1)
                    break
            else:
                sections["findings"] = f"{findings} No further abnormality."
        case "identifiers":
            truth["identifiers"] = [identify(rng, sections) for _ in range(1 + int(rng.random() * 3))]
        case "empty_impression":
            sections["impression"] = ""
        case "placeholders":
            mark = pick(rng, MARKS)
            sections["findings"] = findings.replace(". ", f". {mark} of the {mark} is noted. ", 1)
        case "short_findings":
            sections["findings"] = pick(rng, SHORT_FINDINGS)
        case "short_impression":
            return (pick(rng, SHORT_IMPRESSIONS),)
        case "foreign":
            text, impression = pick(rng, FOREIGN)
            chosen = sorted(text.split(" | "), key=lambda _: rng.random())[:7]
            sections["findings"] = " ".join(chosen).replace("11 cm", f"{8 + rng.random() * 5:.1f} cm")
            return (impression,)
        case "leak":
            sentence = "Correlation with the clinical course of this patient is recommended."
            sections["findings"] = f"{findings} {' '.join(statements)} {sentence}"
            return (f"{' '.join(statements)} {sentence}",)
        case "prior":
            return (*statements, "Unchanged since the prior examination.")
        case "number":
            sizes = (f"{10 + int(rng.random() * 60)} mm" for _ in itertools.count())
            return (*statements, f"Indeterminate lesion of {next(size for size in sizes if size not in findings)}.")
        case "side":
            return flip(statements)
    return statements


def flip(statements: tuple[str, ...]) -> tuple[str, ...]:
    """The first statement with a side gets the other; without one, there is a new statement with a side."""
    for k, words in enumerate(statements):
        for old, new in (("left", "right"), ("Left", "Right"), ("right", "left"), ("Right", "Left")):
            if old in words.split():
                return (*statements[:k], words.replace(old, new), *statements[k + 1 :])
    return (*statements, "Left-sided hydrocele.")


def identify(rng: Random, sections: dict[str, str]) -> tuple[str, str, str]:
    """Plants one identifier: (kind, section, text)."""
    first, last = pick(rng, NAMES)
    code = f"{int(rng.random() * 10**8):08d}"
    day = date(2008, 1, 1) + timedelta(days=int(rng.random() * 4000))
    draw = int(rng.random() * 8)
    if draw == 0:
        return put(sections, "name", "name", f"{last.upper()}, {first.upper()}", "{}")
    if draw == 1:
        return put(sections, "mrn", "exam", f"{code}", " MRN: {}.")
    if draw == 2:
        return put(sections, "mrn", "indication", code[:7], " Medical record number {}.")
    if draw == 3:
        shown = f"{day.month}/{day.day}/{day.year}" if rng.random() < 0.5 else day.isoformat()
        return put(sections, "date", "comparison", shown, " Radiograph of {}.")
    if draw == 4:
        return put(sections, "date", "findings", day.strftime("%B %d, %Y"), " A study of {} was not available.")
    if draw == 5:
        return put(sections, "name", "findings", f"{first} {last}", " Discussed with Dr. {} by telephone.")
    phone = f"{200 + int(rng.random() * 700)}-555-{code[:4]}"
    if draw == 6:
        return put(sections, "phone", "findings", phone if code[4] < "5" else f"({phone[:3]}) {phone[4:]}",
                   " The ward was called at {}.")  # fmt: skip
    return put(sections, "name", "signature", f"{first} {last}, MD", "Electronically signed by {}")


def put(sections: dict[str, str], kind: str, section: str, text: str, form: str) -> tuple[str, str, str]:
    sections[section] = (sections.get(section, "").replace("None.", "") + form.format(text)).strip()
    return kind, section, text


@contextmanager
def open_text(path: Path, packed: bool) -> Iterator[TextIO]:
    """For writing; packed, too, the same rows give the same bytes: no name and no time in the header."""
    with path.open("wb") as file:
        if not packed:
            with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
                yield text
            return
        with (
            gzip.GzipFile("", "wb", 1, file, mtime=0) as pack,
            io.TextIOWrapper(pack, encoding="utf-8", newline="") as text,
        ):
            yield text


def rows(count: int, seed: int) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    maker = Maker(count, seed)
    return map(maker.report, range(count))


def write_export(output: Path, count: int, seed: int) -> None:
    """The export and its truth, each written beside its place and renamed once both are whole."""
    truth = output.with_name(f"{output.name}.truth.jsonl")
    partials = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in (output, truth)]
    dump = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_text(partials[0], output.suffix == ".gz") as table, open_text(partials[1], False) as answers:
            writer = csv.writer(table, lineterminator="\n")
            as_csv = ".csv" in output.suffixes[-2:]
            if as_csv:
                writer.writerow(COLUMNS)
            for row, known in tqdm(rows(count, seed), total=count, desc=output.name, unit="report", mininterval=0.5):
                if as_csv:
                    writer.writerow(row)
                else:
                    table.write(dump(dict(zip(COLUMNS, row, strict=True))) + "\n")
                answers.write(dump(known) + "\n")
        for partial, path in zip(partials, (output, truth), strict=True):
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a raw export of synthetic reports with planted faults.")
    parser.add_argument("--count", type=natural, required=True, help="reports")
    parser.add_argument("--seed", type=natural, default=1)
    parser.add_argument("--output", type=Path, required=True, help="FILE.csv, FILE.jsonl, or either with .gz")
    options = parser.parse_args(arguments)
    if not options.output.name.endswith((".csv", ".jsonl", ".csv.gz", ".jsonl.gz")):
        parser.error(f"--output: expected a name that ends in .csv, .jsonl, .csv.gz or .jsonl.gz, got {options.output}")
    try:
        write_export(options.output, options.count, options.seed)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: cannot write: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
