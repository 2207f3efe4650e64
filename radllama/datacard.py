"""What a data preparation did, from its counts and columns: funnel.json, funnel.png, and the data card DATASET.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radllama.duplicates import REASONS, SPLITS, draw
from radllama.held_out import HeldOut
from radllama.pairs import FLAGS, LABELS, POLICIES

UNREADABLE = (
    "undecodable",
    "ragged_row",
    "malformed_row",
    "bad_json",
    "wrong_type",
    "truncated_file",
    "unreadable_file",
)
FILTERED = ("short_findings", "short_impression", "placeholders", "impression_in_prompt", *POLICIES)
STAGES = ("read", "readable", "findings and impression", "through the filters", "through the screen", "in the splits")
SHOWN = 20  # most frequent labels in the card
Column = Callable[[str], NDArray[Any]]


def funnel(entries: Sequence[Mapping[str, Any]], reason: NDArray[np.int8]) -> list[dict[str, Any]]:
    """How many reports were left after each stage, and why the others were not. entries: counts, chunk by chunk."""
    reasons: Counter[str] = Counter()
    for entry in entries:
        reasons.update(entry["reasons"])
    steps: list[dict[str, int]] = [{}, {}, {}, {}, {}]
    for name, count in reasons.items():
        place = 0 if name in UNREADABLE else 2 if name in FILTERED else 3 if name == "identifier" else 1
        steps[place][name] = count
    steps[4] = {name: n for code, name in enumerate(REASONS) if code and (n := int((reason == code).sum()))}
    left = sum(entry["rows"] for entry in entries)
    stages: list[dict[str, Any]] = [{"stage": STAGES[0], "reports": left, "dropped": {}}]
    for name, gone in zip(STAGES[1:], steps, strict=True):
        left -= sum(gone.values())
        ordered = dict(sorted(gone.items(), key=lambda item: (-item[1], item[0])))
        stages.append({"stage": name, "reports": left, "dropped": ordered})
    return stages


def describe(column: Column, labels: Callable[[str], list[str]], rows: NDArray[np.bool_]) -> dict[str, Any]:
    """Counts, lengths, labels and flags of the reports of one split."""
    count = int(rows.sum())
    about: dict[str, Any] = {"reports": count, "patients": int((np.unique(column("patient")[rows]) != 0).sum())}
    for name in ("findings_words", "impression_words"):
        lengths = column(name)[rows]
        places = {"p5": 5, "median": 50, "p95": 95, "longest": 100}
        about[name] = {label: int(np.percentile(lengths, place)) for label, place in places.items()} if count else {}
    for name in LABELS:
        numbers, counts = np.unique(column(name)[rows], return_counts=True)
        names = labels(name)
        most = sorted(((names[k], int(n)) for k, n in zip(numbers, counts, strict=True)), key=lambda x: (-x[1], x[0]))
        about[name] = {label or "not given": n for label, n in most[:SHOWN]}
        if rest := sum(n for _, n in most[SHOWN:]):
            about[name]["others"] = rest
    flags = column("flags")[rows]
    about["flags"] = {flag: n for bit, flag in enumerate(FLAGS) if (n := int((flags >> bit & 1).sum()))}
    dates = column("date")[rows]
    if (dates > 0).any():
        about["years"] = [int(dates[dates > 0].min()) // 10000, int(dates.max()) // 10000]
    return about


def contamination(
    column: Column, leader: NDArray[np.int32], split: NDArray[np.int8], reason: NDArray[np.int8],
    shares: Sequence[float], held_out: HeldOut | None,
) -> dict[str, Any]:  # fmt: skip
    """The share of the held-out reports that train holds, too: now, and had each report been drawn for itself.

    "same": after normalisation. "near": a near duplicate, as the clusters say; what an exact search among the held-out
    reports still found, and what was then removed from train, is in "search".
    """
    kept, unique = reason == 0, reason != REASONS.index("repeated_id")
    random = draw(column("id"), shares)
    found: dict[str, Any] = {"now": {}, "at random": {}}
    for name in ("pair", "findings", "impression", "near"):
        values = leader if name == "near" else column(name)
        for title, rows, sides in (("now", kept, split), ("at random", unique, random)):
            train = np.unique(values[rows & (sides == 0)])
            for number in (1, 2):
                side = values[rows & (sides == number)]
                share = round(float(np.isin(side, train).mean()), 6) if len(side) else 0.0
                found[title].setdefault(SPLITS[number], {})[name if name == "near" else f"same {name}"] = share
    if held_out:
        found["search"] = {
            "held-out reports": held_out.queries,
            "searched without gaps": held_out.complete,
            "had a near duplicate that MinHash had missed": len(np.unique(held_out.query)),
            "removed": len(np.unique(held_out.other)),
        }
    else:
        for sides in (*found["now"].values(), *found["at random"].values()):
            del sides["near"]
    return found


def write_card(summary: Mapping[str, Any], folder: Path) -> None:
    """funnel.json, funnel.png and DATASET.md, functions of `summary` alone."""
    _picture(summary, folder / "funnel.png")
    (folder / "DATASET.md").write_text(_card(summary), encoding="utf-8")
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (folder / "funnel.json").write_text(text + "\n", encoding="utf-8")


def _picture(summary: Mapping[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second: only where it is needed
    from matplotlib.figure import Figure

    stages = summary["stages"]
    figure = Figure(figsize=(10, 0.9 * len(stages) + 0.6), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max(stages[0]["reports"], 1)
    for place, stage in enumerate(stages):
        count, gone = stage["reports"], stage["dropped"]
        axes.barh(place, most, color="#eef1f5", height=0.62)
        axes.barh(place, count, color="#2f6f9f", height=0.62)
        axes.text(most * 1.015, place, f"{count:,}  ({count / most:.1%})", va="center", fontsize=10)
        told = [f"{name} {n:,}" for name, n in list(gone.items())[:4]] + ["..."] * (len(gone) > 4)
        axes.text(0, place - 0.42, f"{stage['stage']}" + ("   \N{MINUS SIGN} " + ", ".join(told)) * bool(told),
                  va="center", fontsize=9, color="#333333")  # fmt: skip
    axes.set_ylim(len(stages) - 0.5, -0.8)
    axes.set_xlim(0, most * 1.22)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _card(summary: Mapping[str, Any]) -> str:
    splits, settings = summary["splits"], summary["settings"]
    parts = [
        "# Data card",
        "Findings/impression pairs from radiology reports, made by `radllama.reports`. De-identification here is "
        "**screening, not certification**: see the residual risks below.",
        f"Sources: {', '.join(f'`{name}`' for name in summary['sources'])}.",
        "## From reports to pairs",
        "![funnel](funnel.png)",
        _table(
            ["stage", "reports", "dropped"],
            [
                [s["stage"], f"{s['reports']:,}", ", ".join(f"{name} {n:,}" for name, n in s["dropped"].items())]
                for s in summary["stages"]
            ],
        ),
        "Every dropped report is in `quarantine.jsonl`, with its source, line and reason.",
        "## Splits",
        _table(
            ["", *splits],
            [
                [name, *(about(split) for split in splits.values())]
                for name, about in (
                    ("reports", lambda s: f"{s['reports']:,}"),
                    ("patients", lambda s: f"{s['patients']:,}" if s["patients"] else "not known"),
                    ("words of the findings (5 %, median, 95 %, longest)", lambda s: _row(s["findings_words"])),
                    ("words of the impression", lambda s: _row(s["impression_words"])),
                    ("years", lambda s: " to ".join(str(year) for year in s.get("years", [])) or "not known"),
                )
            ],
        ),
    ]
    for name in (*LABELS, "flags"):
        every = dict.fromkeys(label for split in splits.values() for label in split[name])
        if set(every) - {"not given"}:
            rows = [[label, *(f"{split[name].get(label, 0):,}" for split in splits.values())] for label in every]
            parts += [f"### {name.replace('_', ' ').capitalize()}", _table([name.replace("_", " "), *splits], rows)]
    parts += [
        "A flag marks what a rule noticed and the policy kept: it stands in the pair's `flags`.",
        "## Duplicates and contamination",
        _splitting(settings),
        _contaminated(summary),
        "## Identifiers",
        _identifiers(summary),
        "## Residual risks",
        _risks(settings, splits),
        "## Rules and settings",
        _table(["rules", "version"], sorted(summary["versions"].items())),
        "```json\n" + json.dumps(settings, indent=2, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _row(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,}" for value in lengths.values()) or "none"


def _splitting(settings: Mapping[str, Any]) -> str:
    near = settings["near"]
    what = f"near duplicates (Jaccard index of word 3-grams >= {near:g}), " if near else ""
    cap = f"at most {settings['cap']} reports" if settings["cap"] else "all reports"
    test = f" Test holds the reports from {settings['test_from']} on." if settings["test_from"] else ""
    return (
        f"A patient is in one split only, and so are equal findings, equal pairs{' and ' if what else ''}{what}"
        f"across all reports. Of a report and its duplicates train keeps {cap}, a held-out split one of each "
        f"pair.{test}"
    )


def _contaminated(summary: Mapping[str, Any]) -> str:
    found = summary["contamination"]
    names = list(found["now"]["test"])
    rows = [
        [f"{split}: {name}", f"{found['now'][split][name]:.2%}", f"{found['at random'][split][name]:.2%}"]
        for split in ("test", "validation")
        for name in names
    ]
    text = "The share of held-out reports that train holds, too:\n\n" + _table(
        ["", "in these files", "had each report been drawn at random"], rows
    )
    text += (
        "\n\nEqual impressions are no leak in themselves (most normal studies end in the same few sentences), but a "
        "model that always gives the most frequent one scores well on them: compare with the constant baseline."
    )
    if search := found.get("search"):
        text += (
            f"\n\nAn exact search, independent of MinHash, compared all {search['held-out reports']:,} "
            f"held-out reports with all others ({search['searched without gaps']:,} of them without gaps): "
            f"{search['had a near duplicate that MinHash had missed']:,} had a near duplicate that "
            f"MinHash had missed; the {search['removed']:,} reports concerned were removed from the less strict split."
        )
    return text


def _identifiers(summary: Mapping[str, Any]) -> str:
    settings, found = summary["settings"], summary["identifiers"]
    if settings["deid"] == "off":
        return "The screen was off: the texts are as they came, ids, patients and dates included."
    action = {
        "screen": "Reports whose findings or impression hold what looks like an identifier were dropped (quarantined); "
        "an indication or a comparison that does was left out of its pair (withheld).",
        "redact": "What looks like an identifier was replaced"
        + (" by surrogates, dates moved by the same number of days for each patient." if settings["surrogates"] else
           ' by its kind, as in "[DATE]".'),
    }[settings["deid"]]  # fmt: skip
    rows = [
        [kind, *(f"{found[how].get(kind, 0):,}" for how in found)]
        for kind in sorted({k for f in found.values() for k in f})
    ]
    keyed = (
        "Ids and patient ids are pseudonyms by the site's key, dates are shifted."
        if settings["key"]
        else "Ids are those of the source. Patients are numbered (the numbers mean nothing outside these files), and "
        "of dates only the year is kept."
    )
    table = _table(["kind", *(f"in {how} text" for how in found)], rows) if rows else "None were found."
    return f"{action} Screening, not certification.\n\n{table}\n\n{keyed}"


def _risks(settings: Mapping[str, Any], splits: Mapping[str, Any]) -> str:
    risks = [
        "The screen finds what has a form or stands beside a cue. Names without a title, rare places, and what only "
        "somebody who knows the patient would recognise, pass. Have people read a sample before the data goes "
        "anywhere.",
        "A rare finding with a year and a place may point to a person without any identifier.",
        "`quarantine.jsonl` holds what was not screened, or failed the screen: treat it as you treat the source.",
        "The impressions are what was dictated, right or wrong; a flag is a rule's suspicion, not a reading.",
    ]
    if settings["deid"] != "off" and not settings["key"]:
        risks.append("Ids are copied: if they are accession numbers, use `--key-file`.")
    if not any(split["patients"] for split in splits.values()):
        risks.append("No patient ids: two reports of one patient may stand on both sides of a split unless they are "
                     "near duplicates.")  # fmt: skip
    if settings.get("canaries"):
        risks.append(f"`train.jsonl` ends with {settings['canaries']} canaries, made-up reports that are not counted "
                     "above; `canaries.jsonl` lists them, and `python -m radllama.canaries` measures what a model "
                     "remembers of them.")  # fmt: skip
    if not settings["near"]:
        risks.append("Near duplicates were not searched for (`--near off`).")
    return "\n".join(f"- {risk}" for risk in risks)
