"""Score impressions against the radiologist's: ROUGE, BERTScore, clinical checks, a judge; intervals and paired tests.

Works alone: it reads the `predictions.jsonl` of any system (a JSON object a line with `id`, `findings`,
`reference`, `prediction`, `model`, `stop_reason`) and imports nothing of the model. A metric is a column, one
number for each case (NaN where it does not apply): statistics, strata and tables work on whatever columns there are.

    python -m radllama.eval tuned.jsonl base.jsonl --out scores --train pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from radllama import clinical, faithful, judge
from radllama.baselines import BASELINES, baselines
from radllama.cases import Cases, System, load
from radllama.client import Client
from radllama.files import read_rows, replace_text, some, write_rows
from radllama.metrics import NORMAL_RULE, bertscore, rouge, rouge_signature
from radllama.rubric import CRITERIA, SERIOUS
from radllama.scorecard import write_scorecard
from radllama.similar import NEAR
from radllama.stats import Floats, compare_systems, summarise

Claim = tuple[str, int, int]  # kind, start, end in the prediction
Text4 = tuple[str, str, str, str]  # findings, context, reference, prediction
Scores = list[float | None]  # None becomes NaN in a column

ASPECTS = tuple(f"clinical_{aspect}" for aspect in clinical.ASPECTS)
CHECKS = ("clinical_f1", "faithfulness", *ASPECTS)
JUDGED = (*(f"judge_{criterion}" for criterion in CRITERIA), "judge_serious_errors")
# Shown, but not tested: another scale of a column, or a part of one.
DERIVED = {"bert_rescaled", *ASPECTS}
LOWER_IS_BETTER = ("judge_serious_errors",)
TITLES = {
    "understandability": "understand.",
    "clinical_utility": "utility",
    "serious_errors": "serious err.",
    "recommendation": "recommend.",
}
PAGE_LIMIT = 20_000  # cases in the scorecard; a page of more would not open in a browser
PARALLEL = 4_000  # answers from which on the clinical checks are worth a second process


def _clinical_case(case: Text4) -> tuple[Scores, list[Claim]]:
    """The CHECKS of one answer, and its unsupported claims. An empty answer scores 0, in an aspect that applies."""
    findings, context, reference, prediction = case
    scores = clinical.compare(reference, prediction)
    carried: float | None = faithful.faithfulness(findings, prediction, context)
    if not prediction.strip():
        scores["clinical_f1"] = carried = 0.0
    numbers = [scores["clinical_f1"], carried, *(scores[aspect] for aspect in clinical.ASPECTS)]
    claims = faithful.unsupported(findings, prediction, context)
    return numbers, [(claim.kind, claim.start, claim.end) for claim in claims]


def _clinical_all(cases: Sequence[Text4]) -> list[tuple[Scores, list[Claim]]]:
    bar: dict[str, Any] = {"desc": "clinical checks", "total": len(cases), "disable": None, "leave": False}
    workers = min(os.cpu_count() or 1, 8)
    if workers > 1 and len(cases) >= PARALLEL:
        try:
            with ProcessPoolExecutor(workers) as pool:
                return list(tqdm(pool.map(_clinical_case, cases, chunksize=200), **bar))
        except (BrokenProcessPool, OSError):  # a worker was killed, or could not start: on without help
            pass
    return list(tqdm(map(_clinical_case, cases), **bar))


def clinical_checks(cases: Cases, systems: Sequence[System]) -> tuple[dict[str, Floats], list[list[list[Claim]]]]:
    """Columns (systems, n) of the clinical checks, and the unsupported claims of each answer [system][case]."""
    todo = [
        (cases.findings[i], cases.contexts[i], cases.references[i], system.predictions[i])
        for system, i in product(systems, range(len(cases.ids)))
    ]
    place = {case: k for k, case in enumerate(dict.fromkeys(todo))}
    found = _clinical_all(list(place))
    where = np.reshape([place[case] for case in todo], (len(systems), -1))
    numbers = np.array([numbers for numbers, _ in found], float)[where]  # (systems, n, checks)
    columns = {name: numbers[:, :, k] for k, name in enumerate(CHECKS)}
    return columns, [[found[k][1] for k in row] for row in where.tolist()]


def _bertscore(
    cases: Cases, systems: Sequence[System], report: dict[str, Any], model: str, **options: Any
) -> dict[str, Floats]:
    references = cases.references * len(systems)  # all systems in one call: a model is loaded once
    predictions = [text for system in systems for text in system.predictions]
    try:
        found = bertscore(references, predictions, model=model, rescale=True, **options)
    except Exception as error:  # a missing, damaged or too large model fails in many ways; the rest must go on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        report["problems"].append(
            f"no BERTScore with {model!r}: {reason}. Without a network give a local folder of "
            "the model and --bertscore-layers; short of memory, lower --batch-size"
        )
        return {}
    report["versions"] |= {name: metadata.version(name) for name in ("bert-score", "torch", "transformers")}
    columns = {}
    for metric, key in (("bertscore", ""), ("bert_rescaled", "_rescaled")):
        if found[f"f1{key}"]:
            columns[metric] = np.reshape(found[f"f1{key}"], (len(systems), -1))
            # The name of a folder will do: reports travel, and where it lay on this disk concerns nobody.
            report["signatures"][metric] = found[f"hash{key}"].replace(model, Path(model).name)
    return columns


def _judge(
    cases: Cases, systems: Sequence[System], report: dict[str, Any], client: Client, seed: int, batch_in: Sequence[Path]
) -> tuple[dict[str, Floats], dict[str, Any] | None]:
    """The judge's columns and its whole result. Where it cannot be asked, `problems` says so and the rest goes on."""
    try:
        result = judge.judge_systems(
            _judge_cases(cases),
            {system.name: system.predictions for system in systems},
            client,
            seed=seed,
            batch_in=batch_in,
        )
    except (OSError, ValueError) as error:  # the screen's IdentifiersFound among them: nothing was sent then
        report["problems"].append(f"no judge: {error}")
        return {}, None
    columns = {
        f"judge_{criterion}": np.array([result["scores"][system.name][criterion] for system in systems], float)
        for criterion in CRITERIA
    }
    serious = [
        [
            None if errors is None else sum(error["severity"] in SERIOUS for error in errors)
            for errors in result["errors"][system.name]
        ]
        for system in systems
    ]
    columns["judge_serious_errors"] = np.array(serious, float)
    report["signatures"]["judge"] = result["signature"]
    report["problems"] += result["problems"]
    if result["failures"]:
        counts = ", ".join(f"{reason} {count}" for reason, count in result["failure_counts"].items())
        report["problems"].append(
            f"{len(result['failures'])} of the judge's answers failed and count nowhere: {counts}"
        )
    keep = ("failures", "failure_counts", "usage", "empty")
    report["judge"] = {key: result[key] for key in keep} | {
        "pairs": [{k: v for k, v in pair.items() if k != "outcomes"} for pair in result["pairs"]],
        "errors": {system.name: judge.error_counts(result["errors"][system.name]) for system in systems},
    }
    return columns, result


def _judge_cases(cases: Cases) -> list[dict[str, str]]:
    rows = zip(cases.ids, cases.findings, cases.references, strict=True)
    return [{"id": case, "findings": findings, "reference": reference} for case, findings, reference in rows]


def _per_case(cases: Cases, systems: Sequence[System], columns: dict[str, Floats]) -> Iterable[dict[str, Any]]:
    """A row for each system and case: scores and strata, no report text."""
    for (s, system), (i, case) in product(enumerate(systems), enumerate(cases.ids)):
        yield {
            "id": case,
            "system": system.name,
            **{metric: _number(column[s, i]) for metric, column in columns.items()},
            "empty": not system.predictions[i].strip(),
            "stop_reason": system.stop_reasons[i],
            "strata": [name for name, mask in cases.strata.items() if mask[i]],
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _page_cases(
    cases: Cases,
    systems: Sequence[System],
    columns: dict[str, Floats],
    claims: list[list[list[Claim]]],
    verdicts: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """What the scorecard shows of each case. Kinds of errors: aspects that differ, and what the judge says."""
    judged = verdicts["errors"] if verdicts else {}

    def errors(s: int, i: int) -> list[str]:
        name = systems[s].name
        found = (judged[name][i] or ()) if name in judged else ()
        kinds = dict.fromkeys(f"judge: {error['type']}" for error in found)
        return [aspect.removeprefix("clinical_") for aspect in ASPECTS if columns[aspect][s, i] < 1] + list(kinds)

    return [
        {
            "id": case,
            "findings": cases.findings[i],
            "reference": cases.references[i],
            "context": cases.contexts[i] or None,
            "strata": [name for name, mask in cases.strata.items() if mask[i]],
            "systems": {
                system.name: {
                    "prediction": system.predictions[i],
                    "stop_reason": system.stop_reasons[i],
                    "scores": {name: _number(column[s, i]) for name, column in columns.items()},
                    "unsupported": [{"kind": kind, "start": a, "end": b} for kind, a, b in claims[s][i]],
                    "errors": errors(s, i),
                }
                for s, system in enumerate(systems)
            },
        }
        for i, case in enumerate(cases.ids[:PAGE_LIMIT])
    ]


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
    judge_client: Client | None = None,
    batch_in: Sequence[Path] = (),
) -> dict[str, Any]:
    """Score the systems of one or several predictions files on the same cases, and with `train` the baselines too.

    Returns what goes into `out`/metrics.json (`format_report` prints it); `out`/per_case.jsonl gets a row for each
    system and case, `out`/scorecard.html the page, `out`/judge.jsonl the judge's verdicts. Intervals: 95 % percentile
    bootstrap, over patients where every case has a `patient_id`. All pairs of systems are compared. Where BERTScore or
    the judge cannot be had, `problems` says so and the rest goes on; so it does where the screen finds an identifier
    (then nothing was sent). The judge does not see the trivial baselines.
    ValueError names all that is wrong with the input by file, line or id.
    """
    if resamples < 1 or batch_size < 1:
        raise ValueError(f"resamples is {resamples} and batch_size {batch_size}; both must be at least 1")
    cases, systems = load([Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)], names)
    judged = len(systems)
    report: dict[str, Any] = {
        "cases": len(cases.ids),
        "clusters": len(set(cases.clusters.tolist())),
        "resamples": resamples,
        "seed": seed,
        "clustered_by": "patient_id" if cases.by_patient else None,
        "problems": [],
        "signatures": {
            "normal": NORMAL_RULE,
            "rouge": rouge_signature(),
            "clinical": f"radllama.clinical rules {clinical.VERSION}",
        },
        "versions": {name: metadata.version(name) for name in ("rouge-score", "nltk", "numpy")},
    }
    if train is not None:
        if {system.name for system in systems} & set(BASELINES):
            raise ValueError(f"a system has the name of a baseline ({some(BASELINES)}); rename it with --names")
        more, close = baselines(cases, Path(train), seed)
        systems += more
        report["near_training"] = int(close.sum())
        report["signatures"]["near"] = f"word trigrams of findings and impression, Jaccard >= {NEAR}"
        if 0 < close.sum() < len(close):
            cases = replace(cases, strata={"near training": close, "not near training": ~close, **cases.strata})
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)  # before the work: a bad path costs nothing

    checks, claims = clinical_checks(cases, systems)  # first: a process with torch inside is better not forked
    answers = [text for system in systems for text in system.predictions]
    lexical = rouge(cases.references * len(systems), answers)
    columns = {metric: np.reshape(values, (len(systems), -1)) for metric, values in lexical.items()}
    if bertscore_model is not None:
        options = {"num_layers": bertscore_layers, "batch_size": batch_size, "device": device}
        columns |= _bertscore(cases, systems, report, bertscore_model, **options)
    columns |= checks
    verdicts = None
    if judge_client is not None:
        asked, verdicts = _judge(cases, systems[:judged], report, judge_client, seed, batch_in)
        missing = np.full((len(systems) - judged, len(cases.ids)), np.nan)
        columns |= {metric: np.concatenate([column, missing]) for metric, column in asked.items()}

    tables(report, cases, systems, columns)
    if out is not None:
        folder = Path(out)
        if len(cases.ids) > PAGE_LIMIT:
            report["problems"].append(f"scorecard.html shows the first {PAGE_LIMIT:,} of {len(cases.ids):,} cases")
        if verdicts is not None:
            write_rows(folder / "judge.jsonl", judge.judge_rows(verdicts))
        write_rows(folder / "per_case.jsonl", _per_case(cases, systems, columns))
        replace_text(folder / "metrics.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
        write_scorecard(report, _page_cases(cases, systems, columns, claims, verdicts), folder / "scorecard.html")
    return report


def tables(report: dict[str, Any], cases: Cases, systems: Sequence[System], columns: dict[str, Floats]) -> None:
    """Means, intervals, strata and comparisons into the report."""
    metrics, clusters = list(columns), cases.clusters
    resamples, seed = report["resamples"], report["seed"]
    scores = np.stack([column.T for column in columns.values()], axis=2)  # (n, systems, metrics)
    overall = summarise(scores, metrics, clusters, resamples, seed)
    strata = {
        name: summarise(scores[mask], metrics, clusters[mask], resamples, seed) for name, mask in cases.strata.items()
    }
    report |= {"metrics": metrics, "strata": {name: int(mask.sum()) for name, mask in cases.strata.items()}}
    report["lower_is_better"] = [metric for metric in LOWER_IS_BETTER if metric in metrics]
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
    paired = scores[:, :, [metrics.index(metric) for metric in tested]]
    labels = [system.name for system in systems]
    report["comparisons"] = (
        compare_systems(paired, labels, tested, clusters, resamples, seed) if len(systems) > 1 else []
    )


def _decimal(value: float, sign: str = "") -> str:
    text = f"{value:{sign}.3f}" if abs(value) < 0.9995 else f"{value:{sign}.2f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def _cell(entry: dict[str, Any], key: str, sign: str = "") -> list[str]:
    if entry[key] is None:
        return ["-"]
    spread = "" if entry["low"] is None else f"[{_decimal(entry['low'], sign)},{_decimal(entry['high'], sign)}]"
    return [_decimal(entry[key], sign), spread, *([f"p {entry['p_holm']:.4f}"] if "p_holm" in entry else [])]


def _title(metric: str) -> str:
    """A column's heading in at most 13 characters."""
    name = metric.removeprefix("clinical_" if metric in ASPECTS else "judge_")
    return TITLES.get(name, name)[:13]


def _table(corner: str, names: list[str], columns: list[tuple[str, list[list[str]]]]) -> list[str]:
    """Lines of at most 80 characters: names in 24, then four columns of 14, in as many blocks as it takes. A column is
    its title and for each name the lines of its cell; titles may have several lines, too."""
    lines = []
    corner, *names = [name if len(name) <= 23 else f"{name[:10]}...{name[-10:]}" for name in [corner, *names]]
    for start in range(0, len(columns), 4):
        block = [[title.split("\n"), *cells] for title, cells in columns[start : start + 4]]
        for s, name in enumerate([corner, *names]):
            for k in range(max(len(column[s]) for column in block)):
                cells = "".join(f"{column[s][k] if k < len(column[s]) else '':>14}" for column in block)
                lines.append(f"{name if k == 0 else '':24}{cells}".rstrip())
        lines.append("")
    return lines


def _rate(count: int, system: dict[str, Any], cases: int) -> list[str]:
    """How many answers, and their share; "-" where nothing is known of how they stopped."""
    return [f"{count:,}", f"{count / cases:.1%}"] if system["stopped"] or system["truncated"] else ["-"]


def _judge_table(report: dict[str, Any]) -> list[str]:
    said, systems = report["judge"], report["systems"]
    names = list(said["errors"])  # the judge sees no baseline
    cells = [(_title(m), [_cell(systems[name]["metrics"][m], "mean") for name in names]) for m in JUDGED]
    lines = _table("judge, from 1 to 5", names, cells)
    lines[-1:] = ["serious err.: significant or urgent errors in a case; less is better", ""]
    if said["pairs"]:
        keys = {"better": "wins_a", "tie": "ties", "worse": "wins_b", "order decided": "order_dependent"}
        cells = [(title, [[f"{pair[key]:,}"] for pair in said["pairs"]]) for title, key in keys.items()]
        lines += _table(f"judge: {names[0]} or ...", [pair["b"] for pair in said["pairs"]], cells)
    return lines


def format_report(report: dict[str, Any], *, brief: bool = False) -> str:
    """What `evaluate` returned, as text for a terminal of 80 columns; `brief`: the headline table alone."""
    systems, metrics, names = report["systems"], report["metrics"], list(report["systems"])
    unit = f"{report['clusters']:,} patients" if report["clustered_by"] else "cases (no patient ids)"
    head = f"{report['cases']:,} cases; mean, 95 % interval from {report['resamples']:,} resamples of {unit}"
    if "near_training" in report:
        head += f"; near a training report: {report['near_training']:,}"
    lines = [*textwrap.wrap(head, 80), ""]
    hidden = {*ASPECTS, *JUDGED}
    lines += _table(
        "system",
        names,
        [
            (_title(metric), [_cell(systems[name]["metrics"][metric], "mean") for name in names])
            for metric in metrics
            if metric not in hidden and (not brief or metric in ("rouge1", "rouge2", "rougeL", "clinical_f1"))
        ],
    )
    signatures = report["signatures"]
    if brief:
        return "\n".join(lines + _signatures({key: signatures[key] for key in ("rouge", "clinical")}))
    lines += _table(
        "clinical F1 by aspect",
        names,
        [(_title(metric), [_cell(systems[name]["metrics"][metric], "mean") for name in names]) for metric in ASPECTS],
    )
    if "judge" in report:
        lines += _judge_table(report)
    lines += _table(
        "answers that are",
        names,
        [("empty", [[f"{systems[name]['empty']:,}"] for name in names])]
        + [
            (key, [_rate(systems[name][key], systems[name], report["cases"]) for name in names])
            for key in ("stopped", "truncated")
        ],
    )
    shown = list(report["strata"].items())[:12]
    lines += _table(
        "rougeL by stratum",
        names,
        [
            (
                "\n".join([*textwrap.wrap(title.removeprefix("modality "), 13)[:2], f"{size:,}"]),
                [_cell(systems[name]["strata"][title]["rougeL"], "mean") for name in names],
            )
            for title, size in shown
        ],
    )
    if more := len(report["strata"]) - len(shown):
        lines[-1:] = [f"{more} more strata are in metrics.json, as are the other metrics of each", ""]
    rows = {(row["b"], row["metric"]): row for row in report["comparisons"] if row["a"] == names[0]}
    if rows:
        lines += ["paired difference, its 95 % interval, p (approximate randomisation; Holm)", ""]
        lines += _table(
            f"{names[0]} - ...",
            names[1:],
            [
                (_title(metric), [_cell(rows[name, metric], "difference", "+") for name in names[1:]])
                for metric in metrics
                if metric not in DERIVED
            ],
        )
    return "\n".join(lines + _signatures(signatures))


def _signatures(signatures: dict[str, str]) -> list[str]:
    """What the numbers depend on, in lines of at most 80 characters."""
    texts = (f"{key}: {text}" for key, text in signatures.items())
    return [line for text in texts for line in textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)]


def _predict(args: argparse.Namespace) -> None:
    """Impressions by another model for the first file's cases, as one more predictions file in `args`; for a dry run
    or a batch file a plan is printed instead."""
    rows = read_rows(args.paths[0], ("id", "findings", "reference"))
    cases = [{k: v for k, v in row.items() if k not in ("prediction", "model", "stop_reason")} for row in rows]
    with closing(judge.client_from(args.predict_with, args.judge_url, args)) as client:
        answers, result = judge.predict_with(
            cases, args.instruction, client, dry_run=args.dry_run, batch_out=args.batch_out, batch_in=args.batch_in
        )
    if args.dry_run or args.batch_out:
        print("\n".join([judge.format_plan(result), *(f"wrote {file}" for file in result.get("files", ()))]))
        return
    for problem in result["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    print(_wrapped(judge.format_usage(result["usage"])))
    if failures := result["failures"]:
        listed = [f"{failure['id']}: {failure['reason']}" for failure in failures[:20]]
        listed += [f"... and {len(failures) - 20:,} more"] * (len(failures) > 20)
        raise ValueError(
            f"{args.predict_with} gave no impression for {len(failures):,} of {len(cases):,} cases. What it gave is "
            f"kept in {args.cache}: run again to ask for the rest (--retry-failed: also where it refused), or take "
            "these cases out of the predictions files\n  " + "\n  ".join(listed)
        )
    path: Path = args.out / f"predictions-{re.sub(r'[^A-Za-z0-9.-]+', '-', args.predict_with)}.jsonl"
    write_rows(path, answers)
    print(f"wrote {path}")
    args.paths = [*args.paths, path]
    args.names = [*args.names, args.predict_with] if args.names else None


def _plan_judge(args: argparse.Namespace, client: Client) -> None:
    """--dry-run and --batch-out: what the judge would be asked."""
    cases, systems = load(args.paths, args.names)
    answers = {system.name: system.predictions for system in systems}
    if args.predict_with:
        answers[args.predict_with] = cases.references
        print(f"for the judge, the references stand in for what {args.predict_with} is going to write")
    plan = judge.judge_systems(
        _judge_cases(cases), answers, client, seed=args.seed, dry_run=args.dry_run, batch_out=args.batch_out
    )
    print("\n".join([judge.format_plan(plan), *(f"wrote {file}" for file in plan.get("files", ()))]))


def _wrapped(text: str) -> str:
    return "\n".join(line for long in text.splitlines() for line in textwrap.wrap(long, 80, subsequent_indent="  "))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m radllama.eval",
        description=(
            "Score predictions.jsonl files (a line: id, findings, reference, prediction, model, stop_reason) of one or "
            "several systems on the same cases: ROUGE, BERTScore, clinical checks, a language model as a judge; "
            "intervals, paired tests, trivial baselines; a table, metrics.json, per_case.jsonl and scorecard.html. "
            "The printed table compares the first system with the others, metrics.json all pairs."
        ),
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PREDICTIONS", help="one file for each system")
    add("--out", type=Path, required=True, metavar="DIR", help="gets metrics.json, per_case.jsonl, scorecard.html")
    add("--names", nargs="+", metavar="NAME", help="the systems' names, one a file (default: model in the rows)")
    add("--train", type=Path, metavar="PAIRS", help=f"training pairs.jsonl: adds {', '.join(BASELINES)}")
    add("--bertscore", dest="bertscore_model", metavar="MODEL", help="add BERTScore by this model (name or folder)")
    add("--bertscore-layers", type=int, metavar="N", help="the model's layer (default: bert-score's choice)")
    add("--batch-size", type=int, default=64, metavar="N", help="for BERTScore (default: 64)")
    add("--device", help="for BERTScore: cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--brief", action="store_true", help="print the headline table alone")
    add("--resamples", type=int, default=10_000, metavar="N", help="in bootstrap and test (default: 10000)")
    add("--seed", type=int, default=0, metavar="S", help="of all random draws (default: 0)")
    add("--judge", metavar="MODEL", help="let this model judge the impressions (gpt-4o, or any on --judge-url)")
    add("--predict-with", metavar="MODEL", help="let this model write impressions, too, as one more system")
    add("--instruction", help="for --predict-with: the wording that the other systems were given")
    add("--judge-url", metavar="URL", help="an OpenAI-compatible server's base address (default: OpenAI's)")
    judge.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.predict_with and not args.instruction:
        parser.error("--predict-with needs --instruction, the wording that the other systems were given")
    if (args.dry_run or args.batch_out or args.batch_in) and not (args.judge or args.predict_with):
        parser.error("--dry-run, --batch-out and --batch-in go with --judge or --predict-with")
    if (args.batch_out or args.batch_in) and args.judge and args.predict_with:
        parser.error("a batch is for --judge or for --predict-with: get the impressions first, then judge them")
    try:
        report = _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report is None:
        return 0
    for problem in report["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    print(format_report(report, brief=args.brief))
    if "judge" in report:
        print(_wrapped(judge.format_usage(report["judge"]["usage"])))
    names = ("metrics.json", "per_case.jsonl", "scorecard.html", *(["judge.jsonl"] if "judge" in report else []))
    print("\nwrote " + ", ".join(str(args.out / name) for name in names))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the command line asks for; None where a plan was all. What is wrong shows before anything is paid for."""
    if missing := [path for path in args.batch_in if not path.is_file()]:
        raise ValueError(f"--batch-in: no such file: {some(missing)}; give the output of a finished batch")
    plan_alone = args.dry_run or args.batch_out is not None
    client = judge.client_from(args.judge, args.judge_url, args) if args.judge else None
    with nullcontext() if client is None else closing(client):
        if client and not (plan_alone or args.batch_in):
            client.require_permission()
        if args.predict_with:
            _, systems = load(args.paths, args.names)
            if args.predict_with in [system.name for system in systems]:
                raise ValueError(f"a system is named {args.predict_with!r} already; rename it with --names")
            _predict(args)
        if plan_alone:
            if client:
                _plan_judge(args, client)
            return None
        keys = "paths names train out bertscore_model bertscore_layers batch_size device resamples seed batch_in"
        return evaluate(**{key: getattr(args, key) for key in keys.split()}, judge_client=client)


if __name__ == "__main__":
    sys.exit(main())
