"""Drafts for greedy decoding: what followed the longest run of the same tokens before.

An impression repeats its findings now and then, and other impressions often: looked up is the prompt itself (prompt
lookup, a form of speculative decoding: Leviathan et al. 2023, arXiv 2211.17192), what was written for other prompts,
and a corpus of known texts, say the training impressions (He et al. 2023, REST, arXiv 2311.08252). A draft is a guess
that the model confirms or not; it changes no output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat

MOST_KNOWN = 500_000  # runs of tokens written: a fifth of a gigabyte
LONGEST = 4  # tokens that are looked up; more found no better drafts in radiology reports

Follows = dict[tuple[int, ...], tuple[list[int], int]]  # a run of tokens: where it stood, and where it ended


class Drafter:
    """`most`: tokens a draft. `corpus`: token ids of texts like those to be written; some thousands are plenty."""

    def __init__(self, most: int, corpus: Iterable[list[int]] = ()) -> None:
        self.most = most
        self.prompts: dict[int, Follows] = {}  # of a row's text, by identity
        self.corpus: Follows = {}
        for text in corpus if most else ():
            self.corpus.update(_runs(text, 1))
        self.known = dict(self.corpus)  # the last of all that was seen
        self.most_known = len(self.corpus) + MOST_KNOWN

    def read(self, text: list[int]) -> None:
        """A prompt, which is about to be continued in its place."""
        if self.most:
            # One token of it alone says little about what follows in an impression.
            self.prompts[id(text)] = dict(_runs(text, 2))

    def forget(self, text: list[int]) -> None:
        """The prompt of a row that is finished; what was written stays among `known`, up to `most_known` runs."""
        self.prompts.pop(id(text), None)
        if len(self.known) > self.most_known:
            self.known = dict(self.corpus)

    def append(self, text: list[int], token: int) -> None:
        if self.most:
            for length in range(1, min(LONGEST, len(text)) + 1):
                self.known[tuple(text[-length:])] = (text, len(text))
        text.append(token)

    def guess(self, text: list[int], most: int) -> list[int]:
        most = min(most, self.most)
        for length in range(min(LONGEST, len(text)), 0, -1) if most > 0 else ():
            run = tuple(text[-length:])
            found = self.prompts[id(text)].get(run) or self.known.get(run)
            if found:
                source, end = found
                return source[end : end + most]
        return []


def _runs(text: list[int], shortest: int) -> Iterator[tuple[tuple[int, ...], tuple[list[int], int]]]:
    """Every run of tokens in the text that something follows."""
    for length in range(shortest, LONGEST + 1):
        yield from zip(
            zip(*(text[start:] for start in range(length)), strict=False),
            zip(repeat(text), range(length, len(text)), strict=False),
            strict=False,
        )
