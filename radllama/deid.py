"""A screen for the 18 HIPAA Safe Harbor identifiers in radiology reports: find, redact, replace.

Screening, not certification: a rule finds what has a form or stands beside a cue; docs/deid.md says, letter by letter,
what the rules cannot find. Safe Harbor (45 CFR 164.514(b)(2)) leaves a bare year, a state, and an age of 89 or less.

Reports come by the million, and few of their words are cues. So a text is folded once into lower-case words, these are
intersected with a table of cues, and an expression runs only where a cue stands. Numbers that need no cue (dates,
telephone numbers, long codes) have one trigger expression, which starts with a digit.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from radllama.deid_rules import CUES, PARTICLE, numbers, signs
from radllama.deid_words import FIRST, LAST, PLAIN_PLACE, STATE, STREETS

VERSION = "1.0"

# Kind -> letter of 45 CFR 164.514(b)(2)(i).
HIPAA = {
    "name": "A", "geographic": "B", "zip": "B", "date": "C", "age_over_89": "C", "phone": "D", "fax": "E", "email": "F",
    "ssn": "G", "mrn": "H", "health_plan": "I", "account": "J", "license": "K", "vehicle": "L", "device": "M",
    "url": "N", "ip": "O", "biometric": "P", "photo": "Q", "other_id": "R", "accession": "R",
}  # fmt: skip
KINDS = tuple(HIPAA)


@dataclass(frozen=True)
class Identifier:
    """`text[start:end]` looks like an identifier of `kind`; `rule` names the rule that says so."""

    kind: str
    start: int
    end: int
    rule: str


# ---- folding

# Bytes: capitals to small letters, letters and digits as they are, all else a space.
_FOLD = bytes(c + 32 if 65 <= c <= 90 else c if 97 <= c <= 122 or 48 <= c <= 57 else 32 for c in range(256))
_ODD = {**dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"), **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
        **dict.fromkeys("\u2019\u02bc", "'"), "\uff1a": ":"}  # fmt: skip
# What a de-identified text has in an identifier's place: [DATE], [**...**], XXXX, ___. It is blanked before the search.
_TAGS = "|".join(KINDS).upper() + (
    "|REDACTED|REMOVED|PHI|PII|PERSON|PATIENT|DOCTOR|PHYSICIAN|HOSPITAL|LOCATION|ADDRESS|AGE|ID|TIME|INITIALS"
)
_PLACEHOLDERS = (  # what is looked for first, then the whole; each starts with a literal, which is a fast search
    ("[", re.compile(rf"\[(?:\*\*[^\n]{{0,100}}?\*\*|{_TAGS})\]")),
    ("<", re.compile(rf"<(?:{_TAGS})>")),
    ("XXX", re.compile(r"X(?<![^\W_]X)XX+(?![^\W_])")),
    ("__", re.compile("__+")),
    ("***", re.compile(r"\*\*\*+")),
)


def _plain(text: str) -> str:
    """The text, as long as before, with odd dashes and spaces made plain and placeholders blanked."""
    if not text.isascii():
        for odd, even in _ODD.items():
            text = text.replace(odd, even)
    for sign, form in _PLACEHOLDERS:
        if sign in text:
            text = form.sub(lambda match: "\0" * len(match.group()), text)
    return text


# ---- the screen


_WORDS = frozenset(CUES)
_SUREST = ("email", "url", "UUID", "UDI", "MAC", "IPv6", "plate", "label", "call")


@lru_cache(maxsize=50_000)  # sentences come again and again
def _cues(piece: str) -> frozenset[bytes]:
    return _WORDS.intersection(piece.encode("ascii", "replace").translate(_FOLD).split())


def screen(text: str) -> list[Identifier]:
    """What looks like an identifier: sorted, disjoint spans of `text`. Placeholders ([DATE], XXXX, ___) are none."""
    plain = _plain(text)
    found: list[tuple[int, int, str, str]] = []

    def add(kind: str, start: int, end: int, rule: str) -> None:
        found.append((start, end, kind, rule))

    folded = b" " + plain.encode("ascii", "replace").translate(_FOLD) + b" "
    for cue in {cue for piece in plain.split(". ") for cue in _cues(piece)}:
        at = folded.find(b" " + cue + b" ")
        while at >= 0:
            for rule in CUES[cue]:
                rule(plain, at, at + len(cue), add)
            at = folded.find(b" " + cue + b" ", at + 1)
    numbers(plain, add)
    signs(plain, add)
    return _merge(found)


def _merge(found: list[tuple[int, int, str, str]]) -> list[Identifier]:
    """Overlapping spans become one; it has the kind of the surest rule, then of the longest span."""
    merged: list[tuple[str, int, int, str]] = []
    best = (0, 0)
    for start, end, kind, rule in sorted(found, key=lambda span: (span[0], -span[1], span[2:])):
        rank = (_SUREST.index(rule) if rule in _SUREST else len(_SUREST), start - end)
        if merged and start < merged[-1][2]:
            last = merged.pop()
            kind, rule = (kind, rule) if rank < best else (last[0], last[3])
            start, end, rank = last[1], max(end, last[2]), min(rank, best)
        merged.append((kind, start, end, rule))
        best = rank
    return [Identifier(*span) for span in merged]


def _substitute(text: str, found: Iterable[Identifier], new: Callable[[str, str], str]) -> str:
    parts, last = [], 0
    for item in found:
        parts += [text[last : item.start], new(item.kind, text[item.start : item.end])]
        last = item.end
    return "".join([*parts, text[last:]])


def redact(text: str, found: list[Identifier] | None = None) -> str:
    """The text with "[DATE]", "[NAME]" ... for what was `found`. Without `found`, for all that `screen` finds, until it
    finds nothing more: a second call then changes nothing."""
    if found is not None:
        return _substitute(text, found, lambda kind, _: f"[{kind.upper()}]")
    while found := screen(text):
        text = _substitute(text, found, lambda kind, _: f"[{kind.upper()}]")
    return text


# ---- surrogates

_GIVEN, _SURNAMES = sorted(FIRST - LAST), sorted(LAST - FIRST)
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_PARTS = re.compile("[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+")


def replace(text: str, *, key: bytes, patient: str, found: list[Identifier] | None = None) -> str:
    """The text with surrogates for what was `found` (or `screen` finds). They follow from `key`, a secret of the site,
    and `patient`: the same name gets the same name in all reports of a patient, dates move back by the same number of
    days (1 to 365) in the same format, codes keep their form, and ages over 89 become 89. A date that cannot be read is
    redacted. An empty key is a ValueError: anybody could undo the surrogates."""
    if not key:
        raise ValueError("replace needs a secret key: pass key=secrets.token_bytes(32) and keep it for later reports")

    def draw(*parts: str) -> bytes:
        seed = hmac.new(key, "\x1f".join((patient, *parts)).encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        return hashlib.shake_256(seed).digest(256)

    days = 1 + int.from_bytes(draw("days")[:8]) % 365

    def new(kind: str, value: str) -> str:
        if kind == "date":
            return _earlier(value, days) or "[DATE]"
        if kind == "age_over_89":
            words = "eighty-nine" if "ety" in value.lower() else "89"
            return words.upper() if value.isupper() else words.capitalize() if value[0].isupper() else words
        if kind in ("name", "geographic"):
            return "".join(_word(kind, part, draw) for part in re.split(r"([^\W_]+)", value))
        return _scramble(kind, value, draw)

    return _substitute(text, screen(text) if found is None else found, new)


def _word(kind: str, word: str, draw: Callable[..., bytes]) -> str:
    """A surrogate for a word of a name or an address, in its case; particles and words like Hospital stay."""
    low = word.lower()
    if not word[:1].isalnum() or (kind == "name" and re.fullmatch(PARTICLE, word)):
        return word
    if kind == "geographic" and (low in PLAIN_PLACE or low in STREETS or re.fullmatch(STATE, word)):
        return word
    if not word.isalpha() or len(word) == 1:
        return _scramble(kind, word, draw)
    names = _GIVEN if low in FIRST and kind == "name" else _SURNAMES
    at = int.from_bytes(draw(kind, low)[:8]) % len(names)
    name = names[at] if names[at] != low else names[at - 1]
    return name.upper() if word.isupper() else name.title() if word[0].isupper() else name


def _scramble(kind: str, value: str, draw: Callable[..., bytes]) -> str:
    """A code of the same form: digits for digits, letters for letters; the same with and without its punctuation."""
    random = draw(kind, "".join(c for c in value if c.isalnum()).lower())
    keep = value.find("://") + 3 if "://" in value else 4 if value.startswith("www.") else 0
    stop = value.rfind(".") if kind in ("email", "photo") else len(value)
    hexadecimal = kind in ("ip", "device", "other_id") and re.fullmatch("[0-9A-Fa-f:.-]+", value)
    letters = "abcdef" if hexadecimal else "abcdefghijklmnopqrstuvwxyz"
    made, used = list(value), 0
    for i, old in enumerate(value):
        if not keep <= i < stop or not old.isalnum():
            continue
        byte, used = random[used % len(random)], used + 1
        if old.isdecimal():
            made[i] = str(byte % 10)
        elif old.isalpha():
            letter = letters[byte % len(letters)]
            made[i] = letter.upper() if old.isupper() else letter
    return "".join(made)


def _earlier(value: str, days: int) -> str | None:
    """The date so many days before, in the same format; None if it is none. Month before day, unless that cannot be or
    dots divide them. A month without a day is read as its 15th, a day without a year as one of 2001."""
    value, mark, clock = value.partition("T") if re.match(r"[0-9/.-]+T", value) else (value, "", "")
    if value.isdecimal() and len(value) >= 8:
        parts, tail = [value[:4], value[4:6], value[6:8]], value[8:]
    else:
        parts, tail = _PARTS.findall(value), ""
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    named = [i for i, part in enumerate(parts) if part[:3].title() in {m[:3] for m in _MONTHS} and len(part) > 2]
    year = day = month = -1  # places in `parts`
    if named:
        month = named[0]
        year = next((i for i in numbers if len(parts[i]) == 4), numbers[1] if len(numbers) > 1 else -1)
        day = next((i for i in numbers if i != year), -1)
    elif len(numbers) == 3:
        year, month, day = numbers if len(parts[numbers[0]]) == 4 else (numbers[2], numbers[0], numbers[1])
        if year == numbers[2] and ("." in value or int(parts[month]) > 12) and int(parts[day]) <= 12:
            month, day = day, month
    elif len(numbers) == 2:
        month, year, day = (*numbers, -1) if len(parts[numbers[1]]) == 4 else (numbers[0], -1, numbers[1])
    try:
        m = 1 + [name[:3] for name in _MONTHS].index(parts[month][:3].title()) if named else int(parts[month])
        y = 2001 if year < 0 else int(parts[year])
        y += 0 if y > 99 else 1900 if y > 30 else 2000
        moved = date(y, m, int(parts[day]) if day >= 0 else 15) - timedelta(days=days)
    except (ValueError, IndexError, OverflowError):
        return None
    padded = numbers[0] == year or any(parts[i][0] == "0" for i in (day, month) if i >= 0)
    if year >= 0:
        parts[year] = f"{moved.year % 100:02}" if len(parts[year]) == 2 else str(moved.year)
    if day >= 0:
        parts[day] = f"{moved.day:02}" if padded else str(moved.day)
    plain = f"{moved.month:02}" if padded else str(moved.month)
    parts[month] = _like(_MONTHS[moved.month - 1], parts[month]) if named else plain
    if day >= 0 and len(parts) > day + 1 and parts[day + 1].lower() in ("st", "nd", "rd", "th"):
        nth = "th" if moved.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(moved.day % 10, "th")
        parts[day + 1] = nth.upper() if parts[day + 1].isupper() else nth
    for i, part in enumerate(parts):
        if part.lower().endswith("day") or part.lower() in ("mon", "tue", "wed", "thu", "fri", "sat", "sun"):
            parts[i] = _like(moved.strftime("%A"), part)
    return "".join(parts) + tail + mark + clock


def _like(word: str, model: str) -> str:
    """The name of a month or a day as long and in the case of the model."""
    word = word if len(model) > 4 or model.lower() in ("june", "july") else word[:3]
    return word.upper() if model.isupper() else word.lower() if model.islower() else word


# ---- Presidio

# Its DATE_TIME is left out: it means ages, durations and years too, and dates are what the rules here find best.
_PRESIDIO = {
    "PERSON": "name", "LOCATION": "geographic", "PHONE_NUMBER": "phone", "EMAIL_ADDRESS": "email", "US_SSN": "ssn",
    "URL": "url", "IP_ADDRESS": "ip", "CREDIT_CARD": "account", "IBAN_CODE": "account", "US_BANK_NUMBER": "account",
    "US_DRIVER_LICENSE": "license", "MEDICAL_LICENSE": "license", "US_PASSPORT": "other_id",
}  # fmt: skip


@cache
def _analyzer() -> Any:
    try:
        return import_module("presidio_analyzer").AnalyzerEngine()
    except ImportError as error:
        raise ImportError("screen_with_presidio needs Presidio: pip install 'radllama[presidio]'") from error


def screen_with_presidio(text: str) -> list[Identifier]:
    """`screen`, and what Presidio's English recognizers add: names and places without a cue. It is slow (a language
    model reads every text) and takes eponyms for names. An ImportError says how to install it."""
    found = [(item.start, item.end, item.kind, item.rule) for item in screen(text)]
    for result in _analyzer().analyze(text=text, language="en"):
        kind = _PRESIDIO.get(result.entity_type)
        if kind and result.start < result.end:
            found.append((result.start, result.end, kind, "presidio"))
    return _merge(found)
