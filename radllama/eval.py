"""Score impressions against the radiologist's: ROUGE, BERTScore, intervals, paired tests, trivial baselines.

Works alone: it reads the `predictions.jsonl` of any system (a JSON object a line with `id`, `findings`,
`reference`, `prediction`, `model`, `stop_reason`) and imports nothing of the model. A metric is a column, one
number for each case: statistics, strata and tables work on whatever columns `_score` makes.

    python -m radllama.eval tuned.jsonl base.jsonl --out scores --train pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from radllama.metrics import NORMAL_RULE, bertscore, is_normal, rouge, rouge_signature
from radllama.stats import Floats, Ints, compare_systems, summarise

Rows = dict[str, dict[str, Any]]  # the rows of one file by id, in the file's order

DERIVED = ("bert_rescaled",)  # another column on another scale: shown, but not tested a second time
BASELINES = ("constant", "findings copied", "nearest neighbour")


@dataclass(frozen=True)
class Cases:
    """The n cases that every system answers; `clusters` (n,) numbers their patients, or the cases themselves."""

    ids: list[str]
    findings: list[str]
    references: list[str]
    clusters: Ints
    by_patient: bool
    strata: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class System:
    """One row of the table; a stop reason is "stop", "length" or None (not known, or nothing was decoded)."""

    name: str
    source: str
    predictions: list[str]
    stop_reasons: list[str | None]


def _some(items: Sequence[object], limit: int = 5) -> str:
    return ", ".join(map(str, items[:limit] or ["none"])) + f" and {len(items) - limit} more" * (len(items) > limit)


def _raise_if(problems: list[str], limit: int = 20) -> None:
    if problems:
        more = [f"... and {len(problems) - limit} more"] * (len(problems) > limit)
        raise ValueError("\n  ".join(["the input cannot be scored:", *problems[:limit], *more]))


def _read_jsonl(path: Path, fields: Sequence[str], problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows whose `fields` are strings, not empty but for `prediction`. Others go into `problems`."""
    rows, before = [], len(problems)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = dict(json.loads(line.decode("utf-8-sig")))
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                except (ValueError, TypeError, RecursionError) as error:
                    reason = getattr(error, "msg", None) or getattr(error, "reason", "not an object, or too deep")
                    problems.append(f"{path} line {number}: invalid JSON ({reason}); write one object a line, in UTF-8")
                    continue
                if wrong := [
                    key
                    for key in fields
                    if not isinstance(row.get(key), str) or not (row[key].strip() or key == "prediction")
                ]:
                    problems.append(
                        f"{path} line {number}: {', '.join(wrong)} must be given as a string, not empty "
                        "(only prediction may be); complete the row or delete it"
                    )
                else:
                    rows.append((number, row))
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); check the path")
    if not rows and len(problems) == before:
        problems.append(f"{path}: holds no rows; expected one JSON object a line")
    return rows


def _read_system(path: Path, name: str | None, problems: list[str]) -> tuple[str, Rows]:
    """The name of the system in one predictions file, and its rows."""
    rows: Rows = {}
    lines: dict[str, list[int]] = {}
    fields = ("id", "findings", "reference", "prediction") + (() if name else ("model",))
    for number, row in _read_jsonl(path, fields, problems):
        rows.setdefault(row["id"], row)
        lines.setdefault(row["id"], []).append(number)
        if row.get("stop_reason", "missing") not in ("stop", "length", None):
            problems.append(f'{path} line {number}: stop_reason must be "stop", "length", or null if not known')
    if twice := [f"{key} on lines {_some(where)}" for key, where in lines.items() if len(where) > 1]:
        problems.append(f"{path}: duplicate ids ({_some(twice)}); keep one row for each case")
    models = [name] if name else list(dict.fromkeys(row["model"] for row in rows.values()))
    if len(models) > 1:
        problems.append(f"{path}: more than one model ({_some(models)}); split the file, or use --names")
    return " ".join(models[0].split()) if models else "", rows


def load(paths: Sequence[Path], names: Sequence[str] | None = None) -> tuple[Cases, list[System]]:
    """Read predictions files that answer the same cases, in the first one's order. ValueError lists all problems."""
    if not paths or (names is not None and len(names) != len(paths)):
        raise ValueError(f"{len(paths)} predictions files and {len(names or ())} names; give one name a file or none")
    problems: list[str] = []
    read = [_read_system(path, names[i] if names else None, problems) for i, path in enumerate(paths)]
    _raise_if(problems)
    main, first = paths[0], read[0][1]
    for path, (name, rows) in zip(paths, read, strict=True):
        lacks, extra = [i for i in first if i not in rows], [i for i in rows if i not in first]
        if lacks or extra:
            problems.append(
                f"{path}: against {main} {len(lacks)} ids are missing ({_some(lacks)}) and {len(extra)} "
                f"added ({_some(extra)}); score all systems on the same cases, or each file alone"
            )
        if odd := [
            i
            for i in first
            if i in rows and any(first[i][key].split() != rows[i][key].split() for key in ("reference", "findings"))
        ]:
            problems.append(
                f"{path}: another reference or other findings than in {main} for {len(odd)} ids "
                f"({_some(odd)}); make both files from the same cases"
            )
        if len(same := [str(other) for other, (label, _) in zip(paths, read, strict=True) if label == name]) > 1:
            problems.append(f"{path}: several systems are named {name!r} ({_some(same)}); tell them apart by --names")
    _raise_if(problems)

    def optional(key: str) -> list[str]:  # such a field counts wherever one of the files has it
        values = ([rows[i].get(key) for _, rows in read] for i in first)
        return [next((str(value) for value in row if value not in (None, "")), "") for row in values]

    findings, references = ([row[key] for row in first.values()] for key in ("findings", "reference"))
    patients, kinds = optional("patient_id"), np.array(optional("modality"))
    clusters = np.unique(patients if all(patients) else list(first), return_inverse=True)[1]
    strata = {"normal": np.array([is_normal(text) for text in references])}
    strata["abnormal"] = ~strata["normal"]
    for kind, _ in Counter(kinds.tolist()).most_common():
        strata[f"modality {kind or 'not given'}"] = kinds == kind
    strata = {name: mask for name, mask in strata.items() if 0 < mask.sum() < len(first)}
    return Cases(list(first), findings, references, clusters, all(patients), strata), [
        System(name, str(path), [rows[i]["prediction"] for i in first], [rows[i]["stop_reason"] for i in first])
        for path, (name, rows) in zip(paths, read, strict=True)
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def constant_impression(impressions: list[str], seed: int = 0, candidates: int = 50, sample: int = 1000) -> str:
    """The best single answer to everything: of the most frequent training impressions (case and punctuation
    aside, ties drawn by the seed) the one with the highest mean ROUGE-L against a seeded sample of them all."""
    shuffled = [impressions[i] for i in np.random.default_rng([seed, 2]).permutation(len(impressions))]
    keys, targets = [" ".join(_words(text)) for text in shuffled], shuffled[:sample]
    frequent = [key for key, _ in Counter(keys).most_common(candidates)]
    scores = rouge(targets * len(frequent), [key for key in frequent for _ in targets])["rougeL"]
    best = frequent[np.reshape(scores, (len(frequent), -1)).mean(1).argmax()]
    return Counter(text for key, text in zip(keys, shuffled, strict=True) if key == best).most_common(1)[0][0]


def nearest(train: list[str], queries: list[str]) -> list[int]:
    """For each query the index of the training text with the highest TF-IDF cosine; the earliest wins a tie.
    Weight: (1 + ln tf) (1 + ln((1 + N) / (1 + df))) over words [a-z0-9]+ in lower case, N distinct training texts."""
    first: dict[str, int] = {}
    for i, text in enumerate(train):
        first.setdefault(" ".join(_words(text)), i)
    vocabulary: dict[str, int] = {}
    terms, docs, counts = array("i"), array("i"), array("i")
    for doc, text in enumerate(tqdm(first, "neighbour index", disable=None, leave=False)):
        for word, count in Counter(text.split()).items():
            terms.append(vocabulary.setdefault(word, len(vocabulary)))
            docs.append(doc)
            counts.append(count)
    term, owner = np.array(terms), np.array(docs)
    df = np.bincount(term, minlength=len(vocabulary))
    idf = 1 + np.log((1 + len(first)) / (1 + df))
    weight = (1 + np.log(np.array(counts))) * idf[term]
    weight /= np.sqrt(np.bincount(owner, weight**2, minlength=len(first)))[owner]
    order = np.argsort(term, kind="stable")  # postings: each term's documents, one after another
    owner, weight, ends = owner[order], weight[order].astype(np.float32), np.cumsum(df)
    index, found = list(first.values()), []
    for query in tqdm(queries, "nearest neighbour", disable=None, leave=False):
        score = np.zeros(len(first), np.float32)
        for word, count in Counter(word for word in _words(query) if word in vocabulary).items():
            t = vocabulary[word]
            span = slice(ends[t] - df[t], ends[t])
            score[owner[span]] += np.float32((1 + np.log(count)) * idf[t]) * weight[span]
        found.append(index[int(score.argmax())])
    return found


def baselines(cases: Cases, train: Path, seed: int = 0) -> list[System]:
    """Three systems that any model must beat, from training pairs (rows with `findings` and `impression`)."""
    problems: list[str] = []
    rows = [row for _, row in _read_jsonl(train, ("findings", "impression"), problems)]
    findings = dict(zip(cases.ids, map(_words, cases.findings), strict=True))
    if leaked := [row["id"] for row in rows if findings.get(str(row.get("id"))) == _words(row["findings"])]:
        problems.append(f"{train}: holds {len(leaked)} scored cases ({_some(leaked)}); give training data only")
    _raise_if(problems)
    near = nearest([row["findings"] for row in rows], cases.findings)
    constant = constant_impression([row["impression"] for row in rows], seed)
    answers = ([constant] * len(near), cases.findings, [rows[i]["impression"] for i in near])
    return [
        System(name, f"baseline from {train}", answer, [None] * len(answer))
        for name, answer in zip(BASELINES, answers, strict=True)
    ]


def _score(
    cases: Cases, systems: list[System], report: dict[str, Any], model: str | None, **options: Any
) -> dict[str, Floats]:
    """The columns: metric -> scores (systems, n). Signatures and problems go into the report."""
    references = cases.references * len(systems)  # all systems in one call: a model is loaded once
    predictions = [text for system in systems for text in system.predictions]
    columns = rouge(references, predictions)
    try:
        found = bertscore(references, predictions, model=model, rescale=True, **options) if model is not None else {}
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        report["problems"].append(
            f"no BERTScore with {model!r}: {reason}. Without a network give a local folder of "
            "the model and --bertscore-layers; short of memory, lower --batch-size"
        )
        found = {}
    for metric, key in (("bertscore", ""), (*DERIVED, "_rescaled")):
        if found.get(f"f1{key}"):
            columns[metric], report["signatures"][metric] = found[f"f1{key}"], found[f"hash{key}"]
    if found:
        report["versions"] |= {name: metadata.version(name) for name in ("bert-score", "torch", "transformers")}
    return {metric: np.reshape(values, (len(systems), -1)) for metric, values in columns.items()}


def _per_case(cases: Cases, systems: list[System], columns: dict[str, Floats]) -> Iterable[dict[str, Any]]:
    """A row for each system and case: scores and strata, no report text."""
    for (s, system), (i, case) in product(enumerate(systems), enumerate(cases.ids)):
        yield {
            "id": case,
            "system": system.name,
            **{metric: float(column[s, i]) for metric, column in columns.items()},
            "empty": not system.predictions[i].strip(),
            "stop_reason": system.stop_reasons[i],
            "strata": [name for name, mask in cases.strata.items() if mask[i]],
        }


def _write(path: Path, rows: Iterable[dict[str, Any]], indent: int | None = None) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, indent=indent) + "\n" for row in rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def evaluate(
    paths: Sequence[str | Path] | str | Path,
    *,
    names: Sequence[str] | None = None,
    train: str | Path | None = None,
    out: str | Path | None = None,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the systems of one or several predictions files on the same cases, and with `train` the baselines too.

    Returns what goes into `out`/metrics.json (`format_report` prints it); `out`/per_case.jsonl gets a row for each
    system and case. Intervals: 95 % percentile bootstrap, over patients where every case has a `patient_id`. All pairs
    of systems are compared. Where BERTScore cannot be had, `problems` says so and the rest goes on. ValueError names
    all that is wrong with the input by file, line or id.
    """
    if resamples < 1 or batch_size < 1:
        raise ValueError(f"resamples is {resamples} and batch_size {batch_size}; both must be at least 1")
    cases, systems = load([Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)], names)
    if train is not None:
        systems += baselines(cases, Path(train), seed)
    labels = [system.name for system in systems]
    if len(set(labels)) < len(labels):
        raise ValueError(f"a system has the name of a baseline ({_some(BASELINES)}); rename it with --names")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)  # before the work: a bad path costs nothing

    report: dict[str, Any] = {
        "cases": len(cases.ids),
        "clusters": len(set(cases.clusters.tolist())),
        "resamples": resamples,
        "seed": seed,
        "clustered_by": "patient_id" if cases.by_patient else None,
        "problems": [],
        "signatures": {"normal": NORMAL_RULE, "rouge": rouge_signature()},
        "versions": {name: metadata.version(name) for name in ("rouge-score", "nltk", "numpy")},
    }
    columns = _score(
        cases, systems, report, bertscore_model, num_layers=bertscore_layers, batch_size=batch_size, device=device
    )
    metrics = list(columns)
    scores = np.stack([column.T for column in columns.values()], axis=2)  # (n, systems, metrics)
    overall = summarise(scores, metrics, cases.clusters, resamples, seed)
    strata = {
        name: summarise(scores[mask], metrics, cases.clusters[mask], resamples, seed)
        for name, mask in cases.strata.items()
    }
    report |= {"metrics": metrics, "strata": {name: int(mask.sum()) for name, mask in cases.strata.items()}}
    report["systems"] = {
        system.name: {
            "source": system.source,
            "empty": sum(not text.strip() for text in system.predictions),
            "stopped": system.stop_reasons.count("stop"),
            "truncated": system.stop_reasons.count("length"),
            "metrics": overall[s],
            "strata": {name: rows[s] for name, rows in strata.items()},
        }
        for s, system in enumerate(systems)
    }
    tested = [metric for metric in metrics if metric not in DERIVED]
    columns_tested = scores[:, :, [metrics.index(metric) for metric in tested]]
    report["comparisons"] = (
        compare_systems(columns_tested, labels, tested, cases.clusters, resamples, seed) if len(systems) > 1 else []
    )
    if out is not None:
        _write(Path(out) / "per_case.jsonl", _per_case(cases, systems, columns))
        _write(Path(out) / "metrics.json", [report], indent=2)
    return report


def _decimal(value: float, sign: str = "") -> str:
    text = f"{value:{sign}.3f}" if abs(value) < 0.9995 else f"{value:{sign}.2f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def _cell(entry: dict[str, Any], key: str, sign: str = "") -> list[str]:
    spread = "" if entry["low"] is None else f"[{_decimal(entry['low'], sign)},{_decimal(entry['high'], sign)}]"
    return [_decimal(entry[key], sign), spread, *([f"p {entry['p_holm']:.4f}"] if "p_holm" in entry else [])]


def _table(corner: str, names: list[str], columns: list[tuple[str, list[list[str]]]]) -> list[str]:
    """Lines of at most 80 characters: names in 24, then four columns of 14, in as many blocks as it takes."""
    lines = []
    corner, *names = [name if len(name) <= 23 else f"{name[:10]}...{name[-10:]}" for name in [corner, *names]]
    for start in range(0, len(columns), 4):
        block = columns[start : start + 4]
        lines.append(f"{corner:24}" + "".join(f"{title:>14}" for title, _ in block))
        for s, name in enumerate(names):
            for k in range(len(block[0][1][s])):
                cells = "".join(f"{cells[s][k]:>14}" for _, cells in block)
                lines.append(f"{name if k == 0 else '':24}{cells}".rstrip())
        lines.append("")
    return lines


def format_report(report: dict[str, Any], *, brief: bool = False) -> str:
    """What `evaluate` returned, as text for a terminal of 80 columns; `brief`: the headline table alone."""
    systems, metrics, names = report["systems"], report["metrics"], list(report["systems"])
    unit = f"{report['clusters']:,} patients" if report["clustered_by"] else "cases (no patient ids)"
    lines = [f"{report['cases']:,} cases; mean, 95 % interval from {report['resamples']:,} resamples of {unit}", ""]
    lines += _table(
        "system",
        names,
        [(metric, [_cell(systems[name]["metrics"][metric], "mean") for name in names]) for metric in metrics],
    )
    if brief:
        return "\n".join(lines).rstrip()
    lines += _table(
        "answers that are",
        names,
        [(key, [[f"{systems[name][key]:,}"] for name in names]) for key in ("empty", "stopped", "truncated")],
    )
    lines += _table(
        "rougeL by stratum",
        names,
        [
            (
                f"{title.removeprefix('modality ')[: 12 - len(f'{size:,}')]} {size:,}",
                [_cell(systems[name]["strata"][title]["rougeL"], "mean") for name in names],
            )
            for title, size in report["strata"].items()
        ][:12],
    )
    rows = {(row["b"], row["metric"]): row for row in report["comparisons"] if row["a"] == names[0]}
    if rows:
        lines += ["paired difference, its 95 % interval, p (approximate randomisation; Holm)", ""]
        lines += _table(
            f"{names[0]} - ...",
            names[1:],
            [
                (metric, [_cell(rows[name, metric], "difference", "+") for name in names[1:]])
                for metric in metrics
                if metric not in DERIVED
            ],
        )
    for key, text in report["signatures"].items():
        lines += textwrap.wrap(f"{key}: {text}", 80, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m radllama.eval",
        description=(
            "Score predictions.jsonl files (a line: id, findings, reference, prediction, model, stop_reason) of one or "
            "several systems on the same cases: ROUGE, BERTScore, intervals, paired tests, trivial baselines. "
            "The printed table compares the first system with the others, metrics.json all pairs."
        ),
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PREDICTIONS", help="one file for each system")
    add("--out", type=Path, required=True, metavar="DIR", help="gets metrics.json and per_case.jsonl")
    add("--names", nargs="+", metavar="NAME", help="the systems' names, one a file (default: model in the rows)")
    add("--train", type=Path, metavar="PAIRS", help=f"training pairs.jsonl: adds {', '.join(BASELINES)}")
    add("--bertscore", dest="bertscore_model", metavar="MODEL", help="add BERTScore by this model (name or folder)")
    add("--bertscore-layers", type=int, metavar="N", help="the model's layer (default: bert-score's choice)")
    add("--batch-size", type=int, default=64, metavar="N", help="for BERTScore (default: 64)")
    add("--device", help="for BERTScore: cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--brief", action="store_true", help="print the headline table alone")
    add("--resamples", type=int, default=10_000, metavar="N", help="in bootstrap and test (default: 10000)")
    add("--seed", type=int, default=0, metavar="S", help="of all random draws (default: 0)")
    args = parser.parse_args(argv)
    options = vars(args)
    brief = options.pop("brief")
    try:
        report = evaluate(**options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in report["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    print(format_report(report, brief=brief))
    print(f"\nwrote {args.out / 'metrics.json'} and {args.out / 'per_case.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
