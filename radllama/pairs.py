"""The judgement of one report: a clean, screened findings/impression pair, or the reason why there is none.

`process` is pure (record in, Pair or Dropped out), so that it runs inside `datasets.map`, Polars or Spark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, get_args

from radllama import deid
from radllama.deid import Identifier, redact, screen, screen_with_presidio
from radllama.faithful import unsupported
from radllama.intake import FIELDS, encodable
from radllama.sections import leaks, parse_report, renumber

VERSION = "2"  # of the filters below
Policy = Literal["flag", "drop", "off"]
CLAIMS = ("prior", "number", "side", "negation", "entity")  # of the impression, as faithful.unsupported names them
POLICIES = ("placeholder", "repeated", "language", *CLAIMS)
LABELS = ("modality", "body_part")
FLAGS = (*POLICIES, "addendum", *(f"{name}_withheld" for name in ("indication", "comparison", *LABELS)))


@dataclass(frozen=True)
class Options:
    """How `process` judges. A policy keeps a report and names the problem in `flags`, drops it, or does not look."""

    min_findings_words: int = 10
    min_impression_words: int = 2
    addendum: Literal["drop", "append", "quarantine"] = "drop"  # of an addendum's text; see sections.parse_report
    deid: Literal["screen", "redact", "off"] = "screen"
    deid_backend: Literal["rules", "presidio"] = "rules"  # presidio: the rules and what Presidio adds; slow
    surrogates: bool = False  # redact with surrogates and shifted dates instead of "[NAME]", "[DATE]"
    key: bytes = field(default=b"", repr=False)  # the site's secret: pseudonyms, surrogates, and the draw of the splits
    max_placeholders: float = 1 / 3  # a larger share of the words of findings or impression drops the report
    placeholder: Policy = "flag"
    repeated: Policy = "drop"
    language: Policy = "flag"
    prior: Policy = "flag"
    number: Policy = "flag"
    side: Policy = "flag"
    negation: Policy = "flag"
    entity: Policy = "flag"

    def __post_init__(self) -> None:
        if self.surrogates and not self.key:
            raise ValueError("surrogates need a key: --key-file FILE (a new file is filled with a random key)")
        if self.surrogates and self.deid != "redact":
            raise ValueError("surrogates replace what is redacted: give --deid redact, too")
        for name in POLICIES:
            if getattr(self, name) not in get_args(Policy):
                raise ValueError(f"{name}: expected flag, drop or off, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class Pair:
    """A report to learn from. Optional fields are "" where the record has none."""

    id: str
    findings: str
    impression: str
    patient_id: str = ""
    study_date: str = ""
    modality: str = ""
    body_part: str = ""
    indication: str = ""
    comparison: str = ""
    flags: tuple[str, ...] = ()
    identifiers: str = ""  # what was withheld or replaced, as "date:2 name:1"

    def row(self) -> dict[str, Any]:
        """The pair with an empty reason: the same keys as Dropped.row, for table engines."""
        return asdict(self) | {"flags": list(self.flags), "reason": "", "detail": ""}


@dataclass(frozen=True)
class Dropped:
    """A report that gives no pair. detail: what was found, in codes and counts, never the report's text."""

    id: str
    reason: str
    detail: str = ""

    def row(self) -> dict[str, Any]:
        empty = {entry.name: "" for entry in fields(Pair)}
        return empty | {"id": self.id, "flags": [], "reason": self.reason, "detail": self.detail}


# ---- one report

# What de-identification or a template left open: XXXX, ___, ***, [**...**], [ ], <...>, {...}.
_PLACEHOLDER = re.compile(r"\bX{3,}\b|_{3,}|\*{3,}|\[\*\*[^\]]*\*\*\]|\[ *\]|<[^<>\n]{0,40}>|\{[^{}\n]{0,40}\}")
_SIGNS = ("XXX", "___", "***", "[", "<", "{")  # one of them is in every placeholder
_HEADED = re.compile(r"\s*(?:findings?|impressions?)\s*:\s*", re.I)
_DOTS = re.compile(r"(?<!\.)\. ?\.(?=\s|\Z)")  # "effusion.." and "effusion. .": an empty sentence; an ellipsis stays


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ENGLISH = _set(
    """a the is are no of and with without there was has have in on for to which normal clear lungs heart within limits
    not or be by at from this that seen left right acute unremarkable evidence size"""
)
_FOREIGN = _set(  # function words of a dozen languages; none is an English word or a usual abbreviation
    """der das und nicht keine kein keinen mit ohne von im bei eine einer ist sich zum zur auf los las del sin se con
    por una que le les des du une est et pas avec sans dans il della di sono nel senza não sem da com uma dos na het een
    geen van niet zijn og ikke och inte på med av ja ei oraz nie bez"""
)


def process(record: Mapping[str, Any], options: Options = Options()) -> Pair | Dropped:
    """Judge one report: its pair, cleaned and screened, or why there is none.

    record: `text` (a whole report), or `findings` and `impression`; and optional `id`, `patient_id`, `study_date`,
    `modality`, `body_part`, `indication`, `comparison`. None and NaN count as missing; other values become texts.
    Never raises for what a record holds. Pure: the same record and options give the same result, anywhere. `id`,
    `patient_id` and `study_date` are passed on as they are: `pseudonym` is there for them.
    """
    values = {name: _text(record.get(name)) for name in FIELDS}
    name, flags = values["id"], []
    if not all(value.isascii() or encodable(value) for value in values.values()):
        return Dropped(name.encode("utf-8", "replace").decode(), "undecodable", "half of a surrogate pair")
    if values["text"]:
        parsed = parse_report(values["text"], addendum=options.addendum)
        if parsed.reason:
            return Dropped(name, parsed.reason)
        findings, impression = parsed.findings, renumber(parsed.impression)
        values["indication"] = values["indication"] or parsed.indication
        values["comparison"] = values["comparison"] or parsed.comparison
        if parsed.has_addendum:
            flags.append("addendum")
    else:
        findings = (
            _HEADED.sub("", values["findings"], count=1) if ":" in values["findings"][:20] else values["findings"]
        )
        impression = renumber(_HEADED.sub("", values["impression"], count=1))
        if not findings or not impression:
            missing = [part for part, text in (("findings", findings), ("impression", impression)) if not text]
            return Dropped(name, f"no_{missing[0]}" if len(missing) == 1 else "empty_report")

    findings, impression = (
        _DOTS.sub(".", text) if ".." in text or ". ." in text else text for text in (findings, impression)
    )
    for part, text, least in (
        ("findings", findings, options.min_findings_words),
        ("impression", impression, options.min_impression_words),
    ):
        if least > 0 and len(text.split(None, least - 1)) < least:  # not all words of a long text
            return Dropped(name, f"short_{part}", f"{len(text.split())} words")
    context = values["indication"] + (f"\nComparison: {values['comparison']}" if values["comparison"] else "")
    problems = _problems(findings, impression, context, options)
    if drop := next((problem for problem in problems if getattr(options, problem, "") == "drop"), None):
        return Dropped(name, drop)
    if "placeholders" in problems:
        return Dropped(name, "placeholders", "more than the share that --max-placeholders allows")
    flags += problems
    if leaks(impression, f"{findings}\n{context}"):
        return Dropped(name, "impression_in_prompt")
    pair = Pair(
        name, findings, impression, values["patient_id"], values["study_date"], values["modality"],
        values["body_part"], values["indication"], values["comparison"],
    )  # fmt: skip
    return _screened(pair, flags, options)


def _text(value: Any) -> str:
    if type(value) is str:
        return value.strip()
    try:
        missing = value is None or bool(value != value)
    except (TypeError, ValueError):  # pandas' NA has no truth value, nor has an array
        missing = repr(value) == "<NA>"
    return "" if missing else str(value).strip()


def _problems(findings: str, impression: str, context: str, options: Options) -> list[str]:
    """The names of the policies that apply; "placeholders" where there are too many of them."""
    found: list[str] = []
    if options.placeholder != "off":
        for text in (findings, impression):
            if any(sign in text for sign in _SIGNS) and (count := len(_PLACEHOLDER.findall(text))):
                found += ["placeholder"] * (not found)
                if count > options.max_placeholders * len(text.split()):
                    return ["placeholders"] if options.placeholder != "drop" else ["placeholder"]
    if options.repeated != "off" and _repeated(findings, impression):
        found.append("repeated")
    if options.language != "off" and not _english(findings):
        found.append("language")
    if any(getattr(options, claim) != "off" for claim in CLAIMS):
        kinds = {claim.kind for claim in unsupported(findings, impression, context)}
        found += [claim for claim in CLAIMS if claim in kinds and getattr(options, claim) != "off"]
    return found


def _repeated(findings: str, impression: str) -> bool:
    """Whether the text stands there twice: long sentences that repeat others make up 30 % of it, or both are equal."""
    low = findings.lower()
    if low == impression.lower():
        return True
    parts = low.replace(";", ".").replace("\n", ".").split(".")
    sentences = [sentence for part in parts if len(part) >= 20 and len(sentence := part.lstrip()) >= 20]
    distinct = set(sentences)
    if len(distinct) == len(sentences):
        return False
    return sum(map(len, sentences)) - sum(map(len, distinct)) >= 0.3 * len(findings)


def _english(text: str) -> bool:
    """No language model: function words of English against those of a dozen European languages, and the alphabet."""
    start = text[:600].lower()
    if not start.isascii() and sum(letter > "\u024f" and letter.isalpha() for letter in start) > 0.3 * len(start):
        return False
    words = start.replace(".", " ").replace(",", " ").split()
    return _FOREIGN.isdisjoint(words) or len(_FOREIGN.intersection(words)) <= len(_ENGLISH.intersection(words))


def _screened(pair: Pair, flags: list[str], options: Options) -> Pair | Dropped:
    """The pair without identifiers. Under "screen" a field beside the report that holds some is left out: a date of
    comparison stands in most reports, and the pair does not need it."""
    texts = {name: getattr(pair, name) for name in ("findings", "impression", "indication", "comparison")}
    labels = {name: getattr(pair, name) for name in LABELS}
    find = screen_with_presidio if options.deid_backend == "presidio" else screen
    if options.deid != "off":
        found = find("\n\n".join(texts.values())) + [item for text in labels.values() for item in in_label(find, text)]
    if options.deid == "off" or not found:
        return replace(pair, flags=tuple(flags)) if flags else pair
    texts |= labels
    if options.deid == "screen":
        if inside := find(f"{pair.findings}\n\n{pair.impression}"):
            return Dropped(pair.id, "identifier", _kinds(inside))
        for name in ("indication", "comparison", *LABELS):
            if find(texts[name]):
                texts[name] = ""
                flags.append(f"{name}_withheld")
    elif options.surrogates:
        owner = pair.patient_id or pair.id
        texts = {n: deid.replace(t, key=options.key, patient=owner, found=find(t)) for n, t in texts.items()}
    else:
        texts = {n: redact(redact(text, find(text))) for n, text in texts.items()}
    return replace(pair, **texts, flags=tuple(flags), identifiers=_kinds(found))


@lru_cache(maxsize=4096)
def in_label(find: Callable[[str], list[Identifier]], text: str) -> list[Identifier]:
    """A label is screened by itself, once: a department has few. Beside another, MR would be a title."""
    return find(text)


def _kinds(found: list[Identifier]) -> str:
    counts: dict[str, int] = {}
    for item in found:
        counts[item.kind] = counts.get(item.kind, 0) + 1
    return " ".join(f"{kind}:{count}" for kind, count in sorted(counts.items()))


def pseudonym(value: str, key: bytes, prefix: str = "") -> str:
    """A name for a patient or a report that only the holder of `key` can link to the original."""
    if not key:
        raise ValueError("pseudonym needs a key: without one, anybody could try all numbers")
    raw = blake2b(f"{prefix}\x1f{value}".encode(), digest_size=8, key=blake2b(key).digest())
    return prefix + raw.hexdigest()
