"""The run folder: its claim and its lock, metrics.jsonl, the progress bar, loss.png."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from radllama.config import Config
from radllama.files import read_json, replace_text

logger = logging.getLogger("radllama")

CONFIG_FILE, DATA_FILE, METRICS_FILE, LOCK_FILE = "config.json", "data.json", "metrics.jsonl", ".lock"
# What --resume may change: no step that was done hangs on it.
CHANGEABLE = {
    f"training.{key}"
    for key in (
        *("output", "save_every", "validate_every", "keep_checkpoints"),
        *("on_bad_loss", "loss_spike", "gradient_checkpointing"),
    )
}
PATIENCE = 10.0  # seconds: the ranks of a run whose launcher was killed are gone by then


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn a failed write (full disk, read-only folder) into a TrainingError that says so.

    torch and safetensors report a full disk each in their own way, torch as "unexpected pos".
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(what.parent).free / 2**30 if what.parent.exists() else 0.0
        raise TrainingError(
            f"{what} cannot be written ({str(error).strip()}); its disk has {free:.1f} GB free. "
            "What was saved before is kept; make room and start again with --resume"
        ) from error


def claim_run_folder(config: Config, resume: bool) -> Path:
    """The run folder of a config; ValueError where it holds something else, or is read-only. Writes nothing."""
    folder = Path(config.training.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"training.output: {folder} is a file")
    found = entries(folder)
    run = read_json(folder / CONFIG_FILE) if CONFIG_FILE in found else {}
    if found and "training" not in run:
        raise ValueError(f"training.output: {folder} exists and is not a run folder; choose another")
    if resume and not run:
        raise ValueError(f"--resume: {folder} holds no run; start without --resume")
    if has_begun(folder):
        changed = [key for key in changed_keys(run, config.resolved()) if key not in CHANGEABLE]
        if changed:
            way = "set back what differs, or choose" if resume else "choose"
            raise ValueError(
                f"training.output: {folder} holds a run with another config ({', '.join(changed)}); {way} another"
            )
        if not resume:
            raise ValueError(
                f"training.output: {folder} holds this run already; continue it with --resume, or remove it"
            )
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"training.output: nothing can be written to {place} (read-only); choose another")
    return folder


def entries(folder: Path) -> set[str]:
    """What a folder holds, but for the lock and what a write that was cut off has left."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name for name in names - {LOCK_FILE} if not (name.startswith(".") and name.endswith(".tmp"))}


def has_begun(folder: Path) -> bool:
    """Whether a run has done a step there. One that ended before left its config at most, and may start anew."""
    metrics = folder / METRICS_FILE
    return not entries(folder) <= {CONFIG_FILE, DATA_FILE, METRICS_FILE} or (
        metrics.exists() and metrics.stat().st_size > 0
    )


class RunLock:
    """Keeps a second run out of the folder until the last process of the first is gone, however it ended.

    Every rank holds the lock shared; a new run must once hold it alone. The kernel releases it with the process.
    Over NFS the lock reaches other machines where the server and the mount support locks (NFSv4 does).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file: int | None = None

    def claim(self) -> None:
        """Rank 0, before anything is written. ValueError, naming the other run, where that holds on to the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        owner, give_up = "", time.monotonic() + PATIENCE
        while not self._take(fcntl.LOCK_EX):
            seen = os.pread(self._file, 1000, 0).decode(errors="replace").strip() or "another run"
            if time.monotonic() > give_up:
                raise ValueError(f"training.output: {self.path.parent} is in use by {seen}; end that run first")
            if seen != owner:
                logger.info("%s is in use by %s; waiting for its end", self.path.parent, seen)
            owner = seen
            time.sleep(0.2)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

        self._share()

    def share(self) -> None:
        """Every other rank, once rank 0 has claimed it."""
        if self._file is not None:
            return
        try:
            self._file = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            raise ValueError(
                f"training.output: {self.path.parent} must lie on a file system that all machines share"
            ) from None
        self._share()

    def _share(self) -> None:
        if not self._take(fcntl.LOCK_SH):
            raise ValueError(f"training.output: {self.path.parent} was taken by another run at the same moment")

    def _take(self, kind: int) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s); start no second run there", self.path, error.strerror
            )
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def write_config(config: Config, folder: Path) -> None:
    with writing(folder / CONFIG_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        if not has_begun(folder):
            (folder / DATA_FILE).unlink(missing_ok=True)
        replace_text(folder / CONFIG_FILE, json.dumps(config.resolved(), indent=2, ensure_ascii=False) + "\n")


def changed_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths at which two configs differ, the comment aside."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted((old.keys() | new.keys()) - {"comment"})
        return [key for k in keys for key in changed_keys(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))]
    return [] if old == new else [path]


class MetricsLog:
    """metrics.jsonl: one JSON object a line, flushed at once."""

    def __init__(self, folder: Path, *, keep_below: int, validated: bool = True) -> None:
        """Keep the lines of the first `keep_below` steps (a resumed run repeats the later ones).

        validated: whether the last of these was validated; else its line goes, too.
        """
        self.path, kept = folder / METRICS_FILE, []
        if keep_below and self.path.exists():
            whole = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            for line in whole:  # the last may have been cut off
                record = json.loads(line)
                again = record["step"] == keep_below and "validation_loss" in record and not validated
                kept += [line] if record["step"] <= keep_below and not again else []
        with writing(self.path):
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        with writing(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


class PeakMemory:
    """The most memory this process has used: on the GPU, or resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._process, self._peak = device, psutil.Process(), 0

    def gigabytes(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        self._peak = max(self._peak, self._process.memory_info().rss)
        return self._peak / 2**30


def show(bar: Any, record: dict[str, Any]) -> None:
    loss = math.nan if record["loss"] is None else record["loss"]
    bar.set_postfix_str(
        f"loss {loss:.3f}, lr {record['learning_rate']:.1e}, {record['reports_per_second']:.1f} reports/s, "
        f"{record['supervised_tokens_per_second']:.0f} tokens/s, {record['memory_gb']:.1f} GB",
        refresh=False,
    )
    bar.update()


def draw_losses(folder: Path) -> None:
    """loss.png from metrics.jsonl."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label in (("loss", "training, by step"), ("validation_loss", "validation")):
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            marker = "o" if key == "validation_loss" else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per supervised token", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(folder / "loss.png"):
        figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)
