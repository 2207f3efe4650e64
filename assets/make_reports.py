"""Make a synthetic radiology corpus whose impressions follow from their findings by fixed rules.

    python assets/make_reports.py pairs --out assets/reports             # the splits, always the same bytes
    python assets/make_reports.py text --count 40000 --seed 1 --output text.jsonl        # to pre-train on

A report is a walk through the regions of one exam. phrases.txt lists the regions with their normal statements,
the findings with their wordings, and what an impression says of each. An impression is a pure function of
what the findings state: positives in order of clinical importance, two or three joined where together they
are one diagnosis, numbered where there are several, with recommendations derived from kind and size. Where
nothing acute was found it opens with a statement of that, which also repeats the negative statements that
answer the indication; minor findings come last; variants stay out.

Rules of the splits:

1. Train, validation and test come from different seeds; plain text comes from seeds of its own.
2. A hash holds out one in six pairs of findings of an exam (of those that can occur together and that no
   combined diagnosis joins). Only test reports hold such pairs: every test report with two or more positives
   holds at least one.
3. A hash reserves one in six attribute combinations (side, place, size ...) of each finding that has twelve
   or more. Only test reports hold them: a test report whose one positive is such a finding always does.
4. No findings text occurs twice, within or across splits, and no plain-text report has the findings of a
   validation or test report. A patient is in one split only.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")
Attributes = dict[str, str]

PHRASES = Path(__file__).with_name("phrases.txt")
SEED = 20408
COUNTS = {"test": 300, "validation": 200, "train": 3600}  # in the order of making
MIN_WORDS, MAX_WORDS = 30, 110  # of a findings text
LEVELS = ("acute", "minor", "variant")  # of findings; the impression leaves variants out
POSITIVE_SHARES = (0.28, 0.25, 0.23, 0.15, 0.09)  # of reports with 0, 1, 2, 3, 4 positives

BY_PART: dict[str, dict[str, tuple[str, ...]]] = {  # bones and directions of dislocation
    "knee": {"bone": ("distal femur", "patella", "tibial plateau", "proximal fibula")},
    "ankle": {"bone": ("lateral malleolus", "medial malleolus", "distal tibia", "talus")},
    "wrist": {"bone": ("distal radius", "ulnar styloid", "scaphoid", "lunate"), "dir": ("dorsal", "volar")},
    "elbow": {"bone": ("radial head", "olecranon", "distal humerus", "coronoid process")},
    "shoulder": {"bone": ("proximal humerus", "greater tuberosity", "distal clavicle", "acromion")},
    "hip": {"bone": ("femoral neck", "greater trochanter", "proximal femur", "acetabulum")},
}
DIRECTIONS = ("anterior", "posterior")
ARTERIES = {
    "insula": "middle",
    "lentiform nucleus": "middle",
    "frontal operculum": "middle",
    "occipital lobe": "posterior",
    "medial temporal lobe": "posterior",
    "paramedian frontal lobe": "anterior",
}
BIRADS = {
    "1": "Negative",
    "2": "Benign",
    "3": "Probably benign",
    "4": "Suspicious",
    "5": "Highly suggestive of malignancy",
}


def steps(first: str, *levels: tuple[float, str]) -> Callable[[str], str]:
    """A rule from a measurement ("4.2 cm") to the text of the highest level that it reaches."""

    def rule(value: str) -> str:
        size = float(value.split()[0])
        return next((text for limit, text in reversed(levels) if size >= limit), first)

    return rule


# Placeholder -> (the attribute it follows from, rule). Thresholds after Fleischner 2017 (solid nodules), ACC/
# AHA 2022 (thoracic aorta), SVS 2018 (abdominal aorta), ESGAR 2022 (gallbladder polyps), ACR TI-RADS 2017.
DERIVED: dict[str, tuple[str, Callable[[str], str]]] = {
    "side": ("lobe", lambda value: value.split()[0]),
    "artery": ("stroke", lambda value: f"{ARTERIES[value]} cerebral artery"),
    "sevly": ("sev", lambda value: f"{value}ly"),
    "dirly": ("dir", lambda value: f"{value}ly"),
    "largest": ("dims", lambda value: f"{value.split()[0]} {value.split()[-1]}"),
    "stanford": ("segment", lambda value: "A" if value == "ascending" else "B"),
    "surgeon": (
        "segment",
        lambda value: (
            "Recommend emergent cardiac surgery consultation."
            if value == "ascending"
            else "Recommend vascular surgery consultation."
        ),
    ),
    "drain": (
        "vol",
        lambda value: "Recommend follow-up radiograph." if value == "small" else "Consider chest tube placement.",
    ),
    "fleischner": (
        "size",
        steps(
            "No routine follow-up needed.",
            (6, "Recommend follow-up CT in 6 to 12 months."),
            (9, "Recommend PET/CT or tissue sampling."),
        ),
    ),
    "taa": (
        "size",
        steps(
            "Recommend annual imaging.",
            (5.0, "Recommend imaging in 6 months."),
            (5.5, "Recommend cardiac surgery consultation."),
        ),
    ),
    "aaa": (
        "size",
        steps(
            "Recommend ultrasound in 3 years.",
            (4.0, "Recommend ultrasound in 12 months."),
            (5.0, "Recommend ultrasound in 6 months."),
            (5.5, "Recommend vascular surgery consultation."),
        ),
    ),
    "polyp": (
        "size",
        steps(
            "No follow-up needed.",
            (6, "Recommend follow-up ultrasound in 6 months."),
            (10, "Recommend surgical consultation."),
        ),
    ),
    "tr3": ("size", steps("No follow-up needed.", (1.5, "Recommend follow-up ultrasound."), (2.5, "Recommend FNA."))),
    "tr4": ("size", steps("No follow-up needed.", (1.0, "Recommend follow-up ultrasound."), (1.5, "Recommend FNA."))),
    "tr5": ("size", steps("Recommend follow-up ultrasound.", (1.0, "Recommend FNA."))),
    "adenoma": ("size", steps("microadenoma", (10, "macroadenoma"))),
}


@dataclass(frozen=True, slots=True)
class Phrase:
    form: str
    names: tuple[str, ...]  # the placeholders in it


@dataclass(frozen=True, slots=True)
class Finding:
    key: str
    rank: int  # 0: the most important of the exam
    level: str  # "acute", "minor" or "variant"
    regions: tuple[str, ...]
    slots: tuple[str, ...]
    draws: tuple[tuple[str, tuple[str, ...]], ...]  # attribute, values (none: see BY_PART)
    impression: tuple[Phrase, ...]  # one, or none of a variant
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True, slots=True)
class Region:
    name: str
    required: bool
    clear: tuple[Phrase, ...]
    rest: tuple[tuple[str, tuple[Phrase, ...]], ...]


@dataclass(frozen=True, slots=True)
class Ask:
    slot: str
    region: str
    indication: str
    phrases: tuple[Phrase, ...]
    impression: str


@dataclass(frozen=True, slots=True)
class Combination:
    keys: tuple[str, ...]
    shared: tuple[str, ...]
    impression: Phrase


@dataclass(slots=True)
class Exam:
    key: str
    modality: str
    body_part: str
    title: str
    techniques: tuple[Phrase, ...]
    normal: tuple[str, str] = ("", "")
    given: tuple[str, ...] = ()
    indications: tuple[str, ...] = ()
    asks: list[Ask] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    levels: dict[str, list[Finding]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    combinations: list[Combination] = field(default_factory=list)
    held_out: list[tuple[str, str]] = field(default_factory=list)  # the more important key first


@dataclass(frozen=True, slots=True)
class Report:
    """`statements` are the impression's, `positives` the keys of the findings in it; both by importance."""

    exam: str
    modality: str
    body_part: str
    title: str
    technique: str
    indication: str
    findings: str
    statements: tuple[str, ...]
    closing: str
    positives: tuple[str, ...]
    reserved: bool  # holds an attribute combination that is reserved for test

    @property
    def impression(self) -> str:
        return " ".join(number(self.statements) + ([self.closing] if self.closing else []))


def number(statements: Sequence[str]) -> list[str]:
    if len(statements) == 1:
        return list(statements)
    return [f"{index}. {statement}" for index, statement in enumerate(statements, 1)]


def pick(rng: Random, items: Sequence[T]) -> T:
    # Only random() keeps its sequence for a seed in every Python version.
    return items[int(rng.random() * len(items))]


def values(name: str, source: str) -> tuple[str, ...]:
    """The values that `source` stands for: "right|left" or a range such as "3..12mm"."""
    span = re.fullmatch(r"([\d.]+?)\.\.([\d.]+)(mm|cm)", source)
    if span is None:
        return tuple(value.replace("_", " ") for value in source.split("|"))
    scale = 1 if span[3] == "mm" else 10
    sizes = range(round(float(span[1]) * scale), round(float(span[2]) * scale) + 1)
    digits = 0 if scale == 1 else 1
    if name == "dims":
        pairs = ((size / scale, size * ratio / scale) for size in sizes for ratio in (0.6, 0.75, 0.9))
        return tuple(f"{one:.1f} x {two:.1f} cm" for one, two in pairs)
    return tuple(f"{size / scale:.{digits}f} {span[3]}" for size in sizes)


def expand(*sources: str) -> tuple[Phrase, ...]:
    """Every choice of the alternatives "[a|b]" in the sources."""
    forms = []
    for source in sources:
        pieces = re.split(r"\[([^\]]*)\]", source.strip())
        options = [piece.split("|") if index % 2 else [piece] for index, piece in enumerate(pieces)]
        forms += [" ".join("".join(choice).split()) for choice in itertools.product(*options)]
    return tuple(Phrase(form, tuple(re.findall(r"{(\w+)}", form))) for form in forms)


def fraction(text: str) -> float:
    """A hash of the text in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32


def parse_exam(block: str) -> Exam:
    """One exam of phrases.txt, where the grammar stands."""
    lines = re.sub(r"\n  (?:& |(?=[|>/]))", " ", block)
    lines = lines.replace("\n  ", " / ")
    heading, *rest = lines.strip().splitlines()
    key, modality, body_part, title, technique = heading.split(" | ")
    exam, level = Exam(key, modality, body_part, title, expand(technique)), ""
    for line in rest:
        head, _, tail = line.partition(" ")
        if head in LEVELS:
            level = head
        elif head == "normal":
            normal = tail.split(" | ")
            exam.normal = (normal[0], normal[-1])
        elif head == "given":
            exam.given = tuple(tail.split())
        elif head == "why":
            exam.indications = tuple(tail.split(" | "))
        elif head == "ask":
            place, indication, says, means = tail.split(" | ")
            slot, region = place.split()
            exam.asks.append(Ask(slot, region, indication, expand(*says.split(" / ")), means))
        elif head in ("@", "@!"):
            name, clear, *others = tail.split(" | ")
            pairs = (other.split(": ", 1) for other in others)
            exam.regions.append(
                Region(
                    name,
                    head == "@!",
                    expand(*clear.split(" / ")),
                    tuple((slot, expand(*says.split(" / "))) for slot, says in pairs),
                )
            )
        elif head == "+":
            place, means = tail.split(" > ")
            names = place.split()
            keys = tuple(name for name in names if name in exam.findings)
            exam.combinations.append(Combination(keys, tuple(names[len(keys) :]), expand(means)[0]))
        else:
            finding = parse_finding(line, level, len(exam.findings))
            exam.findings[finding.key] = finding
            exam.levels[level].append(finding)
    joined = {pair for rule in exam.combinations for pair in itertools.permutations(rule.keys, 2)}
    positives = exam.levels["acute"] + exam.levels["minor"]
    exam.held_out = [
        (first.key, second.key)
        for first, second in itertools.combinations(positives, 2)
        if not set(first.slots) & set(second.slots)
        and (first.key, second.key) not in joined
        and fraction(f"{key} {first.key} {second.key}") < 1 / 6
    ]
    return exam


def parse_finding(line: str, level: str, rank: int) -> Finding:
    place, _, rest = line.partition(" > ")
    key, regions, slots, *attributes = place.split()
    means, *says = rest.split(" / ")
    if level == "variant":
        means, says = "", [means, *says]
    draws = []
    for attribute in attributes:
        name, _, source = attribute.partition("=")
        draws.append((name, values(name, source) if source else POOL.get(name, ())))
    return Finding(
        key,
        rank,
        level,
        tuple(regions.split(",")),
        tuple(slots.split(",")),
        tuple(draws),
        expand(means) if means else (),
        expand(*says),
    )


POOLS, *BLOCKS = PHRASES.read_text(encoding="utf-8").split("\n= ")
POOL = {name: values(name, source) for name, source in re.findall(r"^(\w+)=(.+)", POOLS, re.MULTILINE)}
EXAMS = {exam.key: exam for exam in map(parse_exam, BLOCKS)}


@functools.cache
def is_reserved(exam: str, finding: str, attributes: tuple[str, ...]) -> bool:
    return fraction(f"{exam} {finding} {' '.join(attributes)}") < 1 / 6


def can_be_reserved(finding: Finding) -> bool:
    choices = 1
    for name, pool in finding.draws:
        choices *= len(pool) or (4 if name == "bone" else 2)
    return choices >= 12


def article(text: str) -> str:
    """ "a 8 mm" -> "an 8 mm", and a capital first letter."""
    text = re.sub(r"\b([Aa]) (?=8|1[18]\b|[aeio]|u(?!ni|te|re))", r"\1n ", text)
    return text[0].upper() + text[1:]


def value(attributes: Attributes, name: str) -> str:
    """A drawn attribute, or one that follows from a drawn one."""
    if name in attributes:
        return attributes[name]
    source, rule = DERIVED[name]
    return rule(attributes[source])


def say(rng: Random, phrases: Sequence[Phrase], attributes: Attributes) -> str:
    phrase = pick(rng, phrases)
    if not phrase.names:
        return phrase.form
    fields = {
        name: pick(rng, POOL[name]) if name.startswith("n_") else value(attributes, name) for name in phrase.names
    }
    return article(phrase.form.format_map(fields))


def choose(rng: Random, exam: Exam, count: int, held_out: bool) -> tuple[list[Finding], tuple[str, ...]]:
    """Up to `count` findings that can occur together, and the attributes that they share."""
    chosen: list[Finding] = []
    shared: tuple[str, ...] = ()
    if held_out and count > 1:
        chosen = [exam.findings[key] for key in pick(rng, exam.held_out)]
    elif held_out and count == 1 and rng.random() < 0.8:
        chosen = [pick(rng, [f for f in exam.levels["acute"] + exam.levels["minor"] if can_be_reserved(f)])]
    elif exam.combinations and count > 1 and rng.random() < 0.3:
        combination = pick(rng, exam.combinations)
        if len(combination.keys) <= count:
            chosen, shared = [exam.findings[key] for key in combination.keys], combination.shared
    for _ in range(40):
        if len(chosen) >= count:
            break
        finding = pick(rng, exam.levels["acute" if rng.random() < 0.65 else "minor"])
        if not any(clash(exam, finding, other, held_out) for other in chosen):
            chosen.append(finding)
    return chosen, shared


def clash(exam: Exam, one: Finding, other: Finding, held_out: bool) -> bool:
    if any(slot in other.slots for slot in one.slots):
        return True
    pair = (one.key, other.key) if one.rank < other.rank else (other.key, one.key)
    return not held_out and pair in exam.held_out


def draw(
    rng: Random, exam: Exam, finding: Finding, given: Attributes, forced: Attributes, reserved: bool | None
) -> tuple[Attributes, bool]:
    """Attributes of a finding, and whether they are reserved for test (`reserved` None: either will do)."""
    limited = can_be_reserved(finding)
    for _ in range(1000):
        attributes = dict(given)
        for name, pool in finding.draws:
            pool = pool or BY_PART[given["part"]].get(name, DIRECTIONS)
            attributes[name] = forced.get(name) or pick(rng, pool)
        own = tuple(attributes[name] for name, _ in finding.draws)
        held = limited and is_reserved(exam.key, finding.key, own)
        if reserved is None or not limited or held == reserved:
            return attributes, held
    raise AssertionError(f"{exam.key} {finding.key}: no attribute combination with reserved={reserved}")


def make_report(
    rng: Random, exam_key: str | None = None, *, positives: int | None = None, held_out: bool = False
) -> Report:
    """One report of an exam (a key of EXAMS) with up to `positives` findings; by chance where not given.

    With `held_out` it is one for the test split, without it one that may be trained on (rules 2 and 3 above).
    """
    exam = EXAMS[exam_key] if exam_key else pick(rng, tuple(EXAMS.values()))
    count = pick_share(rng, POSITIVE_SHARES) if positives is None else positives
    given = {name: pick(rng, POOL[name]) for name in exam.given}
    chosen, shared = choose(rng, exam, count, held_out)
    want = (len(chosen) == 1 or None) if held_out else False
    forced: Attributes = {}
    drawn: dict[str, Attributes] = {}
    reserved = False
    for finding in chosen:
        drawn[finding.key], held = draw(rng, exam, finding, given, forced, want)
        reserved = reserved or held
        if shared and not forced:
            forced = {name: value(drawn[finding.key], name) for name in shared}
    for _ in range(pick_share(rng, (0.6, 0.3, 0.1))):
        variant = pick(rng, exam.levels["variant"])
        if not any(clash(exam, variant, other, True) for other in chosen):
            chosen.append(variant)
            drawn[variant.key] = given
    asks = sorted({int(rng.random() * len(exam.asks)) for _ in range(pick_share(rng, (0.35, 0.4, 0.25)))})
    indication = " ".join(exam.asks[index].indication for index in asks) or pick(rng, exam.indications)
    taken = {slot for finding in chosen for slot in finding.slots}
    # A question whose answer is a positive finding gets no negative statement.
    answered = [exam.asks[index] for index in asks if exam.asks[index].slot not in taken]
    text = ""
    while len(text.split()) < MIN_WORDS:
        text = narrate(rng, exam, chosen, drawn, given, answered)
    ranked = sorted(chosen, key=lambda finding: finding.rank)
    positive = {finding.key: drawn[finding.key] for finding in ranked if finding.impression}
    return Report(
        exam.key,
        exam.modality,
        exam.body_part.format_map(given),
        exam.title.format_map(given),
        say(rng, exam.techniques, given),
        indication,
        text,
        impress(exam, positive, given, answered),
        close(exam, positive, given),
        tuple(positive),
        reserved,
    )


def pick_share(rng: Random, shares: Sequence[float]) -> int:
    draw = rng.random()
    for index, share in enumerate(shares):
        draw -= share
        if draw < 0:
            return index
    return len(shares) - 1


def impress(exam: Exam, positive: dict[str, Attributes], given: Attributes, asks: Sequence[Ask]) -> tuple[str, ...]:
    """The statements of the impression. `positive` holds the findings in order of importance."""
    ranked: list[tuple[int, str]] = []
    left = dict(positive)
    for combination in exam.combinations:
        keys = combination.keys
        if any(key not in left for key in keys):
            continue
        if any(len({value(left[key], name) for key in keys}) > 1 for name in combination.shared):
            continue
        fields = dict(given)
        for name in combination.impression.names:
            key, _, attribute = name.partition("_")
            if key in left:
                fields[name] = value(left[key], attribute)
        ranked.append((exam.findings[keys[0]].rank, article(combination.impression.form.format_map(fields))))
        left = {key: attributes for key, attributes in left.items() if key not in keys}
    for key, attributes in left.items():
        phrase = exam.findings[key].impression[0]
        fields = {name: value(attributes, name) for name in phrase.names}
        ranked.append((exam.findings[key].rank, article(phrase.form.format_map(fields))))
    ranked.sort()
    acute = bool(positive) and exam.findings[next(iter(positive))].level == "acute"
    if acute:
        return tuple(text for _, text in ranked)
    opening = exam.normal[1 if positive else 0].format_map(given)
    return (" ".join([opening, *(ask.impression for ask in asks)]), *(text for _, text in ranked))


def close(exam: Exam, positive: dict[str, Attributes], given: Attributes) -> str:
    """The BI-RADS category of a mammogram: the highest of its findings."""
    if exam.modality != "MG":
        return ""
    category = max((attributes["birads"] for attributes in positive.values()), default="1")
    dense = category in "12" and given["density"].endswith(" dense")
    advice = " Consider supplemental screening." if dense else ""
    return f"BI-RADS {category}: {BIRADS[category]}.{advice}"


def narrate(
    rng: Random,
    exam: Exam,
    chosen: Sequence[Finding],
    drawn: dict[str, Attributes],
    given: Attributes,
    asks: Sequence[Ask],
) -> str:
    """The findings text: a walk through the regions, most of them normal."""
    spoken: dict[str, list[str]] = {}
    silent: set[str] = set()
    taken = {slot for finding in chosen for slot in finding.slots} | {ask.slot for ask in asks}
    for finding in chosen:
        regions = [region.format_map(drawn[finding.key]) for region in finding.regions]
        spoken.setdefault(regions[0], []).append(say(rng, finding.phrases, drawn[finding.key]))
        silent.update(regions)
    pieces: list[tuple[str, str, int]] = []  # region, sentence, how readily it is left out
    for region in in_order(rng, exam.regions, spoken):
        pieces += [(region.name, sentence, 0) for sentence in spoken.get(region.name, ())]
        if region.name in silent:
            pieces += [
                (region.name, say(rng, phrases, given), 2)
                for slot, phrases in region.rest
                if slot not in taken and rng.random() < 0.7
            ]
        elif region.required or rng.random() < 0.9:
            stated = any(name in given for name in region.clear[0].names)
            ease = 0 if stated else 1 if region.required else 2
            pieces.append((region.name, say(rng, region.clear, given), ease))
        here = (ask for ask in asks if ask.region == region.name)
        pieces += [(region.name, say(rng, ask.phrases, given), 0) for ask in here]
    return assemble(rng, shorten(rng, pieces))


def in_order(rng: Random, regions: Sequence[Region], spoken: dict[str, list[str]]) -> list[Region]:
    """The usual order with some neighbours exchanged, or positives first; the first region stays first."""
    first, *rest = regions
    for index in range(1, len(rest)):
        if rng.random() < 0.2:
            rest[index - 1], rest[index] = rest[index], rest[index - 1]
    if rng.random() < 0.2:
        rest.sort(key=lambda region: region.name not in spoken)
    return [first, *rest]


def shorten(rng: Random, pieces: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Leave out normal statements at random down to a random length, required ones only above MAX_WORDS."""
    words = sum(len(sentence.split()) + 1 for _, sentence, _ in pieces)
    aim = 60 + int(rng.random() * (MAX_WORDS - 60))
    for ease, limit in ((2, aim), (1, MAX_WORDS)):
        while words > limit:
            open_to = [index for index, piece in enumerate(pieces) if piece[2] == ease]
            if not open_to:
                break
            words -= len(pieces.pop(pick(rng, open_to))[1].split()) + 1
    return pieces


def assemble(rng: Random, pieces: Iterable[tuple[str, str, int]]) -> str:
    """One paragraph, or with the name of each region before its statements."""
    if rng.random() > 0.15:
        return " ".join(sentence for _, sentence, _ in pieces)
    parts = []
    for name, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        label = name.replace("_", " ").capitalize()
        parts.append(f"{label}: " + " ".join(sentence for _, sentence, _ in group))
    return " ".join(parts)


HEADINGS = (
    ("EXAM", "INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"),
    ("EXAMINATION", "HISTORY", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"),
    ("EXAM", "CLINICAL INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"),
    ("PROCEDURE", "REASON FOR EXAM", "TECHNIQUE", "COMPARISON", "FINDINGS", "CONCLUSION"),
)


def as_text(rng: Random, report: Report) -> str:
    """The whole report as plain text in one of many layouts."""
    exam, reason, technique, comparison, findings, impression = pick(rng, HEADINGS)
    lined = rng.random() < 0.4  # numbered statements on lines of their own
    statements = number(report.statements) + ([report.closing] if report.closing else [])
    sections = [(exam, f"{report.title}."), (reason, report.indication)]
    if rng.random() < 0.6:
        sections.append((technique, report.technique))
    if rng.random() < 0.4:
        sections.append((comparison, "None."))
    if rng.random() < 0.3:
        sections = []
    sections += [(findings, report.findings), (impression, ("\n" if lined else " ").join(statements))]
    upper, below, gap = rng.random() < 0.5, rng.random() < 0.25, "\n\n" if rng.random() < 0.3 else "\n"
    shown = []
    for name, body in sections:
        heading = name if upper else name.capitalize()
        shown.append(f"{heading}:" + ("\n" if below or "\n" in body else " ") + body)
    return gap.join(shown)


def normalise(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9.]+", text.lower()))


def make_split(name: str, seen: set[str]) -> list[dict[str, str]]:
    """The rows of a split; adds their normalised findings to `seen` and avoids those in it."""
    rng = Random(f"{SEED} {name}")
    rows: list[dict[str, str]] = []
    patients, exams = 0, tuple(EXAMS)
    while len(rows) < COUNTS[name]:
        report = make_report(rng, exams[len(rows) % len(exams)], held_out=name == "test")
        key = normalise(report.findings)
        if key in seen:
            continue
        seen.add(key)
        patients += rng.random() < 0.85 or not rows  # some patients have two or three exams
        day = datetime.date(2015, 1, 1) + datetime.timedelta(days=int(rng.random() * 3650))
        rows.append(
            {
                "id": f"syn-{name}-{len(rows) + 1:06d}",
                "findings": report.findings,
                "impression": report.impression,
                "patient_id": f"syn-{name}-p{patients:05d}",
                "study_date": day.isoformat(),
                "modality": report.modality,
                "body_part": report.body_part,
                "indication": report.indication,
            }
        )
    return rows


def make_splits() -> dict[str, list[dict[str, str]]]:
    seen: set[str] = set()
    return {name: make_split(name, seen) for name in COUNTS}


def make_texts(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Whole reports for pre-training, none with the findings of a validation or test report."""
    kept_apart: set[str] = set()
    for name in ("test", "validation"):
        make_split(name, kept_apart)
    rng = Random(f"{SEED} text {seed}")
    made = 0
    while made < count:
        report = make_report(rng)
        if normalise(report.findings) not in kept_apart:
            made += 1
            yield {"id": f"syn-text-{seed}-{made:06d}", "text": as_text(rng, report)}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON lines, written beside `path` and renamed once whole."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the synthetic radiology corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="write train.jsonl, validation.jsonl and test.jsonl")
    pairs.add_argument("--out", type=Path, required=True, help="folder")
    text = commands.add_parser("text", help="write whole reports as plain text, for pre-training")
    text.add_argument("--count", type=natural, default=40_000)
    text.add_argument("--seed", type=natural, default=1)
    text.add_argument("--output", type=Path, required=True, help="JSON lines file")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pairs":
            for name, rows in make_splits().items():
                write_rows(options.out / f"{name}.jsonl", rows)
        else:
            write_rows(options.output, make_texts(options.count, options.seed))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: cannot write: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
