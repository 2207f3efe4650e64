"""Small predictions files that the tests of the evaluation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORTS = [  # findings, impression
    ("The lungs are clear. Heart size is normal.", "No acute cardiopulmonary disease."),
    ("Large right pleural effusion with adjacent opacity.", "1. Large right effusion.\n2. Basal atelectasis likely."),
    ("Nodule of 6 mm in the left upper lobe.", "New 6 mm nodule in the left upper lobe; follow-up is recommended."),
    ("Heart is enlarged. Vessels are congested.", "Cardiomegaly. Mild oedema. No effusion."),
    ("No fracture is seen.", "No fracture."),
    ("Lines and tubes are in place. Lungs are clear.", "No acute findings."),
]
REFERENCES = [impression for _, impression in REPORTS]
POOR = ["Normal."] * 4 + ["  ", "No acute findings. " * 9]  # one is empty; the last was cut off


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(model: str, answers: list[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"case-{i}",
            "findings": findings,
            "reference": impression,
            "prediction": answer,
            "model": model,
            "stop_reason": "stop",
            **more,
        }
        for i, ((findings, impression), answer) in enumerate(zip(REPORTS, answers, strict=True))
    ]


def two_systems(folder: Path) -> list[Path]:
    """A good system, and a poor one whose file has another order, one empty and one truncated answer."""
    poor = rows_of("poor", POOR)
    poor[5]["stop_reason"] = "length"
    good = write(folder / "good.jsonl", rows_of("good", REFERENCES))
    return [good, write(folder / "poor.jsonl", poor[::-1])]
