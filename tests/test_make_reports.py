"""The synthetic corpus: its rules, checked on the texts themselves."""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Set
from datetime import date
from pathlib import Path
from random import Random

import pytest
from conftest import load_asset

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": 3600, "validation": 200, "test": 300}
FIELDS = ["id", "findings", "impression", "patient_id", "study_date", "modality", "body_part", "indication"]
Row = dict[str, str]


make_reports = load_asset("make_reports")
EXAMS = make_reports.EXAMS


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    folder = ROOT / "assets" / "reports"
    read = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in SPLITS}
    return {name: [json.loads(line) for line in lines] for name, lines in read.items()}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"] for row in make_reports.make_texts(3000, seed=5)]


def exam_of(row: Row) -> str:
    for exam in EXAMS.values():
        if exam.modality == row["modality"] and exam.body_part in (row["body_part"], "{part}"):
            return str(exam.key)
    raise AssertionError(f"{row['id']}: no exam")


def matcher(form: str) -> str:
    """A regular expression for a wording; a placeholder stands for a few words or a measurement."""
    pieces = re.split(r"({\w+})", form)
    body = "".join("[^:;]{1,40}?" if piece.startswith("{") else re.escape(piece) for piece in pieces)
    return re.sub(r"\b([Aa])\\ ", r"\1n?\\ ", body)


WORDINGS = {
    exam.key: [
        (finding.key, re.compile("|".join(matcher(phrase.form) for phrase in finding.phrases), re.IGNORECASE))
        for finding in exam.findings.values()
    ]
    for exam in EXAMS.values()
}


@functools.cache
def found(exam: str, text: str) -> Set[str]:
    """The findings that a text describes, variants included, read off its sentences."""
    return frozenset(key for key, wording in WORDINGS[exam] if wording.search(text))


def positives(row: Row) -> set[str]:
    exam = exam_of(row)
    return {key for key in found(exam, row["findings"]) if EXAMS[exam].findings[key].level != "variant"}


def pairs_of(exam: str, keys: Set[str]) -> set[tuple[str, str]]:
    ordered = sorted(keys, key=lambda key: EXAMS[exam].findings[key].rank)
    return set(itertools.combinations(ordered, 2))


def sizes(text: str) -> set[str]:
    """Every diameter in the text as "number unit", also those of "3.1 x 2.0 cm"."""
    spans = re.findall(r"((?:\d+(?:\.\d+)? x )*\d+(?:\.\d+)?) (mm|cm)\b", text)
    return {f"{number} {unit}" for numbers, unit in spans for number in numbers.split(" x ")}


# --- the phrase table ---


@pytest.mark.parametrize("key", EXAMS)
def test_the_phrase_table_is_sound(key: str) -> None:
    exam = EXAMS[key]
    regions = {region.name for region in exam.regions}
    assert {ask.region for ask in exam.asks} <= regions
    for finding in exam.findings.values():
        drawn = {name for name, _ in finding.draws} | set(exam.given)
        known = drawn | {name for name, (source, _) in make_reports.DERIVED.items() if source in drawn}
        for phrase in (*finding.phrases, *finding.impression):
            assert set(phrase.names) <= known, (finding.key, phrase.form)
        sides = [{"side": side} for side in ("right", "left")]
        assert {region.format_map(side) for region in finding.regions for side in sides} <= regions
        assert bool(finding.impression) == (finding.level != "variant")
    assert all(len(rule.keys) > 1 for rule in exam.combinations)
    # What a sentence of the findings means is never in doubt.
    owners = [(phrase.form, finding.key) for finding in exam.findings.values() for phrase in finding.phrases]
    owners += [(phrase.form, ask.indication) for ask in exam.asks for phrase in ask.phrases]
    for region in exam.regions:
        for says in (region.clear, *dict(region.rest).values()):
            owners += [(phrase.form, "normal") for phrase in says]
    assert all(
        len({owner for form, owner in group}) == 1
        for _, group in itertools.groupby(sorted(set(owners)), key=lambda item: item[0])
    )


@pytest.mark.parametrize("key", EXAMS)
def test_held_out_pairs_leave_every_finding_a_partner(key: str) -> None:
    exam = EXAMS[key]
    listed = exam.levels["acute"] + exam.levels["minor"]
    assert len(exam.held_out) >= 8
    for one in listed:
        others = [two for two in listed if two is not one]
        assert sum(not make_reports.clash(exam, one, two, held_out=False) for two in others) >= 3, one.key
    for rule in exam.combinations:
        assert not set(itertools.permutations(rule.keys, 2)) & set(exam.held_out), "not shown in training"


# --- the files ---


def test_pairs_reproduces_the_committed_files(tmp_path: Path) -> None:
    assert make_reports.main(["pairs", "--out", str(tmp_path / "new")]) == 0
    total = 0
    for name in SPLITS:
        committed = (ROOT / "assets" / "reports" / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "new" / f"{name}.jsonl").read_bytes() == committed
        total += len(committed)
    assert total < 4_000_000
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{name}.jsonl" for name in SPLITS}


def test_text_is_the_same_for_a_seed_and_another_for_another(tmp_path: Path) -> None:
    written = []
    for seed in ("3", "3", "4"):
        path = tmp_path / "text.jsonl"
        assert make_reports.main(["text", "--count", "150", "--seed", seed, "--output", str(path)]) == 0
        written.append(path.read_text(encoding="utf-8"))
    assert written[0] == written[1]
    rows = [[json.loads(line) for line in lines.splitlines()] for lines in written]
    assert all(len(batch) == 150 and [*batch[0]] == ["id", "text"] for batch in rows)
    assert not {row["text"] for row in rows[0]} & {row["text"] for row in rows[2]}


def test_counts_and_fields(splits: dict[str, list[Row]]) -> None:
    for name, rows in splits.items():
        assert len(rows) == SPLITS[name]
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert list(row) == FIELDS
            assert all(isinstance(value, str) and value.strip() == value != "" for value in row.values())
            assert row["id"].startswith(f"syn-{name}-")
            assert date.fromisoformat(row["study_date"]).isoformat() == row["study_date"]
            assert 30 <= len(row["findings"].split()) <= 110
            assert 1 <= len(row["impression"].split()) <= 70
        exams = Counter(exam_of(row) for row in rows)
        assert len(exams) == 8
        assert max(exams.values()) - min(exams.values()) <= 1
        number = Counter(len(positives(row)) for row in rows)
        assert 0.22 < number[0] / len(rows) < 0.36
        assert set(number) == {0, 1, 2, 3, 4}


def test_writing_fails_cleanly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for arguments in (
        ["pairs", "--out", str(blocked)],
        ["text", "--output", str(tmp_path)],
        ["text", "--count", "-1", "--output", str(tmp_path / "x")],
    ):
        with pytest.raises(SystemExit) as stop:
            make_reports.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the splits ---


def test_no_findings_and_no_patient_in_two_splits(splits: dict[str, list[Row]], texts: list[str]) -> None:
    plain = [make_reports.normalise(row["findings"]) for rows in splits.values() for row in rows]
    assert len(set(plain)) == len(plain)
    patients = {name: {row["patient_id"] for row in rows} for name, rows in splits.items()}
    assert all(not patients[one] & patients[two] for one, two in itertools.combinations(SPLITS, 2))
    assert all(len(patients[name]) < SPLITS[name] for name in SPLITS), "no patient has two exams"
    held = [row["findings"] for name in ("validation", "test") for row in splits[name]]
    everything = "\n".join(texts)
    assert not any(findings in everything for findings in held)


def test_findings_made_before_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_reports.make_split("validation", set())
    taken = make_reports.normalise(rows[0]["findings"])
    again = make_reports.make_split("validation", {taken})
    assert taken not in {make_reports.normalise(row["findings"]) for row in again}
    first = make_reports.make_report(Random(f"{make_reports.SEED} text 9"))
    assert first.findings in next(make_reports.make_texts(1, 9))["text"]
    monkeypatch.setattr(make_reports, "make_split", lambda name, seen: seen.add(make_reports.normalise(first.findings)))
    assert first.findings not in next(make_reports.make_texts(1, 9))["text"]


def test_held_out_pairs_are_in_test_alone(splits: dict[str, list[Row]]) -> None:
    for name, rows in splits.items():
        for row in rows:
            exam, keys = exam_of(row), positives(row)
            held = pairs_of(exam, keys) & set(EXAMS[exam].held_out)
            assert bool(held) == (name == "test" and len(keys) > 1), (row["id"], sorted(keys))
    rng = Random("any seed")
    for _ in range(4000):
        report = make_reports.make_report(rng)
        assert not set(itertools.combinations(report.positives, 2)) & set(EXAMS[report.exam].held_out)
        assert not report.reserved


def test_text_holds_no_held_out_pair(texts: list[str]) -> None:
    seen = 0
    for text in texts:
        titles = [exam.key for exam in EXAMS.values() if re.search(exam.title.split("{")[0], text)]
        for exam in titles:
            keys = found(exam, text)
            assert not pairs_of(exam, keys) & set(EXAMS[exam].held_out), text
            seen += len(keys) > 1
    assert seen > 500


def test_reserved_attributes_are_in_test_alone(splits: dict[str, list[Row]]) -> None:
    """Rule 3 on what shows in a text: the wording of a reserved combination with all its values."""
    rng = Random("split rules")
    singles = [make_reports.make_report(rng, held_out=True, positives=1) for _ in range(400)]
    assert sum(report.reserved for report in singles) > 0.75 * len(singles)
    training = {row["impression"] for row in splits["train"]}
    sized = [row for row in splits["test"] if len(positives(row)) == 1 and sizes(row["impression"])]
    unseen = [row for row in sized if row["impression"] not in training]
    assert len(sized) >= 20
    assert len(unseen) > 0.9 * len(sized)


# --- the content ---


def all_rows(splits: dict[str, list[Row]]) -> list[Row]:
    return [row for rows in splits.values() for row in rows]


def test_sizes_and_sides_of_an_impression_are_in_its_findings(splits: dict[str, list[Row]]) -> None:
    measured = sided = 0
    for row in all_rows(splits):
        assert sizes(row["impression"]) <= sizes(row["findings"]), row["id"]
        measured += bool(sizes(row["impression"]))
        findings, impression = row["findings"].lower(), row["impression"].lower()
        for side in ("right", "left"):
            if re.search(rf"\b{side}\b(?! heart|ward)", impression):
                sided += 1
                assert re.search(rf"\b{side}\b", findings), row["id"]
        for degree in ("mild", "moderate", "severe", "small", "large"):
            if re.search(rf"\b{degree}\b(?! bowel| vessel)", impression):
                assert re.search(rf"\b{degree}(ly)?\b", findings), row["id"]
    assert measured > 1200
    assert sided > 1500


def test_a_normal_report_gets_a_normal_impression_and_no_other(splits: dict[str, list[Row]]) -> None:
    for row in all_rows(splits):
        exam = EXAMS[exam_of(row)]
        openings = [re.sub(r"{\w+}", r"\\w+", opening) for opening in exam.normal]
        keys = positives(row)
        acute = any(exam.findings[key].level == "acute" for key in keys)
        body = row["impression"].removeprefix("1. ")
        assert bool(re.match("|".join(openings), body)) == (not acute), row["id"]
        numbers = [int(number) for number in re.findall(r"(?:^| )(\d)\. (?=[A-Z0-9])", row["impression"])]
        if not keys:
            assert re.match(openings[0], row["impression"]), row["id"]
            assert "2. " not in row["impression"]
            assert not sizes(row["impression"])
        elif len(keys) > 1 or not acute:
            assert numbers[:1] in ([1], []), row["id"]
        assert row["impression"].endswith(".")


def test_every_positive_is_in_the_impression_by_importance(splits: dict[str, list[Row]]) -> None:
    """Where no combined diagnosis applies, the statements are those of the positives, in order."""
    checked = 0
    for row in all_rows(splits):
        exam = EXAMS[exam_of(row)]
        keys = positives(row)
        if any(set(rule.keys) <= keys for rule in exam.combinations):
            continue
        expected = [
            matcher(exam.findings[key].impression[0].form)
            for key in sorted(keys, key=lambda key: exam.findings[key].rank)
        ]
        assert re.search(".*".join(expected), row["impression"], re.IGNORECASE), (row["id"], sorted(keys))
        checked += len(keys) > 1
    assert checked > 1200


CONTRADICTIONS = {  # exam -> what a finding says, what the same report must then not say
    "chest-xray": {
        "ptx": r"[Nn]o pneumothorax|or pneumothorax|without pneumothorax",
        "effusion effusions": r"No pleural effusion|angles are sharp",
        "mass nodule": r"lungs are (clear|well)",
        "pneumonia": r"lungs are (clear|well)|No (focal|airspace) consolidation",
        "edema": r"lungs are (clear|well)|vasculature is (normal|distinct)",
        "copd atelectasis": r"lungs are (clear|well)",
        "cardiomegaly": r"(Heart size|silhouette|heart) is (normal|within)",
        "ribfx wedge": r"No acute osseous|are intact",
        "ribfx": r"No cortical",
        "freeair hernia": r"upper abdomen is unremarkable",
        "freeair": r"lies beneath the diaphragm",
    },
    "chest-ct": {
        "dissection aneurysm pe": r"great vessels",
        "dissection aneurysm": r"aorta is normal",
        "pe": r"pulmonary arteries (opacify|show)",
        "pericardium": r"without pericardial|No pericardial|pericardium are normal",
        "rv": r"heart is normal|heart and pericardium|chambers are normal",
        "effusion": r"No pleural effusion|spaces are (clear|dry)",
        "mass nodule pneumonia emphysema": r"lungs are clear|No nodule or",
        "pneumonia": r"No (focal|airspace) consolidation",
        "nodes": r"No enlarged|No thoracic|nodularity",
        "ribfx": r"osseous structures|No aggressive|No cortical",
        "hernia": r"upper abdomen",
    },
    "abdomen-ct": {
        "freeair": r"No free air|or pneumoperitoneum",
        "ascites": r"or free fluid|No ascites",
        "appendicitis obstruction diverticulitis": r"bowel is normal|No bowel obstruction",
        "appendicitis": r"appendix is (thin|slender)",
        "stone hydro renal cyst": r"Both kidneys|enhance symmetrically",
        "stone": r"tract calcification|ureteral calcification",
        "renal": r"No (solid|enhancing) renal",
        "pancreatitis panc": r"pancreas (is|enhances) normal|No pancreatic",
        "liver cirrhosis steatosis": r"liver is (normal|homogeneous|unremarkable)",
        "aaa": r"aorta is normal|abdominal aorta measures",
        "spleen": r"spleen is (normal|unremarkable)|spleen measures",
        "adenoma": r"glands are",
        "clips": r"gallbladder is (normal|unremarkable)|No gallbladder",
    },
    "brain-mr": {
        "shift subdural hematoma": r"hemorrhage or|No abnormal susc",
        "shift hydrocephalus atrophy": r"ventricles (and sulci )?are normal|ventricular system",
        "hematoma infarct glioma smallvessel sclerosis": r"parenchyma is normal|matter signal",
        "infarct": r"No restricted|images are (normal|unremarkable)",
        "occlusion aneurysm": r"flow voids are",
        "glioma metastases meningioma schwannoma adenoma": r"No (abnormal |pathologic )?enhanc",
        "schwannoma": r"canals are|(cerebellum|structures) are",
        "adenoma": r"pituitary gland is",
        "sclerosis": r"hippocampi are",
        "smallvessel": r"corpus callosum",
        "sinusitis": r"sinuses (and mastoid air cells )?are clear",
    },
    "abdomen-us": {
        "cholecystitis stones polyp": r"gallbladder is (normal|unremarkable)|No gallstones",
        "cholecystitis": r"Murphy sign is negative",
        "ductstone duct": r"bile duct measures|duct is normal",
        "portal aaa": r"aorta is normal|proximal aorta measures",
        "portal": r"portal vein (is patent|shows)",
        "liver cirrhosis steatosis": r"liver is (normal|homogeneous)",
        "ascites": r"No free fluid|No ascites",
        "spleen": r"spleen (is normal|measures|is not)",
    },
    "thyroid-us": {
        "thyroiditis graves": r"is homogeneous|Doppler flow",
        "nodes": r"No \w+ cervical",
        "isthmus": r"isthmus (is|measures) [234]",
    },
    "joint-xray": {
        "displaced nondisplaced": r"cortices are|No cortical",
        "dislocation": r"lignment is|is congruent|spaces? (is|are) (pres|main)|surfaces are smooth",
        "lesion osteomyelitis": r"mineralization is|No (focal|lytic)|No bone|No periosteal",
        "osteopenia": r"mineralization is",
        "foreign": r"soft tissues are|No radiopaque",
        "gout arthritis": r"spaces? (is|are) (pres|main)|surfaces are smooth|juxta-articular lucency",
        "effusion": r"No joint effusion|No capsular|not distended",
    },
    "mammogram": {
        "cancer oval fibroadenoma hamartoma": r"No \w+ mass",
        "pleomorphic oil vascular": r"No suspicious (micro)?calc",
        "distortion asymmetry": r"No (area of )?architectural|is undisturbed",
        "node": r"axillae are|No axillary",
        "skin": r"skin (is|retraction)|dermis is (not|of)",
    },
}


@pytest.mark.parametrize(("exam", "keys"), [(exam, keys) for exam, rules in CONTRADICTIONS.items() for keys in rules])
def test_no_report_contradicts_itself(splits: dict[str, list[Row]], exam: str, keys: str) -> None:
    denied, tried = re.compile(CONTRADICTIONS[exam][keys]), 0
    assert {*keys.split()} <= {*EXAMS[exam].findings}
    for row in all_rows(splits):
        if exam_of(row) == exam and found(exam, row["findings"]) & {*keys.split()}:
            tried += 1
            assert not denied.search(row["findings"]), (row["id"], row["findings"])
    assert tried >= 10
    other = [row for row in all_rows(splits) if exam_of(row) == exam]
    assert any(denied.search(row["findings"]) for row in other), "the denial never occurs: a stale rule"


@pytest.mark.parametrize(
    ("exam", "organ", "normal"),
    [
        ("abdomen-us", "kidney", r"is normal|measures [\d.]+ cm without"),
        ("thyroid-us", "lobe", r"(is|measures) [45]\.\d x 1"),
    ],
)
def test_only_the_other_side_is_normal(splits: dict[str, list[Row]], exam: str, organ: str, normal: str) -> None:
    sided = {finding.key for finding in EXAMS[exam].findings.values() if "{side}" in finding.regions[0]}
    tried = 0
    for row in all_rows(splits):
        for key, wording in WORDINGS[exam]:
            said = wording.search(row["findings"]) if key in sided and exam_of(row) == exam else None
            if said:
                tried += 1
                side = re.findall("right|left", said[0])[-1]
                assert not re.search(rf"{side} {organ} ({normal})", row["findings"]), row["id"]
    assert tried > 100


def test_the_language_is_clean(splits: dict[str, list[Row]], texts: list[str]) -> None:
    bad = re.compile(
        r"[{}|\[\]_]| {2}| \.|\.\.|,\.|\b[Aa] (?:8|11|18)\b|\b[Aa] [aeio]\w"
        r"|\b[Aa]n [bcdfgjkmpqtvwyz]\w|\b([a-z]+) \1\b"
    )
    prior = re.compile(r"prior|previous|compar|interval|unchanged|stable|new since|since", re.IGNORECASE)
    for row in all_rows(splits):
        for name in ("findings", "impression", "indication"):
            assert not bad.search(row[name]), (row["id"], bad.search(row[name]))
            for sentence in re.split(r"(?<=[a-z])\. ", row[name]):
                assert sentence[0].isupper() or sentence[0].isdigit(), (row["id"], sentence)
        assert not prior.search(row["impression"]), row["id"]
    for text in texts:
        assert re.search(r"(?i)^(impression|conclusion):", text, re.MULTILINE)
        assert len(re.findall(r"(?i)^findings:", text, re.MULTILINE)) == 1
        assert text.endswith(".")
    assert len({re.sub(r":.*", ":", text.split("\n")[0]) for text in texts}) == 8, "layouts vary"


# --- the rules ---


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("fleischner", "5 mm", "No routine"),
        ("fleischner", "6 mm", "6 to 12 months"),
        ("fleischner", "8 mm", "6 to 12 months"),
        ("fleischner", "9 mm", "PET/CT"),
        ("aaa", "3.9 cm", "3 years"),
        ("aaa", "4.0 cm", "12 months"),
        ("aaa", "5.4 cm", "6 months"),
        ("aaa", "5.5 cm", "surgery"),
        ("taa", "4.9 cm", "annual"),
        ("taa", "5.5 cm", "surgery"),
        ("polyp", "5 mm", "No follow-up"),
        ("polyp", "9 mm", "6 months"),
        ("polyp", "10 mm", "surgical"),
        ("tr3", "1.4 cm", "No follow-up"),
        ("tr3", "2.4 cm", "ultrasound"),
        ("tr3", "2.5 cm", "FNA"),
        ("tr4", "0.9 cm", "No follow-up"),
        ("tr4", "1.0 cm", "ultrasound"),
        ("tr4", "1.5 cm", "FNA"),
        ("tr5", "0.9 cm", "ultrasound"),
        ("tr5", "1.0 cm", "FNA"),
        ("adenoma", "9 mm", "micro"),
        ("adenoma", "10 mm", "macro"),
        ("largest", "3.2 x 2.4 cm", "3.2 cm"),
        ("stanford", "ascending", "A"),
        ("sevly", "severe", "severely"),
    ],
)
def test_derived_values(rule: str, value: str, expected: str) -> None:
    assert expected in make_reports.DERIVED[rule][1](value)


def impress(exam: str, given: dict[str, str] | None = None, /, **positive: dict[str, str]) -> tuple[str, ...]:
    result: tuple[str, ...] = make_reports.impress(EXAMS[exam], positive, given or {}, [])
    return result


def test_findings_that_are_one_diagnosis_are_joined() -> None:
    stone = {"side": "left", "ureter": "distal", "size": "6 mm"}
    assert impress("abdomen-ct", stone=stone, hydro={"side": "left", "sev": "mild"}) == (
        "Obstructing 6 mm distal left ureteral stone with mild hydronephrosis.",
    )
    assert impress("abdomen-ct", stone=stone, hydro={"side": "right", "sev": "mild"}) == (
        "6 mm distal left ureteral stone.",
        "Mild right hydronephrosis.",
    )
    heart = {"edema": {"sev": "moderate"}, "effusions": {"vol": "small"}, "cardiomegaly": {"sev": "mild"}}
    assert impress("chest-xray", **heart) == ("Congestive heart failure with moderate edema and small effusions.",)
    effusion = {"vol": "small", "side": "right"}
    assert impress("chest-xray", pneumonia={"lobe": "right lower lobe"}, effusion=effusion) == (
        "Right lower lobe pneumonia with small parapneumonic effusion.",
    )
    assert impress("chest-xray", pneumonia={"lobe": "left lower lobe"}, effusion=effusion) == (
        "Left lower lobe pneumonia.",
        "Small right pleural effusion.",
    )


@pytest.mark.parametrize(
    ("exam", "key", "attributes", "statement"),
    [
        (
            "abdomen-ct",
            "aaa",
            {"size": "5.0 cm"},
            "5.0 cm abdominal aortic aneurysm. Recommend ultrasound in 6 months.",
        ),
        (
            "abdomen-us",
            "aaa",
            {"size": "5.6 cm"},
            "5.6 cm abdominal aortic aneurysm. Recommend vascular surgery consultation.",
        ),
        ("chest-ct", "aneurysm", {"size": "4.6 cm"}, "4.6 cm ascending aortic aneurysm. Recommend annual imaging."),
        (
            "chest-ct",
            "nodule",
            {"size": "8 mm", "lobe": "left upper lobe"},
            "8 mm solid left upper lobe nodule. Recommend follow-up CT in 6 to 12 months.",
        ),
        (
            "chest-ct",
            "dissection",
            {"segment": "descending"},
            "Stanford type B aortic dissection. Recommend vascular surgery consultation.",
        ),
        (
            "brain-mr",
            "infarct",
            {"side": "left", "stroke": "occipital lobe"},
            "Acute left posterior cerebral artery territory infarct.",
        ),
        (
            "thyroid-us",
            "tr4",
            {"side": "right", "third": "mid", "size": "1.5 cm"},
            "1.5 cm TI-RADS 4 right mid pole nodule. Recommend FNA.",
        ),
    ],
)
def test_statements(exam: str, key: str, attributes: dict[str, str], statement: str) -> None:
    assert impress(exam, **{key: attributes}) == (statement,)


def test_minor_findings_follow_a_statement_that_nothing_acute_is_wrong() -> None:
    assert impress("chest-xray", copd={}) == (
        "No acute cardiopulmonary abnormality.",
        "Chronic obstructive pulmonary disease.",
    )
    assert impress("chest-xray", cardiomegaly={"sev": "mild"}, copd={}) == (
        "Mild cardiomegaly.",
        "Chronic obstructive pulmonary disease.",
    )
    assert impress("joint-xray", {"side": "left", "part": "knee"}) == (
        "No acute fracture or dislocation of the left knee.",
    )


def test_a_mammogram_takes_its_highest_category() -> None:
    fatty, dense = {"density": "almost entirely fatty"}, {"density": "extremely dense"}
    close, exam = make_reports.close, EXAMS["mammogram"]
    assert close(exam, {"node": {"birads": "4"}, "oil": {"birads": "2"}}, dense) == "BI-RADS 4: Suspicious."
    assert close(exam, {}, fatty) == "BI-RADS 1: Negative."
    assert close(exam, {}, dense) == "BI-RADS 1: Negative. Consider supplemental screening."
    assert close(EXAMS["chest-xray"], {}, {}) == ""


def test_reports_are_made_fast() -> None:
    rng = Random(0)
    start = time.process_time()
    for _ in range(2000):
        make_reports.make_report(rng)
    assert time.process_time() - start < 1.0, "a million raw reports would take too long"
