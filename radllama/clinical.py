"""What a radiology report states, read by rules: findings with negation, side, size, degree, change; advice.

Standard library only, any modality. The words are in lexicon.txt, the rules here:

1. A text is cut into sentences, a sentence into clauses ("but", "for which"), a clause into chunks (commas, "with").
2. The longest wording in the lexicon wins. A general head ("stone", "enlarged") and the organ named beside it make
   one finding (gallbladder: cholelithiasis; heart: cardiomegaly), so that word order and part of speech do not matter.
3. "no" denies what follows up to "with", "but", or a comma after which no "or" follows; "not seen" what precedes.
   "Normal", "clear", "intact" beside an organ denies any abnormality of it.
4. Side, degree and size belong to the finding they stand beside, at most up to the next finding, comma or "with".

`compare` scores claims against claims. A claim counts when the other text implies it: "no acute cardiopulmonary
abnormality" implies "no pneumothorax", not the other way round. What an impression says that its findings do not carry
is faithful.py's to find.
These are rules about words: good for scores over many reports, no reading of a single one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

from radllama.lexicon import LEXICON, NOWHERE, Token, combine, denied_by, lower, related, sentences
from radllama.lexicon import tokens as tokens_of

VERSION = "2"
ASPECTS = ("entity", "negation", "side", "number", "severity", "prior", "recommendation", "urgent")
Side = Literal["left", "right", "bilateral"]
Number = tuple[float, str]  # in mm, cm3, day, %, or "rads" for a category


@dataclass(frozen=True, slots=True)
class Statement:
    """One claim of a text. `start`, `end` span its sentence, `entity_start`, `entity_end` the words that name it.

    `entity` is the lexicon's name ("cardiomegaly"), an organ with a general head ("kidney lesion"), "<organ>
    abnormality" (denied where the organ is called normal), "<organ> appearance" (only said to be stable), "category"
    (RADS), "communication", or "recommendation: " and its actions. `change`: new, more, less, same, gone or prior.
    """

    start: int
    end: int
    entity: str
    negated: bool
    uncertain: bool
    side: Side | None
    numbers: tuple[Number, ...]
    severity: str | None
    change: str | None
    recommendation: bool
    urgent: bool
    entity_start: int
    entity_end: int

    @property
    def prior(self) -> bool:
        """Whether it speaks of an earlier examination."""
        return self.change is not None


class Item(NamedTuple):
    """A statement inside its sentence; `concept` is "" where an organ, a size or a change is all that was said."""

    start: int
    end: int
    concept: str
    organ: str
    negated: bool = False
    uncertain: bool = False
    side: Side | None = None
    numbers: tuple[Number, ...] = ()
    severity: str | None = None
    change: str | None = None
    urgent: bool = False
    actions: frozenset[str] = frozenset()


# --- from a sentence to items

_TISSUES = ("bone", "joint", "vessel", "soft tissue", "lymph node")  # a fracture of the radius is one of bone


def _negations(tokens: Sequence[Token]) -> list[bool]:
    """For each token whether a "no" before it, or a "not seen" after it, reaches it."""
    reached, on = [False] * len(tokens), False
    for i, token in enumerate(tokens):
        kind = token.kind
        if kind == "negation":
            on = True
        elif kind == "denied":
            for j in range(i - 1, -1, -1):
                if tokens[j].kind in (",", "with"):
                    break
                reached[j] = True
        elif on:
            if kind in ("with", ":"):
                on = False
            elif kind == ",":
                rest = [other.kind for other in tokens[i + 1 :]]
                stop = next((j for j, other in enumerate(rest) if other in ("with", "negation", ":")), len(rest))
                chunk = rest[: rest.index(",")] if "," in rest else rest
                on = "or" in rest[:stop] or not any(
                    k in ("verb", "normal", "intact", "patent", "C", "D") for k in chunk
                )
            elif kind == "and":
                on = i + 1 < len(tokens) and tokens[i + 1].kind not in ("C", "D", "verb")
            elif (kind == "verb" and token.value == "there") or (
                kind in _NORMAL and not any(t.kind == "negation" for t in tokens[max(i - 2, 0) : i])
            ):
                on = False
        reached[i] = reached[i] or on
    return reached


def _borders(tokens: Sequence[Token]) -> list[bool]:
    """Where a chunk ends: at a comma, "with", "no", and at an "and" after a finding that joins no sides or organs."""
    borders, head = [], False
    for i, token in enumerate(tokens):
        kind = token.kind
        border = kind in (",", "with", "negation")
        if kind == "and" and head and i + 1 < len(tokens):
            a, b = tokens[i - 1], tokens[i + 1]
            joined = a.kind == b.kind and (a.kind == "O" or (a.kind == "S" and {a.value, b.value} == {"left", "right"}))
            border = not joined
        head = kind in "H~" or (head and not border)
        borders.append(border)
    return borders


class _Head:
    """A finding in the making."""

    __slots__ = ("change", "concept", "degrees", "index", "negated", "numbers", "organ", "sides")

    def __init__(self, index: int, concept: str, organ: str, negated: bool) -> None:
        self.index, self.concept, self.organ, self.negated = index, concept, organ, negated
        self.sides: list[str] = []
        self.degrees: list[str] = []
        self.numbers: list[Number] = []
        self.change: str | None = None


def _resolve(tokens: Sequence[Token], i: int, organs: Sequence[int], used: set[int]) -> tuple[str, str]:
    """The finding that head `i` makes with the nearest organ that goes with it, and where it is."""
    concept = tokens[i].value
    own = LEXICON.organ_of.get(concept, "")
    if not organs:
        return concept, own
    near = sorted(
        organs, key=lambda j: abs(j - i) + 8 * any(t.kind in (",", "with") for t in tokens[min(i, j) : max(i, j)])
    )
    for j in near:
        if own and abs(j - i) > 5:
            break
        organ = tokens[j].value
        if (found := combine(organ, concept)) and found != concept:
            used.add(j)
            home = LEXICON.organ_of[found]
            return found, organ if home in LEXICON.region[organ] else home
    if near and not own:
        used.add(near[0])
        return concept, tokens[near[0]].value
    if near and abs(near[0] - i) <= 5:
        organ = tokens[near[0]].value
        used.add(near[0])
        if own in _TISSUES and own in LEXICON.region[organ]:
            return concept, organ
    return concept, own


_NORMAL = {"normal", "intact", "patent"}


def _normal(tokens: Sequence[Token], reached: Sequence[bool], used: set[int]) -> list[_Head]:
    """What "normal", "clear", "intact" deny, of the organs before them, else of those after."""
    made: list[_Head] = []
    pending: list[int] = []
    waiting: int | None = None
    sizes = any(t.kind == "size" for t in tokens)

    def deny(i: int, j: int) -> None:
        kind = tokens[i].kind
        concept = denied_by("size" if sizes and kind == "normal" else kind, tokens[j].value)
        made.append(_Head(j, concept, tokens[j].value, not reached[i]))
        used.add(j)

    for i, token in enumerate(tokens):
        kind = token.kind
        if kind in "HO~":
            if kind != "O":
                pending, waiting = [], None
            elif waiting is not None:
                deny(waiting, i)
            else:
                pending.append(i)
        elif kind in _NORMAL:
            for j in pending:
                deny(i, j)
            waiting = None if pending else i
            pending = []
        elif kind == "with":
            pending, waiting = [], None
    if waiting is not None and not made and not any(t.kind in "H~#C" for t in tokens):
        made.append(_Head(waiting, "abnormality", "", not reached[waiting]))
    return made


def _heads(tokens: Sequence[Token], reached: Sequence[bool], known: set[str]) -> tuple[list[_Head], set[int]]:
    """The findings of a clause in its order, and which organs they used."""
    used: set[int] = set()
    heads = _normal(tokens, reached, used) if known & _NORMAL else []
    nodes = {i - 1 for i, t in enumerate(tokens) if t.value == "lymph node"}  # "hilar lymph nodes": not the hilum
    organs = [i for i, t in enumerate(tokens) if t.kind == "O" and i not in used and i not in nodes]
    for i, token in enumerate(tokens):
        kind = token.kind
        if i == 0 and kind == "H" and len(tokens) > 1 and tokens[1].kind == ":":
            continue  # "Hemorrhage: none" is the name of a section
        if kind == "~":
            heads.append(_Head(i, token.value, LEXICON.organ_of[token.value], True))
        elif kind == "H" and token.value != "abnormality":
            heads.append(_Head(i, *_resolve(tokens, i, organs, used), reached[i]))
        elif kind == "H" or (
            kind == "vague"
            and (reached[i] or any(t.kind == "acute" for t in tokens[max(i - 3, 0) : i]) or (i - 1) in organs)
        ):
            places = {tokens[j].value: j for j in organs}
            used.update(places.values())
            heads += [_Head(i, "abnormality", organ, reached[i]) for organ in places or [""]]
    heads.sort(key=lambda head: head.index)
    for a, b in (
        pairwise(heads) if "uncertain" in known else ()
    ):  # "no mass suspicious for malignancy" denies a mass alone
        between = [t.kind for t in tokens[a.index + 1 : b.index]]
        if a.negated and b.negated and "uncertain" in between and not {",", "or", "and"} & set(between):
            heads.remove(b)
            break
    return heads, used


def _attributes(tokens: Sequence[Token], heads: Sequence[_Head]) -> tuple[_Head | None, dict[int, str]]:
    """Give sides, degrees, sizes and changes to the findings. What finds none: a head of its own; sides by token."""
    borders, at = _borders(tokens), {head.index for head in heads}
    orphan: _Head | None = None
    sides: dict[int, str] = {}
    for i, token in enumerate(tokens):
        kind = token.kind
        if kind not in "SD#C":
            continue
        after = next((j for j in range(i + 1, len(tokens)) if j in at or borders[j]), None)
        after = after if after in at else None
        while after is not None and after + 1 in at and tokens[after + 1].start - tokens[after].end == 1:
            after += 1  # "new enhancing lesions": the lesions are new
        before = next((j for j in range(i, -1, -1) if j in at or borders[j]), None)
        before = before if before in at else None
        between = range(i + 1, after) if after is not None else ()
        if before is not None and (kind == "#" or any(tokens[j].kind in ("verb", "uncertain") for j in between)):
            index: int | None = before
        elif after is not None or before is not None:
            index = after if after is not None else before
        else:
            index = max((h.index for h in heads if h.index < i), default=None)
            if index is None and kind in "CS#":
                index = min((h.index for h in heads if h.index > i), default=None)
            if index is None and kind in "C#":
                place = next((t.value for t in tokens if t.kind == "O"), "")
                orphan = orphan or _Head(i, "", place, False)
            if index is not None and kind == "S" and any(h.sides for h in heads if h.index == index):
                continue
            if index is None and kind == "S":
                sides[i] = token.value
        for head in [h for h in heads if h.index == index] or ([orphan] if orphan and kind in "C#" else []):
            if kind == "S":
                head.sides.append(token.value)
            elif kind == "D":
                head.degrees.append(token.value)
            elif kind == "#":
                value, unit = token.value.split()
                head.numbers.append((float(value), unit))
            elif head.change in (None, "prior"):
                head.change = token.value
    denied = [h for h in heads if h.negated]
    if len(denied) > 1 and len(shared := {s for h in (denied[0], denied[-1]) for s in h.sides}) == 1:
        for head in denied:  # "no fracture or dislocation of the left knee": the side is that of both
            head.sides = head.sides or list(shared)
    return orphan, sides


_ADVICE = ("advise", "recommend")


def _clause(tokens: list[Token]) -> list[Item]:
    items: list[Item] = []
    kinds = [t.kind for t in tokens]
    known = set(kinds)
    actions = frozenset(t.value for t in tokens if t.kind == "action") if "action" in known else frozenset()
    urgent = "urgent" in known
    if "rads" in known:
        items += [
            Item(t.start, t.end, "category", "", numbers=((float(t.value), "rads"),))
            for t in tokens
            if t.kind == "rads"
        ]
    told = kinds.index("told") if "told" in known else None
    advised = "advise" in known or ("recommend" in known and bool(actions))
    first = told if told is not None else next((i for i, k in enumerate(kinds) if advised and k in _ADVICE), None)
    if first is not None:
        start = next((i + 1 for i in range(first, -1, -1) if kinds[i] == ","), 0)
        advice, tokens = tokens[start:], tokens[:start]
        span = advice[0].start, advice[-1].end
        if told is not None:
            items.append(Item(*span, "communication", "", urgent=True))
        else:
            numbers = tuple((float(t.value.split()[0]), t.value.split()[1]) for t in advice if t.kind == "#")
            negated = any(t.kind == "negation" for t in advice)
            items.append(Item(*span, "recommendation", "", negated, numbers=numbers, urgent=urgent, actions=actions))
        urgent = False
    if "C" in known:  # "if prior studies are available", "prior pneumonia" compare with nothing
        loose = "recommend" in known or "if" in known
        after = [*kinds[1:], ""]
        tokens = [
            t for t, kind in zip(tokens, after, strict=False) if t[:2] != ("C", "prior") or not (loose or kind == "H")
        ]
    reached = _negations(tokens) if known & {"negation", "denied"} else [False] * len(tokens)
    heads, used = _heads(tokens, reached, known)
    orphan, lost = _attributes(tokens, heads) if known & {"S", "D", "#", "C"} else (None, {})
    if orphan:  # "a 9 mm left axillary node"
        orphan.sides, lost = list(lost.values()), {}
    doubts = [i for i, t in enumerate(tokens) if t.kind == "uncertain"] if "uncertain" in known else []
    for head in [*heads, *([orphan] if orphan else [])]:
        t, no = tokens[head.index], head.negated
        sides = set(head.sides)
        side: Side | None = "bilateral" if len(sides) > 1 else cast(Side, head.sides[0]) if sides else None
        unsure = bool(doubts) and (doubts[0] < head.index or len(heads) == 1)
        degree = None if no else "-".join(dict.fromkeys(head.degrees)) or None
        alarm = not no and (urgent or head.concept in LEXICON.critical)
        said = no, unsure, side, tuple(head.numbers), degree, head.change, alarm
        items.append(Item(t.start, t.end, head.concept, head.organ, *said))
    for i, t in enumerate(tokens):  # an organ of which something unknown is said, a side of nothing known
        if t.kind == "O" and i not in used and not reached[i]:
            items.append(Item(t.start, t.end, "", t.value))
    for i, name in lost.items():
        place = next((t.value for t in tokens[i:] if t.kind == "O"), "")
        items.append(Item(tokens[i].start, tokens[i].end, "", place, side=cast(Side, name)))
    return items


@lru_cache(maxsize=100_000)
def items_in(sentence: str) -> tuple[Item, ...]:
    """The items of one sentence, spans relative to it."""
    tokens = tokens_of(lower(sentence))
    items: list[Item] = []
    start = 0
    for i in [*(i for i, t in enumerate(tokens) if t.kind == "but"), len(tokens)]:
        if clause := tokens[start:i]:
            items += _clause(clause)
        start = i + 1
    return tuple(items)


def is_loose(item: Item) -> bool:
    """Whether it says a size or a change of nothing."""
    return bool(item.numbers or item.change) and not (item.concept or item.organ or item.side)


def items_of(text: str) -> list[tuple[int, int, Item]]:
    """The items of a text with the spans of their sentences; a size said of nothing belongs to what came before."""
    found: list[tuple[int, int, Item]] = []
    for start, end in sentences(text):
        for item in items_in(text[start:end]):
            if found and is_loose(item):
                a, b, last = found[-1]
                if last.concept not in ("", "recommendation"):
                    more = last._replace(numbers=last.numbers + item.numbers, change=last.change or item.change)
                    found[-1] = a, b, more
                    continue
            found.append((start, end, item))
    return found


def _entity(item: Item) -> str:
    concept, organ = item.concept, item.organ
    if concept == "recommendation":
        return f"recommendation: {', '.join(sorted(item.actions)) or 'not specified'}"
    if not concept:
        return f"{organ} appearance".strip()
    return concept if not organ or organ == LEXICON.organ_of.get(concept) else f"{organ} {concept}"


def statements(text: str) -> list[Statement]:
    """What `text` states, in its order; organs of which nothing known is said are left out."""
    found = []
    for start, end, i in items_of(text):
        if i.concept or i.change or i.numbers:
            advice, spot = i.concept == "recommendation", (start + i.start, start + i.end)
            said = i.negated, i.uncertain, i.side, i.numbers, i.severity, i.change, advice, i.urgent
            found.append(Statement(start, end, _entity(i), *said, *spot))
    return found


# --- from items to claims


def _same(a: Item, b: Item) -> bool:
    """Whether two items speak of the same finding, be it that one names it more generally ("nodule")."""
    return b.concept in alike(a.concept) and related(a.organ, b.organ)


@cache
def alike(concept: str) -> frozenset[str]:
    """The concept, its more general names, and those that it is a more general name of."""
    general = LEXICON.general
    return frozenset(
        {concept, *general.get(concept, ()), *(name for name, heads in general.items() if concept in heads)}
    )


def implies(a: Item, b: Item) -> bool:
    """Whether `a` says what `b` says, sides, sizes and degrees apart."""
    if a.negated != b.negated:
        return False
    if a.concept == "abnormality" and a.negated:
        if b.concept == "abnormality":
            return related(a.organ, b.organ)
        return not a.organ or a.organ in LEXICON.region.get(b.organ, NOWHERE)
    return _same(a, b)


Claim = tuple[str, Item, Any]  # aspect, whose, value


@lru_cache(maxsize=50_000)
def _claims(text: str) -> tuple[Claim, ...]:
    claims: dict[Claim, None] = {}
    for _, _, item in items_of(text):
        concept = item.concept
        bare = Item(0, 0, concept, item.organ, item.negated)
        if concept == "recommendation":
            claims["recommendation", bare, item.actions] = None
        elif concept and concept not in ("category", "communication"):
            claims["entity", bare, None] = None
            if item.negated:
                claims["negation", bare, None] = None
        for side in ("left", "right") if item.side == "bilateral" else (item.side,) if item.side else ():
            claims["side", bare, side] = None
        for number in item.numbers:
            claims["number", bare, number] = None
        if item.severity:
            claims["severity", bare, item.severity] = None
        if item.change:
            claims["prior", bare, item.change] = None
        if item.urgent:
            claims["urgent", bare, None] = None
    return tuple(claims)


def _holds(claim: Claim, others: Iterable[Claim]) -> bool:
    aspect, item, value = claim

    def meets(other: Item, other_value: Any) -> bool:
        if aspect == "recommendation":
            return item.negated == other.negated and (value == other_value or bool(value & other_value))
        if aspect in ("entity", "negation", "urgent"):
            return implies(other, item)
        return value == other_value and (_same(item, other) or (not item.concept) != (not other.concept))

    return any(aspect == name and meets(other, other_value) for name, other, other_value in others)


def compare(reference: str, prediction: str) -> dict[str, float | None]:
    """F1 in [0, 1] by aspect and over all claims ("clinical_f1"); None where neither text makes such a claim.

    Precision is the share of the prediction's claims that the reference implies, recall the other way round.
    "entity" counts findings with their negation, "negation" the denied ones alone.
    """
    a, b = _claims(reference), _claims(prediction)
    held_a, held_b = ([_holds(claim, b) for claim in a], [_holds(claim, a) for claim in b])

    def f1(aspects: set[str]) -> float | None:
        recalled = [held for (aspect, _, _), held in zip(a, held_a, strict=True) if aspect in aspects]
        precise = [held for (aspect, _, _), held in zip(b, held_b, strict=True) if aspect in aspects]
        if not recalled and not precise:
            return None
        if not any(recalled) or not any(precise):
            return 0.0
        recall, precision = sum(recalled) / len(recalled), sum(precise) / len(precise)
        return 2 * recall * precision / (recall + precision)

    return {name: f1({name}) for name in ASPECTS} | {"clinical_f1": f1({*ASPECTS} - {"negation"})}
