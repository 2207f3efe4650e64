"""draft.py: what is looked up, and which of several finds is taken."""

from __future__ import annotations

import pytest

from radllama import draft
from radllama.draft import LONGEST, Drafter


def test_a_prompt_comes_first_then_other_outputs() -> None:
    drafter = Drafter(3)
    one, other = [1, 2, 3, 4, 5, 6, 1, 2], [7, 8, 9]
    drafter.read(one)
    drafter.read(other)
    assert drafter.guess(one, 8) == [3, 4, 5]
    assert drafter.guess(one, 2) == [3, 4]
    assert drafter.guess(other, 8) == []
    for token in (50, 51, 52):
        drafter.append(other, token)
    one += [8, 9]
    assert drafter.guess(one, 8) == [50, 51, 52]
    assert drafter.guess(one, 0) == []
    assert Drafter(0).guess(one, 8) == []


def test_the_longest_run_wins_and_of_equal_ones_the_last() -> None:
    drafter = Drafter(2, corpus=[[1, 2, 3, 10, 11], [2, 3, 20, 21], [9, 3, 30, 31]])
    row = [5, 1, 2, 3]
    drafter.read(row)
    assert drafter.guess(row, 8) == [10, 11]
    row[1] = 4  # 2, 3 stood in two texts
    assert drafter.guess(row, 8) == [20, 21]
    row[2] = 4
    assert drafter.guess(row, 8) == [30, 31]
    row[3] = 4
    assert drafter.guess(row, 8) == []


def test_one_token_of_a_prompt_is_no_reason_for_a_draft() -> None:
    drafter = Drafter(2)
    row = [1, 2, 3, 4, 2]
    drafter.read(row)
    assert drafter.guess(row, 8) == []


def test_what_a_row_wrote_is_known_to_it_and_all_others() -> None:
    drafter = Drafter(8, corpus=[[1, 2, 3]])
    row, other = [90], [91]
    drafter.read(row)
    drafter.read(other)
    for token in (1, 2, 4, 5, 1, 2):
        drafter.append(row, token)
    assert row == [90, 1, 2, 4, 5, 1, 2]
    assert drafter.guess(row, 3) == [4, 5, 1]
    drafter.append(other, 2)
    assert drafter.guess(other, 1) == [4]


def test_the_end_of_a_text_says_nothing_and_short_texts_do_no_harm() -> None:
    text = list(range(LONGEST + 3))
    drafter = Drafter(4, corpus=[text, [], [1]])
    row = text[-2:]
    drafter.read(row)
    assert drafter.guess(row, 8) == []
    row.pop()
    assert drafter.guess(row, 8) == text[-1:]
    empty: list[int] = []
    drafter.read(empty)
    assert drafter.guess(empty, 8) == []


def test_what_is_finished_is_forgotten_and_what_was_written_only_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "MOST_KNOWN", 50)
    drafter, most = Drafter(2, corpus=[[1, 2, 3]]), 0
    for number in range(40):
        row = [90, 91]
        drafter.read(row)
        for token in (number + 100, number + 200, number + 300):
            drafter.append(row, token)
        drafter.forget(row)
        most = max(most, len(drafter.known))
        assert not drafter.prompts
    assert most < 50 + 3 * LONGEST + 3
    row = [5, 1]
    drafter.read(row)
    assert drafter.guess(row, 8) == [2, 3]  # the corpus stays
