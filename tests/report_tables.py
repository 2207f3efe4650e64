"""Tables of made reports, and what the tests of reports, pairs and intake look at."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from radllama import intake

Row = dict[str, Any]
OUTPUTS = (
    "train.jsonl",
    "validation.jsonl",
    "test.jsonl",
    "quarantine.jsonl",
    "funnel.json",
    "funnel.png",
    "DATASET.md",
)
FINDINGS = (
    "The heart is normal in size.",
    "The lungs are clear without focal consolidation.",
    "There is no pleural effusion or pneumothorax.",
    "A 12 mm nodule lies in the right upper lobe.",
    "There is a small left pleural effusion.",
    "Degenerative changes of the thoracic spine are noted.",
    "The gallbladder holds several stones up to 8 mm.",
    "Patchy opacity at the left base suggests pneumonia.",
    "The aorta is tortuous and calcified.",
    "Median sternotomy wires are intact.",
)
IMPRESSIONS = ("No acute disease.", "Small left pleural effusion.", "Cholelithiasis without cholecystitis.")
LONG = " ".join(FINDINGS[:3])


def rows(count: int, seed: int = 0) -> list[Row]:
    """Split reports of distinct findings, two to a patient; every tenth copies an earlier one's texts."""
    draw = random.Random(seed)
    made: list[Row] = []
    for k in range(count):
        words = " ".join(f"Level {draw.randint(1, 9999)} {sentence}" for sentence in draw.sample(FINDINGS, 4))
        row = {"uid": f"r{k}", "mrn": f"m{k // 2}", "findings": words, "impression": draw.choice(IMPRESSIONS),
               "modality": draw.choice(["CT", "MR"])}  # fmt: skip
        if k % 10 == 9:
            row |= {name: made[draw.randrange(k)][name] for name in ("findings", "impression")}
        made.append(row)
    return made


def write_csv(path: Path, table: list[Row], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)
    return path


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def reasons(folder: Path) -> dict[str, str]:
    return {row.get("id", str(row["line"])): row["reason"] for row in lines(folder / "quarantine.jsonl")}


def everything(folder: Path) -> list[Row]:
    return [row for name in ("train", "validation", "test") for row in lines(folder / f"{name}.jsonl")]


def columns(**names: str) -> intake.Columns:
    return intake.Columns(tuple(sorted(names.items())))


IDS = columns(id="uid", patient_id="mrn")
