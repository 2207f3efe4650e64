"""The evaluation as one HTML page that opens from disk: tables, distributions, and a browser of the cases.

The page is `scorecard.html` beside this module, which holds style and script, with the data put in as JSON. Report text
gets into the page as JSON alone and onto the screen as text nodes alone; a content security policy names the hashes of
the page's own script and style, so that nothing else could run or load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("scorecard.html")
BASELINE = "baseline from "
Cell = list[float | None]  # mean, low, high


class _Texts:
    """Each distinct text once: baselines repeat the findings, and systems each other."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


def _raise_if(problems: list[str], limit: int = 20) -> None:
    if problems:
        more = [f"... and {len(problems) - limit} more"] * (len(problems) > limit)
        raise ValueError("\n  ".join(["the scorecard cannot be written:", *problems[:limit], *more]))


def _number(value: object, where: str, problems: list[str]) -> float | None:
    """The number in four significant digits (what a page can show), None for one that is not applicable."""
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        problems.append(f"{where}: expected a finite number, or None where it does not apply")
        return None
    return float(f"{value:.4g}")


def _cell(entry: dict[str, Any] | None, where: str, problems: list[str]) -> Cell:
    return [_number((entry or {}).get(key), f"{where}, {key}", problems) for key in ("mean", "low", "high")]


def _source(source: str) -> str:
    """Without folders: the page may go to people whom the names of our disks do not concern."""
    start = BASELINE if source.startswith(BASELINE) else ""
    return start + Path(source.removeprefix(start)).name


def _tables(report: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """What stands above the cases. Systems, metrics and strata become indices: no name is ever a key in the page."""
    metrics, names, strata = list(report["metrics"]), list(report["systems"]), dict(report["strata"])
    systems = []
    for name, system in report["systems"].items():
        of_stratum = system.get("strata", {})
        systems.append(
            {
                "name": name,
                "source": _source(str(system.get("source", ""))),
                "baseline": str(system.get("source", "")).startswith(BASELINE),
                **{key: system.get(key) for key in ("empty", "stopped", "truncated")},
                "overall": [_cell(system["metrics"].get(m), f"system {name}, {m}", problems) for m in metrics],
                "strata": [
                    [_cell(of_stratum.get(s, {}).get(m), f"system {name}, {s}, {m}", problems) for m in metrics]
                    for s in strata
                ],
            }
        )
    comparisons = [
        [names.index(row["a"]), names.index(row["b"]), metrics.index(row["metric"])]
        + [
            _number(row.get(key), f"{row['a']} against {row['b']}, {row['metric']}, {key}", problems)
            for key in ("difference", "low", "high", "p", "p_holm")
        ]
        for row in report.get("comparisons", [])
        if row["a"] in names and row["b"] in names and row["metric"] in metrics
    ]
    return {
        "about": {key: report.get(key) for key in ("cases", "clusters", "clustered_by", "resamples", "seed")}
        | {"problems": [str(problem) for problem in report.get("problems", [])]}
        | {key: [[str(k), str(v)] for k, v in report.get(key, {}).items()] for key in ("signatures", "versions")},
        "metrics": metrics,
        "lower": [metric in report.get("lower_is_better", ()) for metric in metrics],
        "strata": [[name, size] for name, size in strata.items()],
        "systems": systems,
        "comparisons": comparisons,
    }


def _spans(rows: Iterable[dict[str, Any]], text: str, where: str, problems: list[str]) -> list[list[Any]]:
    """[kind, start, end] of the unsupported claims; JavaScript counts a character beyond U+FFFF as two."""
    found = []
    for row in rows:
        kind, start, end = row.get("kind"), row.get("start"), row.get("end")
        if not (isinstance(kind, str) and isinstance(start, int) and isinstance(end, int)) or not (
            0 <= start < end <= len(text)
        ):
            problems.append(f"{where}: each unsupported claim needs a kind, and 0 <= start < end <= {len(text)}")
            return []
        found.append([kind, *(place + sum(char > "\uffff" for char in text[:place]) for place in (start, end))])
    return found


def _case(case: object, known: set[str], metrics: set[str], place: int, seen: set[str]) -> list[str]:
    """What is wrong with the form of one case."""
    name = case.get("id") if isinstance(case, dict) else None
    if not isinstance(case, dict) or not isinstance(name, str) or not name:
        return [f"case {place}: needs an id, a string that is not empty"]
    wrong = [f"case {name}: {key} must be a string" for key in ("findings", "reference") if not _text(case.get(key))]
    if not _text(case.get("context") or ""):
        wrong.append(f"case {name}: context must be a string or None")
    if name in seen:
        wrong.append(f"case {name}: the id is there twice; keep one")
    seen.add(name)
    answers = case.get("systems")
    if not isinstance(answers, dict) or set(answers) != known:
        wrong.append(f"case {name}: systems must hold the report's systems, neither more nor fewer")
        return wrong
    for system, answer in answers.items():
        if not _text(answer.get("prediction")):
            wrong.append(f"case {name}, system {system}: prediction must be a string")
        if extra := sorted(set(answer.get("scores", {})) - metrics):
            wrong.append(f"case {name}, system {system}: metrics that the report lacks ({', '.join(extra)})")
    return wrong


def _text(value: object) -> bool:
    return isinstance(value, str)


def _browser(report: dict[str, Any], cases: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    """The cases, column by column."""
    texts, seen = _Texts(), set[str]()
    metrics, known = list(report["metrics"]), set(report["systems"])
    for place, case in enumerate(cases, 1):
        problems += _case(case, known, set(metrics), place, seen)
    _raise_if(problems)
    groups = list(dict.fromkeys([*report["strata"], *(name for case in cases for name in case.get("strata", ()))]))
    number = {name: i for i, name in enumerate(groups)}
    answers = []
    for name in report["systems"]:
        given = [case["systems"][name] for case in cases]
        where = [f"case {case['id']}, system {name}" for case in cases]
        claims = [
            _spans(answer.get("unsupported") or (), answer["prediction"], place, problems)
            for answer, place in zip(given, where, strict=True)
        ]
        answers.append(
            {
                "prediction": [texts(answer["prediction"]) for answer in given],
                "stop": [answer.get("stop_reason") for answer in given],
                "scores": [
                    [
                        _number(answer.get("scores", {}).get(metric), f"{place}, {metric}", problems)
                        for answer, place in zip(given, where, strict=True)
                    ]
                    for metric in metrics
                ],
                # Few cases have any: pairs of a case's number and its list.
                "unsupported": [[i, spans] for i, spans in enumerate(claims) if spans],
                "errors": [[i, list(answer["errors"])] for i, answer in enumerate(given) if answer.get("errors")],
            }
        )
    return {
        "groups": groups,
        "cases": {
            "id": [case["id"] for case in cases],
            "findings": [texts(case["findings"]) for case in cases],
            "reference": [texts(case["reference"]) for case in cases],
            "context": [texts(case.get("context") or "") for case in cases],
            "strata": [[number[name] for name in case.get("strata", ())] for case in cases],
        },
        "answers": answers,
        "texts": list(texts.index),
    }


def _embed(payload: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for markup: ASCII, without <, > and &."""
    data = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        data = data.replace(char, f"\\u{ord(char):04x}")
    return data


def _page(payload: dict[str, Any]) -> str:
    page = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("script", "style"):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert inline, f"{TEMPLATE} has no inline {tag}"
        digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
        page = page.replace(f"HASH-OF-{tag.upper()}", f"sha256-{digest}", 1)
    return page.replace("THE-DATA", _embed(payload), 1)


def write_scorecard(report: dict[str, Any], cases: list[dict[str, Any]], path: Path) -> None:
    """Write the page of one evaluation to `path`; it needs no network and opens from disk.

    `report` is what `eval.evaluate` returns; its optional `lower_is_better` names metrics that count bad things. A case
    has `id`, `findings`, `reference`, optional `context` (text) and `strata` (names), and `systems`: by name
    `prediction`, `scores` (metric -> number or None), and optional `stop_reason`, `unsupported` (`kind`, and `start`
    and `end` in characters of the prediction) and `errors` (kinds). Without cases the page holds the tables alone, and
    no report text. ValueError lists what is wrong, by id.
    """
    if missing := [key for key in ("systems", "metrics", "strata") if not isinstance(report.get(key), dict | list)]:
        raise ValueError(f"the report lacks {', '.join(missing)}; give what evaluate returned")
    problems: list[str] = []
    payload = _tables(report, problems) | _browser(report, cases, problems)
    _raise_if(problems)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(_page(payload), encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
