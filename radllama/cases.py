"""The cases that systems answer: predictions files read, checked and joined by id, and cut into strata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radllama.files import raise_if, read_jsonl, some
from radllama.metrics import is_normal
from radllama.stats import Ints

Rows = dict[str, dict[str, Any]]  # the rows of one file by id, in the file's order


@dataclass(frozen=True)
class Cases:
    """The n cases that every system answers; `clusters` (n,) numbers their patients, or the cases themselves."""

    ids: list[str]
    findings: list[str]
    references: list[str]
    contexts: list[str]  # indication and comparison, where given
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


def _read_system(path: Path, name: str | None, problems: list[str]) -> tuple[str, Rows]:
    """The name of the system in one predictions file, and its rows."""
    rows: Rows = {}
    lines: dict[str, list[int]] = {}
    fields = ("id", "findings", "reference", "prediction") + (() if name else ("model",))
    for number, row in read_jsonl(path, fields, problems):
        rows.setdefault(row["id"], row)
        lines.setdefault(row["id"], []).append(number)
        if row.get("stop_reason", "missing") not in ("stop", "length", None):
            problems.append(f'{path} line {number}: stop_reason must be "stop", "length", or null if not known')
    if twice := [f"{key} on lines {some(where)}" for key, where in lines.items() if len(where) > 1]:
        problems.append(f"{path}: duplicate ids ({some(twice)}); keep one row for each case")
    models = [name] if name else list(dict.fromkeys(row["model"] for row in rows.values()))
    if len(models) > 1:
        problems.append(f"{path}: more than one model ({some(models)}); split the file, or use --names")
    return " ".join(models[0].split()) if models else "", rows


def load(paths: Sequence[Path], names: Sequence[str] | None = None) -> tuple[Cases, list[System]]:
    """Read predictions files that answer the same cases, in the first one's order. ValueError lists all problems."""
    if not paths or (names is not None and len(names) != len(paths)):
        raise ValueError(f"{len(paths)} predictions files and {len(names or ())} names; give one name a file or none")
    problems: list[str] = []
    read = [_read_system(path, names[i] if names else None, problems) for i, path in enumerate(paths)]
    raise_if(problems)
    main, first = paths[0], read[0][1]
    for path, (name, rows) in zip(paths, read, strict=True):
        lacks, extra = [i for i in first if i not in rows], [i for i in rows if i not in first]
        if lacks or extra:
            problems.append(
                f"{path}: against {main} {len(lacks)} ids are missing ({some(lacks)}) and {len(extra)} "
                f"added ({some(extra)}); score all systems on the same cases, or each file alone"
            )
        if odd := [
            i
            for i in first
            if i in rows and any(first[i][key].split() != rows[i][key].split() for key in ("reference", "findings"))
        ]:
            problems.append(
                f"{path}: another reference or other findings than in {main} for {len(odd)} ids "
                f"({some(odd)}); make both files from the same cases"
            )
        if len(same := [str(other) for other, (label, _) in zip(paths, read, strict=True) if label == name]) > 1:
            problems.append(f"{path}: several systems are named {name!r} ({some(same)}); tell them apart by --names")
    raise_if(problems)

    def optional(key: str) -> list[str]:  # such a field counts wherever one of the files has it
        values = ([rows[i].get(key) for _, rows in read] for i in first)
        return [next((str(value) for value in row if value not in (None, "")), "") for row in values]

    findings, references = ([row[key] for row in first.values()] for key in ("findings", "reference"))
    patients, kinds = optional("patient_id"), np.array(optional("modality"), object)
    owners = patients if all(patients) else list(first)
    numbers = {owner: number for number, owner in enumerate(sorted(set(owners)))}
    clusters = np.array([numbers[owner] for owner in owners])
    strata = {"normal": np.array([is_normal(text) for text in references])}
    strata["abnormal"] = ~strata["normal"]
    lengths = np.array([len(text.split()) for text in references])
    middle = int(np.median(lengths))
    strata |= {f"1-{middle} words": lengths <= middle, f"{middle + 1}+ words": lengths > middle}
    for kind, _ in Counter(kinds.tolist()).most_common():
        strata[f"modality {kind or 'not given'}"] = kinds == kind
    strata = {name: mask for name, mask in strata.items() if 0 < mask.sum() < len(first)}
    told = zip(optional("indication"), optional("comparison"), strict=True)
    contexts = [
        "\n".join(f"{name}: {text}" for name, text in (("Indication", a), ("Comparison", b)) if text.strip())
        for a, b in told
    ]
    return Cases(list(first), findings, references, contexts, clusters, all(patients), strata), [
        System(name, str(path), [rows[i]["prediction"] for i in first], [rows[i]["stop_reason"] for i in first])
        for path, (name, rows) in zip(paths, read, strict=True)
    ]
