"""The model card: README.md in last/ and best/, with what a user of the weights must know. No report text."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from radllama.config import Config
from radllama.files import replace_text
from radllama.run import METRICS_FILE

CARD_FILE = "README.md"


@lru_cache(maxsize=8)
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _data(path: str | None) -> str:
    if path is None or not (file := Path(path)).is_file():
        return "none"
    state = file.stat()
    return f"`{file.name}`, SHA-256 `{_digest(file, state.st_size, state.st_mtime_ns)}`"


def write_card(folder: Path, config: Config, run: Path) -> None:
    """README.md for the weights in `folder`, from the config and the metrics that the run folder holds so far."""
    metrics = run / METRICS_FILE
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    keys = "step", "loss", "validation_loss"  # a step with a bad loss has none
    last = {key: [record[key] for record in records if record.get(key) is not None][-1:] for key in keys}
    base = Path(config.model.path).name if Path(config.model.path).is_dir() else config.model.path
    method: str = config.method
    if method != "full":
        lora = config.lora
        method += f", rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"
    facts = {
        "base": f"`{base}`" + (", random weights" if config.model.from_scratch else ""),
        "method": method,
        "training data": _data(config.data.train),
        "validation data": _data(config.data.validation),
        **{key.replace("_", " "): f"{value[0]:.6g}" for key, value in last.items() if value},
        "learning rate, batch, seed": f"{config.training.learning_rate:g}, {config.training.batch_size} reports, "
        f"{config.training.seed}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    replace_text(
        folder / CARD_FILE,
        "# Radiology findings to impression\n\nFine-tuned with radllama. Not a medical device: a radiologist must read "
        f"what it writes.\n\n| | |\n|---|---|\n{table}\n\n## Memorisation\n\nNot measured. Before these weights are "
        "shared: `python -m radllama.reports ... --plant-canaries N` before training, `python -m radllama.canaries` "
        "after it.\n",
    )


def set_section(folder: Path, title: str, text: str) -> None:
    """Put `text` under "## title" in a folder's README.md, in place of what stood there."""
    file = folder / CARD_FILE
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    section = f"## {title}\n\n{text}\n"
    found = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    card = found.sub(lambda _: section, card, count=1) if found.search(card) else f"{card}\n{section}".lstrip("\n")
    replace_text(file, card)
