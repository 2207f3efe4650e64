"""The rubric: orders, strict schemas that agree with the validation, and answers that are refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest

from radllama import rubric
from radllama.client import Invalid

ANSWER: dict[str, Any] = {
    "case": "case-1",
    "errors": [{"statement": "effusion", "type": "false finding", "severity": "minor"}],
    "scores": dict.fromkeys(rubric.CRITERIA, 4),
}


def objects(schema: Any) -> list[dict[str, Any]]:
    """Every object schema inside a schema."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return [schema] * (isinstance(schema, dict) and "properties" in schema) + list(chain(*map(objects, parts)))


@pytest.mark.parametrize("order", range(rubric.ORDERS))
def test_schemas_are_strict_and_prompts_say_it_all(order: int) -> None:
    prompt, form = rubric.absolute_prompt(order)
    for one in (form, rubric.PAIR_FORMAT):
        assert (one["type"], one["json_schema"]["strict"]) == ("json_schema", True)
        for part in objects(one["json_schema"]["schema"]):  # what OpenAI asks of a strict schema
            assert part["additionalProperties"] is False
            assert part["required"] == list(part["properties"])
    for name, criterion in rubric.CRITERIA.items():
        assert all(text in prompt for text in (f"`{name}`", criterion.question, *criterion.anchors))
    for name, meaning in (rubric.ERROR_TYPES | rubric.SEVERITIES).items():
        assert f"`{name}`: {meaning}" in prompt
    shown = sorted(rubric.CRITERIA, key=lambda name: prompt.index(f"`{name}`"))
    assert shown == list(form["json_schema"]["schema"]["properties"]["scores"]["properties"])
    first = rubric.CRITERIA[shown[0]].anchors
    assert (prompt.index(first[4]) < prompt.index(first[0])) == rubric.criteria_order(order)[1]


def test_each_criterion_stands_first_equally_often() -> None:
    orders = [rubric.criteria_order(order) for order in range(rubric.ORDERS)]
    assert {names.index(name) for names, _ in orders for name in ("relevance",)} == set(range(5))
    assert set(Counter(names[0] for names, _ in orders).values()) == {2}
    assert sum(down for _, down in orders) == 5


def test_schema_and_validation_are_the_same() -> None:
    schema = rubric.absolute_prompt(0)[1]["json_schema"]["schema"]["properties"]
    error = rubric.Verdict.model_fields["errors"].annotation
    fields = get_args(error)[0].model_fields
    assert list(schema["errors"]["items"]["properties"]) == list(fields)
    assert list(get_args(fields["type"].annotation)) == list(rubric.ERROR_TYPES)
    assert list(get_args(fields["severity"].annotation)) == list(rubric.SEVERITIES)
    scores = rubric.Verdict.model_fields["scores"].annotation
    assert scores is not None
    assert set(scores.model_fields) == set(rubric.CRITERIA)
    pair = rubric.PAIR_FORMAT["json_schema"]["schema"]["properties"]
    assert list(pair) == list(rubric.Preference.model_fields)
    assert tuple(pair["better"]["enum"]) == get_args(rubric.Preference.model_fields["better"].annotation)


def test_the_documentation_has_the_same_words() -> None:
    text = (Path(__file__).parents[1] / "docs" / "judge.md").read_text(encoding="utf-8")
    for name, criterion in rubric.CRITERIA.items():
        row = [name, criterion.question, *criterion.anchors[::2]]
        assert f"| {' | '.join(row)} |" in text
    assert not [name for name in rubric.ERROR_TYPES if f"| {name} |" not in text]
    assert not [name for name in rubric.SEVERITIES if f"`{name}`" not in text]


def test_a_good_answer_is_read() -> None:
    verdict = rubric.parse_answer(rubric.Verdict, "case-1", json.dumps(ANSWER))
    assert verdict.scores.coherence == 4
    assert verdict.errors[0].severity == "minor"


def changed(path: str, value: Any) -> dict[str, Any]:
    answer = json.loads(json.dumps(ANSWER))
    *parents, last = path.split(".")
    inside = answer
    for name in parents:
        inside = inside[int(name)] if name.isdigit() else inside[name]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "invalid JSON"),
        ("The scores are 4.", "invalid JSON"),
        ("```json\n" + json.dumps(ANSWER) + "\n```", "invalid JSON"),
        (json.dumps(ANSWER)[:-1], "invalid JSON"),
        ([ANSWER], "schema"),
        (changed("scores.coherence", 6), "schema"),
        (changed("scores.coherence", 0), "schema"),
        (changed("scores.coherence", "4"), "schema"),
        (changed("scores.coherence", 3.5), "schema"),
        (changed("scores.coherence", True), "schema"),
        (changed("scores.coherence", None), "schema"),
        (changed("scores.beauty", 4), "schema"),
        (changed("errors.0.type", "typo"), "schema"),
        (changed("errors.0.severity", "Minor"), "schema"),
        (changed("errors.0.statement", None), "schema"),
        (changed("errors", {}), "schema"),
        (changed("case", None), "schema"),
        (changed("case", "case-2"), "another case"),
        (changed("case", "case-1 "), "another case"),
    ],
)
def test_bad_answers_are_refused_and_not_quoted(answer: Any, reason: str) -> None:
    with pytest.raises(Invalid, match=reason) as caught:
        rubric.parse_answer(rubric.Verdict, "case-1", answer if isinstance(answer, str) else json.dumps(answer))
    assert "effusion" not in str(caught.value)
