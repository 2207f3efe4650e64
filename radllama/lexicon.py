"""The words of radiology reports: lexicon.txt read into a tree, and a text cut into what the tree knows.

`tokens` gives for one sentence the findings, organs, sides, degrees, measurements, negations and other cues in it, each
with its span; rules over them are clinical.py's. Standard library only.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple


class Token(NamedTuple):
    """A wording in a sentence: H finding, ~ finding denied, O organ, S side, D degree, C change, # size, or a cue."""

    kind: str
    value: str
    start: int
    end: int


_WORD = re.compile(r"[a-z][a-z0-9]*|[0-9]*\.?[0-9]+|[,:()/]")
_BRITISH = [
    ("haem", "hem"),
    ("aemi", "emi"),
    ("oedem", "edem"),
    ("oesoph", "esoph"),
    ("tumour", "tumor"),
    ("grey", "gray"),
]
_GLUE = {
    ",": ",", "(": ",", ")": ",", ":": ":", "with": "with", "and": "and", "or": "or", "nor": "or", "/": "or",
    "is": "verb", "are": "verb", "was": "verb", "were": "verb", "there": "verb", "has": "verb", "show": "verb",
    "have": "verb", "measure": "verb", "contain": "verb", "demonstrate": "verb", "due": "with",
    "causing": "with", "cause": "with", "which": "but", "versus": "or",
}  # fmt: skip
_UNITS = {
    "mm": (1, "mm"), "millimeter": (1, "mm"), "cm": (10, "mm"), "centimeter": (10, "mm"), "day": (1, "day"),
    "week": (7, "day"), "month": (30, "day"), "year": (360, "day"), "ml": (1, "cm3"), "cc": (1, "cm3"),
    "percent": (1, "%"),
}  # fmt: skip
_COUNTS = dict(zip("one two three four five six seven eight nine ten eleven twelve".split(), range(1, 13), strict=True))  # noqa: SIM905


@lru_cache(maxsize=100_000)
def _norm(word: str) -> str:
    """American, singular, and the same for the lexicon and the text; it need not be English."""
    for british, american in _BRITISH:
        word = word.replace(british, american)
    if word.startswith("opacification"):
        return "opacity"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-2] if word.endswith("sses") else word[:-3] + "y" if word.endswith("ies") else word[:-1]
    return word


class Lexicon:
    """lexicon.txt, read once: a tree of words, and what the names in it mean."""

    def __init__(self, text: str) -> None:
        self.tree: dict[str, Any] = {}  # word -> deeper; "" -> the roles of the wording
        self.parents: dict[str, tuple[str, ...]] = {}
        self.organ_of: dict[str, str] = {}
        self.critical: set[str] = set()
        self.combined: dict[tuple[str, str], str] = {}  # (organ, general head) -> finding
        self.general: dict[str, set[str]] = {}  # finding -> the heads that are more general names of it
        self.supports: dict[str, set[str]] = {}
        plus: list[tuple[str, str, str]] = []
        organ = ""
        for line in re.sub(r"\n  +", " ", text).splitlines():
            head, _, tail = line.partition(":")
            words = [word.strip() for word in tail.split(",") if word.strip()]
            if not line.strip() or line.startswith("#"):
                continue
            if line.startswith("="):
                name, _, parents = head.removeprefix("= ").removesuffix(")").partition(" (")
                organ = "" if name == "*" else name
                self.parents[organ] = tuple(parents.split())
                for word in words:
                    self._add(word, "O", organ)
            elif line.startswith("@supports"):
                self.supports[head[10:]] = set(words)
            elif line.startswith("@general"):
                self.general.setdefault(head[9:], set()).update(words)
            elif line.startswith("@critical"):
                self.critical = set(words)
            elif line.startswith("@actions"):
                name, words[0] = words[0].split("=")
                for word in words:
                    self._add(word, "action", name)
            elif line.startswith("@"):
                for word in words:
                    self._add(word, *self._cue(head[1:]))
            else:
                name = head.lstrip("-")
                self.organ_of.setdefault(name, organ)
                for word in words if head.startswith("-") else [name, *words]:
                    if word.startswith("+"):
                        plus.append((organ, word[1:], name))
                    else:
                        self._add(word.lstrip("~"), "~" if word.startswith("~") else "H", name)
        for word, kind in _GLUE.items():
            self._add(word, kind, word)
        for organ, word, name in plus:
            node = self.tree.get(_norm(word), {})
            head = next((value for kind, value in node.get("", ()) if kind == "H"), word)
            self.combined.setdefault((organ, head), name)
            self.general.setdefault(name, set()).add(head)
        self.region = {organ: self._ancestors(organ) for organ in self.parents}

    @staticmethod
    def _cue(name: str) -> tuple[str, str]:
        if name in ("left", "right", "bilateral"):
            return "S", name
        if name in ("mild", "moderate", "severe"):
            return "D", name
        if name in ("same", "new", "more", "less", "gone", "prior"):
            return "C", name
        return name, name

    def _add(self, wording: str, kind: str, value: str) -> None:
        node = self.tree
        for word in _WORD.findall(wording.lower()) if wording not in _GLUE else [wording]:
            node = node.setdefault(_norm(word), {})
        roles = node.setdefault("", [])
        if not any(kind == other for other, _ in roles):
            roles.append((kind, value))
        if kind in "HO" and " " in wording:  # "narrowing of the left neural foramina" speaks of a side too
            sides = [word for word in ("left", "right", "both") if word in wording.split() and ("S", word) not in roles]
            roles += [("S", "bilateral" if word == "both" else word) for word in sides]

    def _ancestors(self, organ: str) -> frozenset[str]:
        """The organ itself and every region that holds it."""
        found, todo = {organ}, list(self.parents.get(organ, ()))
        while todo:
            if (region := todo.pop()) not in found:
                found.add(region)
                todo += self.parents.get(region, ())
        return frozenset(found)


LEXICON = Lexicon((Path(__file__).parent / "lexicon.txt").read_text(encoding="utf-8"))
NOWHERE: frozenset[str] = frozenset()


def related(a: str, b: str) -> bool:
    """Whether two organs are the same, one is part of the other, or one was not named."""
    region = LEXICON.region
    return not a or not b or a == b or a in region.get(b, NOWHERE) or b in region.get(a, NOWHERE)


_END = re.compile(r"[.!?;\n](?:(?<=\n)|[.!?;]*(?:(?=\s)|$)|(?<=[a-z]\.)(?=[A-Z]))\s*(?:\(?\d{1,2}[.)]\s+)*")
_LIST = re.compile(r"\s*\(?\d{1,2}[.)]\s+")
_LONGEST = 1000  # characters of a sentence; more is no sentence, and the rules take quadratic time


def sentences(text: str) -> list[tuple[int, int]]:
    """The spans of the sentences and list items, without the numbers of a list."""
    match = _LIST.match(text)
    ends = [match.span() for match in _END.finditer(text, match.end() if match else 0)]
    starts = [match.end() if match else 0, *[after for _, after in ends]]
    stops = [*[stop for stop, _ in ends], len(text)]
    spans = [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop > start]
    if len(text) > _LONGEST:
        spans = [(i, min(i + _LONGEST, end)) for start, end in spans for i in range(start, end, _LONGEST)]
    return spans


def sentence_texts(text: str) -> list[str]:
    """`sentences` as texts, in half the time."""
    match = _LIST.match(text)
    found = [sentence for sentence in _END.split(text[match.end() :] if match else text) if sentence]
    if len(text) > _LONGEST:
        found = [part[i : i + _LONGEST] for part in found for i in range(0, len(part), _LONGEST)]
    return found


def lower(text: str) -> str:
    """Lower case of the same length ("İ" has a longer one), so that spans hold."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _words(sentence: str) -> list[Token]:
    """What the lexicon knows in a lower-case sentence, and the measurements."""
    raw = _WORD.findall(sentence)
    words = [_norm(word) for word in raw]
    tokens: list[Token] = []
    tree, position, i, n = LEXICON.tree, 0, 0, len(words)
    while i < n:
        word = words[i]
        start = sentence.find(raw[i], position)
        position = start + len(raw[i])
        node = tree.get(word)
        i += 1
        if node is None:
            if word[0] in ".0123456789" or word in _COUNTS:
                tokens.append(Token("#", str(_COUNTS.get(word, word)), start, position))
            elif word in _UNITS or word == "x" or word == "to":
                tokens.append(Token("unit", word, start, position))
            continue
        roles, end, j = node.get(""), i, i
        while j < n and (node := node.get(words[j])) is not None:
            j += 1
            if "" in node:
                roles, end = node[""], j
        for k in range(i, end):
            position = sentence.find(raw[k], position) + len(raw[k])
        i = end
        for kind, value in roles or ():
            tokens.append(Token(kind, value, start, position))
    return tokens


def _measure(found: list[Token]) -> list[Token]:
    """Numbers joined with their units ("2.4 x 1.8 cm", "6 to 12 months", "BI-RADS 4"); other numbers fall out."""
    done: list[Token] = []
    pending: list[Token] = []
    category = False
    for token in found:
        kind = token.kind
        if kind == "#":
            if category:
                done.append(Token("rads", token.value, token.start, token.end))
                category = False
            else:
                pending.append(token)
        elif kind == "unit":
            if token.value in _UNITS:
                factor, unit = _UNITS[token.value]
                done += [Token("#", f"{float(p.value) * factor:.1f} {unit}", p.start, token.end) for p in pending]
                pending = []
        else:
            pending = pending if kind in ("or", "and") else []  # "4 or 5 mm"
            if kind == "rads":
                category = True
            else:
                done.append(token)
                category = category and kind in (":", "action")
    return done


@cache
def combine(organ: str, head: str) -> str | None:
    """The finding that a general head makes with an organ, or with the next wider region that has one."""
    todo = [organ]
    for region in todo:
        if found := LEXICON.combined.get((region, head)):
            return found
        todo += LEXICON.parents.get(region, ())
    return None


@cache
def denied_by(word: str, organ: str) -> str:
    """What "normal" (or "normal in size", "intact", "patent") says is not there."""
    heads = {
        "size": ("enlargement",),
        "intact": ("tear", "fracture"),
        "patent": ("thrombosis", "stenosis", "occlusion"),
    }
    found = (combine(organ, head) for head in heads.get(word, ()))
    return next((name for name in found if name), "abnormality")


def tokens(sentence: str) -> list[Token]:
    """The tokens of a lower-case sentence; measurements in mm, cm3, days or percent ("25.0 mm")."""
    return _measure(_words(sentence))
