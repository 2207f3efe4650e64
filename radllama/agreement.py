"""Do raters agree, with each other and with the judge? Blinded rating sheets, quadratic kappa, Kendall's tau-b.

A sheet is a CSV file of impressions in shuffled order without a system's name; which item is whose stands in a key file
(JSON) that raters do not get. Filled sheets are read back and compared pair by pair, column by column. Both statistics
are computed from the k x k table of ratings, which makes a bootstrap over cases a matrix product.

    python -m radllama.agreement sheet tuned.jsonl base.jsonl --out sheet.csv --key key.json --count 50
    python -m radllama.agreement compare --key key.json --sheets anna.csv ben.csv --judge scores/judge.jsonl
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radllama.files import read_rows, replace_text
from radllama.rubric import CRITERIA, SERIOUS

Floats = NDArray[np.float64]
Item = tuple[str, str]  # a case's id, a system
Ratings = Mapping[Item, Mapping[str, int]]  # column -> value

MOST_ERRORS = 5  # stands for "five or more"
COLUMNS: dict[str, range] = {**dict.fromkeys(CRITERIA, range(1, 6)), "serious_errors": range(MOST_ERRORS + 1)}
FORMULA = tuple("=+-@＝＋－＠\t\r\n")


@dataclass(frozen=True)
class Rater:
    """One filled sheet: its ratings, and what was left out in it."""

    ratings: dict[Item, dict[str, int]]
    problems: list[str]


# ---- statistics on tables (..., k, k): how often one rater said values[i] and the other values[j]


def quadratic_kappa(table: Floats, values: Sequence[float]) -> Floats:
    """Cohen's kappa with quadratic weights, (...); nan where chance alone would agree fully (both constant, alike)."""
    table, v = np.asarray(table, np.float64), np.asarray(values, np.float64)
    weight = (v[:, None] - v[None, :]) ** 2
    total = table.sum((-2, -1))
    chance = table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - (weight * table).sum((-2, -1)) * total / (weight * chance).sum((-2, -1)))


def kendall_tau_b(table: Floats) -> Floats:
    """Kendall's tau-b, (...): pairs in the same order less pairs in the opposite one, ties on either side corrected
    for; nan where one rater gave everything the same value."""
    table = np.asarray(table, np.float64)
    later = np.zeros_like(table)  # later[i, j]: entries in rows below i and in columns right of j
    later[..., :-1, :-1] = np.flip(np.flip(table, (-2, -1)).cumsum(-2).cumsum(-1), (-2, -1))[..., 1:, 1:]
    earlier = np.zeros_like(table)  # rows below i, columns left of j
    earlier[..., :-1, 1:] = np.flip(np.flip(table, -2).cumsum(-2), -2).cumsum(-1)[..., 1:, :-1]
    surplus = (table * (later - earlier)).sum((-2, -1))

    def pairs(counts: Floats) -> Floats:
        return np.asarray(counts * (counts - 1) / 2)

    every = pairs(table.sum((-2, -1)))
    untied = [every - pairs(table.sum(axis)).sum(-1) for axis in (-1, -2)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(surplus / np.sqrt(untied[0] * untied[1]))


def compare(
    one: Sequence[int], other: Sequence[int], cases: Sequence[str], values: Sequence[int], *,
    resamples: int = 2000, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Kappa and tau of n paired ratings with 95 % percentile intervals from a bootstrap over cases (a case brings all
    its systems along). None: undefined. Draws in which a statistic is undefined are left out of its interval."""
    k, number = len(values), {value: i for i, value in enumerate(values)}
    place = {case: c for c, case in enumerate(dict.fromkeys(cases))}
    cells = np.zeros((len(place), k * k))
    for a, b, case in zip(one, other, cases, strict=True):
        cells[place[case], number[a] * k + number[b]] += 1
    table = cells.sum(0).reshape(k, k)
    result: dict[str, Any] = {
        "n": len(one),
        "cases": len(place),
        "exact": float(np.trace(table) / max(len(one), 1)),
        "mean": [float(np.mean(side)) if len(side) else None for side in (one, other)],
    }
    rng = np.random.default_rng(seed)
    draws = np.concatenate(
        [  # 250 draws at a time: the weights of 100,000 cases stay below 200 MB
            rng.multinomial(len(place), np.full(len(place), 1 / len(place)), min(250, resamples - done)) @ cells
            for done in range(0, resamples if len(place) > 1 else 0, 250)
        ]
        or [np.zeros((0, k * k))]
    ).reshape(-1, k, k)
    for name, point, spread in (
        ("kappa", quadratic_kappa(table, values), quadratic_kappa(draws, values)),
        ("tau", kendall_tau_b(table), kendall_tau_b(draws)),
    ):
        spread = spread[np.isfinite(spread)]
        low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) and np.isfinite(point) else (None, None)
        result[name] = {
            "value": float(point) if np.isfinite(point) else None,
            "low": None if low is None else float(low),
            "high": None if high is None else float(high),
        }
    return result


def agreement(
    raters: Mapping[str, Ratings], columns: Mapping[str, Sequence[int]] = COLUMNS, *, resamples: int = 2000,
    seed: int = 0) -> list[dict[str, Any]]:  # fmt: skip
    """`compare` for every two raters and every column that both filled on the same items; the judge is one of them."""
    if resamples < 0:
        raise ValueError(f"resamples is {resamples}; expected 0 or more")
    rows = []
    for a, b in combinations(raters, 2):
        for column, values in columns.items():
            items = [i for i, given in raters[a].items() if column in given and column in raters[b].get(i, ())]
            if items:
                one, other = ([raters[name][i][column] for i in items] for name in (a, b))
                found = compare(one, other, [i[0] for i in items], values, resamples=resamples, seed=seed)
                rows.append({"a": a, "b": b, "column": column, **found})
    if not rows:
        raise ValueError("no two raters have rated the same item; give two filled sheets, or a sheet and --judge")
    return rows


def format_agreement(rows: list[dict[str, Any]]) -> str:
    """What `agreement` returned, as text for a terminal of 80 columns."""

    def cell(entry: dict[str, Any]) -> str:
        if entry["value"] is None:
            return "undefined"
        spread = "" if entry["low"] is None else f" [{entry['low']:.2f}, {entry['high']:.2f}]"
        return f"{entry['value']:.2f}{spread}"

    lines, before = [], None
    for row in rows:
        if before != (before := (row["a"], row["b"])):
            lines += ["", f"{row['a']} and {row['b']}"]
            lines += [f"{'':20}{'quadratic kappa':>22}{'Kendall tau-b':>22}{'n':>6}{'exact':>8}"]
        lines.append(
            f"{row['column']:20}{cell(row['kappa']):>22}{cell(row['tau']):>22}{row['n']:>6}{row['exact']:>8.0%}"
        )
    return "\n".join([*lines[1:], "", "95 % intervals: bootstrap over cases"])


# ---- sheets


def safe_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: a leading apostrophe where it might."""
    return f"'{text}" if text.startswith(FORMULA) or text.lstrip().startswith(FORMULA) else text


def write_sheet(
    cases: Sequence[Mapping[str, Any]], systems: Mapping[str, Sequence[str]], sheet: str | Path, key: str | Path, *,
    count: int | None = None, seed: int = 0) -> int:  # fmt: skip
    """Write a sheet of the systems' impressions of all cases, or of `count` drawn by the seed, and its key.

    Equal impressions of one case are one item, empty ones none. Returns the number of items."""
    if count is not None and not 0 < count <= len(cases):
        raise ValueError(f"count is {count}; there are {len(cases)} cases to draw from")
    draw = Random(seed)
    chosen = range(len(cases)) if count is None else sorted(draw.sample(range(len(cases)), count))
    owners: dict[tuple[int, str], list[str]] = {}
    for i in chosen:
        for name, answers in systems.items():
            if answers[i].strip():
                owners.setdefault((i, answers[i]), []).append(name)
    items = list(owners)
    draw.shuffle(items)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["item", "findings", "reference", "impression", *COLUMNS, "comment"])
    names = {}
    for number, (i, text) in enumerate(items, 1):
        name = f"item-{number:04}"
        names[name] = {"id": cases[i]["id"], "systems": owners[i, text]}
        shown = (safe_cell(str(part)) for part in (cases[i]["findings"], cases[i]["reference"], text))
        writer.writerow([name, *shown, *[""] * len(COLUMNS), ""])
    replace_text(Path(key), json.dumps(names, indent=1) + "\n", private=True)
    replace_text(Path(sheet), "\ufeff" + out.getvalue(), private=True)  # the mark tells Excel that it is UTF-8
    return len(items)


def _rating(text: str, allowed: Sequence[int]) -> int | None:
    """The rating in a cell, None where there is none; spreadsheets write 4 as 4.0 or 4,0. ValueError otherwise."""
    number = float(text.strip().replace(",", ".") or "nan")
    if number != number:
        return None
    if number not in allowed:
        raise ValueError
    return int(number)


def read_key(path: str | Path) -> dict[str, list[Item]]:
    """The (case, system) pairs behind each item; several systems may have given the same impression."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        return {item: [(entry["id"], name) for name in entry["systems"]] for item, entry in table.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the key written with the sheet") from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(f"{path}: not the key of a sheet; give the JSON file that was written with it") from None


def read_sheet(path: str | Path, key: Mapping[str, list[Item]]) -> Rater:
    """A filled sheet, as a spreadsheet saved it (comma, semicolon or tab). An empty cell is no rating; ValueError lists
    all cells that hold something else than a rating, and items that are double or not in the key."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", errors="replace")  # only numbers and item names are used
        head = text[: text.find("\n") + 1] or text
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))) or [[]]
        header = [name.strip() for name in lines[0]]
        rows = [dict(zip(header, line, strict=False)) for line in lines[1:]]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file ({error}); save the sheet as CSV") from None
    columns = [name for name in COLUMNS if name in header]
    if "item" not in header or not columns:
        raise ValueError(f"{path}: expected the columns item and {', '.join(COLUMNS)}, as the sheet was written")
    wrong: list[str] = []
    ratings: dict[Item, dict[str, int]] = {}
    seen: set[str] = set()
    empty = 0
    for row in rows:
        item = (row.get("item") or "").strip()
        if not item and not any((row.get(name) or "").strip() for name in columns):
            continue
        if item not in key or item in seen:
            wrong.append(
                f"{item or 'a row without item'}: {'twice in the sheet' if item in seen else 'not in the key'}"
            )
            continue
        seen.add(item)
        given = {}
        for name in columns:
            try:
                value = _rating(row.get(name) or "", COLUMNS[name])
            except ValueError:
                wrong.append(f"{item}, {name}: expected a whole number from {COLUMNS[name][0]} to {COLUMNS[name][-1]}")
                continue
            empty += value is None
            if value is not None:
                given[name] = value
        for owner in key[item]:
            ratings[owner] = given
    if wrong:
        more = [f"... and {len(wrong) - 20} more"] * (len(wrong) > 20)
        raise ValueError("\n  ".join([f"{path}: correct these cells:", *wrong[:20], *more]))
    problems = [f"{path}: {empty} cells are empty"] * bool(empty)
    if lacking := len(key.keys() - seen):
        problems.append(f"{path}: {lacking} items of the key are not in it")
    return Rater(ratings, problems)


def judge_ratings(rows: Sequence[Mapping[str, Any]]) -> dict[Item, dict[str, int]]:
    """The rows of a judge.jsonl as a rater's; a failed case has no rating."""
    ratings = {}
    for row in rows:
        given = {name: value for name, value in row["scores"].items() if name in CRITERIA and value is not None}
        if row.get("errors") is not None:
            given["serious_errors"] = min(sum(e["severity"] in SERIOUS for e in row["errors"]), MOST_ERRORS)
        ratings[row["id"], row["system"]] = given
    return ratings


# ---- the command line


def _sheet(args: argparse.Namespace) -> None:
    systems: dict[str, dict[str, str]] = {}
    cases: dict[str, dict[str, Any]] = {}
    if args.names and len(args.names) != len(args.predictions):
        raise ValueError(f"--names: {len(args.names)} names for {len(args.predictions)} files; give one name a file")
    for k, path in enumerate(args.predictions):
        rows = read_rows(path, ("id", "findings", "reference", "prediction", "model"))
        name = args.names[k] if args.names else rows[0]["model"]
        answers = {row["id"]: row["prediction"] for row in rows}
        if len(answers) < len(rows) or (cases and answers.keys() != cases.keys()):
            raise ValueError(f"{path}: duplicate ids, or other cases than in {args.predictions[0]}")
        if name in systems:
            raise ValueError(f"{path}: a second system named {name}; tell them apart by --names")
        systems[name], cases = answers, cases or {row["id"]: row for row in rows}
    answers_of = {name: [answers[i] for i in cases] for name, answers in systems.items()}
    count = write_sheet(list(cases.values()), answers_of, args.out, args.key, count=args.count, seed=args.seed)
    print(f"wrote {args.out} ({count:,} impressions to rate, no system named) and {args.key} (not for the raters)")


def _compare(args: argparse.Namespace) -> None:
    key = read_key(args.key)
    raters: dict[str, dict[Item, dict[str, int]]] = {}
    for path in args.sheets:
        if path.stem in raters or path.stem == "judge":
            raise ValueError(
                f"{path}: a rater is called by the sheet's name; give each sheet one of its own, not judge"
            )
        rater = read_sheet(path, key)
        raters[path.stem] = rater.ratings
        for problem in rater.problems:
            print(f"warning: {problem}", file=sys.stderr)
    if args.judge:
        rows = read_rows(args.judge, ("id", "system"))
        try:
            raters["judge"] = judge_ratings(rows)
        except (TypeError, LookupError, AttributeError):
            raise ValueError(f"{args.judge}: not the judge.jsonl of an evaluation (scores, errors)") from None
    report = agreement(raters, resamples=args.resamples, seed=args.seed)
    print(format_agreement(report))
    if args.out:
        replace_text(args.out, json.dumps(report, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m radllama.agreement", description="Rating sheets and agreement.")
    commands = parser.add_subparsers(required=True)
    sheet = commands.add_parser("sheet", help="write a blinded, shuffled rating sheet (CSV) for radiologists")
    sheet.set_defaults(run=_sheet)
    sheet.add_argument("predictions", nargs="+", type=Path)
    sheet.add_argument("--names", nargs="+", metavar="NAME", help="the systems' names, one a file")
    sheet.add_argument("--out", type=Path, required=True, metavar="CSV", help="what the raters get")
    sheet.add_argument(
        "--key", type=Path, required=True, metavar="JSON", help="which item is whose; not for the raters"
    )
    sheet.add_argument("--count", type=int, metavar="N", help="cases, drawn by the seed (default: all)")
    sheet.add_argument("--seed", type=int, default=0)
    compared = commands.add_parser("compare", help="quadratic kappa and tau-b between raters, and with the judge")
    compared.set_defaults(run=_compare)
    compared.add_argument(
        "--sheets", nargs="+", type=Path, required=True, metavar="CSV", help="one filled sheet a rater"
    )
    compared.add_argument("--key", type=Path, required=True, metavar="JSON")
    compared.add_argument("--judge", type=Path, metavar="JSONL", help="the judge's rows (judge.jsonl of an evaluation)")
    compared.add_argument("--out", type=Path, metavar="JSON")
    compared.add_argument("--resamples", type=int, default=2000, metavar="N")
    compared.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
