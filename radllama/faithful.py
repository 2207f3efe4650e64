"""What an impression claims that its findings do not carry, by rules over what clinical.py reads in both.

    for claim in unsupported(findings, impression, indication):
        print(claim.kind, impression[claim.start : claim.end])

Lenient on findings: a diagnosis needs only something abnormal said of its organ, or a finding listed in the lexicon as
its support; a denial fails only where the findings affirm the same (or, for "no acute abnormality", something
critical). Strict on sides, sizes and priors: these must be there. Advice is not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from radllama.clinical import Item, Side, alike, implies, is_loose, items_in, items_of
from radllama.lexicon import LEXICON, lower, related, sentence_texts

Kind = Literal["entity", "negation", "side", "number", "prior"]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A claim of the impression without support; the span is that of the impression."""

    kind: Kind
    start: int
    end: int


_NO_COMPARISON = re.compile(r"comparison:?\s*(?:none\b|no\b|n/a|not |$)[^.\n]*", re.I)
_HAS_COMPARISON = re.compile(r"comparison:?\s*\S|\b(?:prior|previous|compared|comparison)\b", re.I)
_SIDE_WORDS = [(side, re.compile(f"(?<![a-z]){side}(?![a-z])")) for side in ("left", "right")]
_PAIRED = re.compile(r"(?<![a-z])(?:bases|apices)(?![a-z])")
_SIDES: dict[Side | None, str] = {None: "", "left": "l", "right": "r", "bilateral": "lr"}


def _both(sides: Iterable[Side | None]) -> set[str]:
    """The sides "l" and "r" of all together."""
    return set("".join([_SIDES[side] for side in sides]))


class _Sorted(NamedTuple):
    """Items by what they say; `affirmed` are the findings among the positive ones."""

    positive: list[Item]
    denied: list[Item]
    affirmed: list[Item]

    @classmethod
    def of(cls, items: Iterable[Item]) -> _Sorted:
        found = cls([], [], [])
        for item in items:
            if item.negated:
                found.denied.append(item)
            else:
                found.positive.append(item)
                if item.concept and item.concept != "category":
                    found.affirmed.append(item)
        return found


@lru_cache(maxsize=100_000)
def _sorted_sentence(sentence: str) -> _Sorted | None:
    """None where an item may belong to the sentence before."""
    items = items_in(sentence)
    return None if any(map(is_loose, items)) else _Sorted.of(items)


def _sorted_text(text: str) -> _Sorted:
    """The items of all sentences, each sentence sorted once: reports say the same again and again."""
    positive: list[Item] = []
    denied: list[Item] = []
    affirmed: list[Item] = []
    for sentence in sentence_texts(text):
        if (part := _sorted_sentence(sentence)) is None:
            return _Sorted.of(item for _, _, item in items_of(text))
        positive += part[0]
        denied += part[1]
        affirmed += part[2]
    return _Sorted(positive, denied, affirmed)


class _Source:
    """What an impression may rest on: findings and context (indication, comparison), sorted once."""

    def __init__(self, findings: str, context: str) -> None:
        self._findings, self._context = findings, _NO_COMPARISON.sub("", context)
        self.positive, self.denied, self.affirmed = _sorted_text(findings)
        context_items = _sorted_text(self._context)
        self.positive += context_items.positive
        self.all = self.positive + self.denied + context_items.denied

    # What few impressions ask for is worked out when they do.

    @cached_property
    def sides(self) -> set[str]:
        """Said anywhere, in words that may be of no known finding."""
        found = _both([item.side for item in self.all])
        if len(found) < 2:
            low = lower(self._findings + self._context)
            found |= {side[0] for side, word in _SIDE_WORDS if side in low and word.search(low)}
            if _PAIRED.search(low):  # "opacities at the lung bases" are bibasilar
                found = {"l", "r"}
        return found

    @cached_property
    def prior(self) -> bool:
        return any(item.change for item in self.all) or bool(_HAS_COMPARISON.search(self._context))

    def holds(self, value: float, unit: str) -> bool:
        """2.5 cm supports "2.5 cm" and "25 mm", and 24.6 mm supports "2.5 cm": what rounding explains."""
        slack = 0.51 if value >= 10 else 0.11
        return any(
            unit == other and abs(value - number) <= slack for item in self.all for number, other in item.numbers
        )


def _checks(findings: str, impression: str, context: str) -> Iterator[tuple[Kind, bool, int, int]]:
    """Each claim of the impression: its kind, whether it is supported, its span."""
    source = _Source(findings, context)
    for start, _, item in items_of(impression):
        if item.concept in ("recommendation", "communication", "category"):
            continue
        span = start + item.start, start + item.end
        sizes = [source.holds(*number) for number in item.numbers]
        if item.concept:  # "no central mass" denies no mass of a size that the findings give
            sized = not item.negated and any(sizes)
            yield *(("entity", True) if sized else _entity_check(item, source)), *span
        elif not item.change and not item.numbers:
            continue
        if item.side:
            yield "side", _side_check(item, source), *span
        for held in sizes:
            yield "number", held, *span
        if item.change:
            yield "prior", source.prior, *span


def _side_check(item: Item, source: _Source) -> bool:
    """A side must stand beside the same finding, or else beside its organ, or else anywhere."""
    names, organ = alike(item.concept), item.organ
    known = _both([o.side for o in source.positive if o.side and o.concept in names and related(organ, o.organ)])
    if not known and item.concept and organ:
        there = [o for o in source.all if o.side and o.organ == organ]
        known = _both([o.side for o in there if not (o.negated and o.side == "bilateral")])  # "in either breast"
    return _both([item.side]) <= (known or source.sides)


def _entity_check(item: Item, source: _Source) -> tuple[Kind, bool]:
    """A denial fails where the findings affirm it; an assertion fails where they deny it or hold nothing related."""
    affirmed, denied = source.affirmed, source.denied
    if item.negated:
        if item.concept == "abnormality":
            worst = [o for o in affirmed if o.concept in LEXICON.critical and not o.uncertain]
            clash = [o for o in worst if implies(item, o._replace(negated=True))]
        else:
            general = LEXICON.general
            same = [o for o in affirmed if o.concept == item.concept or item.concept in general.get(o.concept, ())]
            same = [o for o in same if related(item.organ, o.organ) and _sides_meet(item, o)]
            clash = [o for o in same if not any(d.concept == item.concept and _sides_meet(d, o) for d in denied)]
        return "negation", item.uncertain or not clash  # "no suspicious nodule" leaves room for another
    names = alike(item.concept)
    if any(o.concept in names and related(item.organ, o.organ) for o in source.positive):
        return "entity", True
    no = item._replace(negated=True)
    if any(o.concept == item.concept and implies(o, no) for o in denied):
        return "negation", False
    if item.concept == "abnormality":
        return "entity", any(related(item.organ, o.organ) for o in affirmed)
    carriers = LEXICON.supports.get(item.concept, set())
    places = {item.organ} | carriers
    home = LEXICON.organ_of.get(item.concept, "")
    supported = any(
        o.concept in carriers or o.organ in places or (o.organ and home == o.organ)
        or (o.concept and item.organ and o.organ and related(item.organ, o.organ))  # one organ within the other
        for o in source.positive
    )  # fmt: skip
    return "entity", supported or (not item.organ and bool(affirmed))


def _sides_meet(a: Item, b: Item) -> bool:
    return not a.side or not b.side or "bilateral" in (a.side, b.side) or a.side == b.side


def unsupported(findings: str, impression: str, context: str = "") -> list[Unsupported]:
    """The claims of the impression that neither the findings nor the context (indication, comparison) carry."""
    checks = _checks(findings, impression, context)
    return [Unsupported(kind, start, end) for kind, held, start, end in checks if not held]


def faithfulness(findings: str, impression: str, context: str = "") -> float:
    """The share of the impression's claims that are supported, in [0, 1]; 1 where it makes none."""
    held = [held for _, held, _, _ in _checks(findings, impression, context)]
    return sum(held) / len(held) if held else 1.0
