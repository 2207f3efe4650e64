"""Training runs as processes of their own, to be watched and killed; run_server.py starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT, random_llama, synthetic_examples, tiny_config

from radllama.checkpoint import save_model
from radllama.tokenizer import Tokenizer
from radllama.train import free_port

STEPS, SAVE_EVERY = 20, 3
TRAIN = ROOT / "radllama/train.py"


class Job:
    """A run of several ranks: of the server's, or of DeepSpeed's launcher (then `process` is its front end)."""

    def __init__(self, pid: int, log: Path, process: subprocess.Popen[bytes] | None = None) -> None:
        self.pid, self.log, self.process = pid, log, process

    def ended(self) -> bool:
        return Path(f"{self.log}.status").exists() if self.process is None else self.process.poll() is not None

    def launcher(self) -> int:
        """The process that has started the ranks."""
        return self.pid if self.process is None else self._with("deepspeed.launcher.launch")[0]

    def ranks(self) -> list[int]:
        """Process ids by rank; fewer while they are being started, or gone."""
        try:
            if self.process is None:
                return sorted(child.pid for child in psutil.Process(self.pid).children())
            return self._with("--local_rank=")
        except psutil.Error:
            return []

    def _with(self, word: str) -> list[int]:
        """Members with a word that begins so in their command line, ordered by that word."""
        found = [(part, pid) for pid in self.members() for part in psutil.Process(pid).cmdline()]
        return [pid for part, pid in sorted(found) if part.startswith(word)]

    def members(self) -> list[int]:
        """The living processes of the run: all in the launcher's session."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = self.pid in (process.pid, os.getsid(process.pid))  # it has no session of its own at first
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def wait(self, seconds: float = 120) -> float:
        """Until no process of the run is left; how long that took."""
        began = time.monotonic()
        while self.members():
            assert time.monotonic() - began < seconds, self.text()
            time.sleep(0.02)
        return time.monotonic() - began

    def finish(self) -> int:
        self.wait()
        if self.process is not None:
            return self.process.wait()
        return int(Path(f"{self.log}.status").read_text()) if self.ended() else -signal.SIGKILL

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Runs:
    """A tiny model, its reports and configs, and the server that trains on them."""

    def __init__(self, folder: Path, tokenizer_folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder, self.server, self.count = folder, server, 0
        tokenizer = Tokenizer.from_dir(tokenizer_folder)
        save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size)), folder / "base")
        tokenizer.save(folder / "base")
        examples = synthetic_examples(40)
        for name, part in (("train", examples[:32]), ("validation", examples[32:])):
            rows = [{"id": e.id, "findings": e.findings, "impression": e.impression} for e in part]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, output: str, method: str = "lora", stage: int = 1, **training: Any) -> Path:
        lora = {} if method == "full" else {"lora": {"rank": 4, "alpha": 8, "dropout": training.pop("dropout", 0.1)}}
        raw = lora | {
            "model": {"path": str(self.folder / "base")},
            "method": method,
            "data": {"train": str(self.folder / "train.jsonl"), "validation": str(self.folder / "validation.jsonl")},
            "training": {"output": str(self.folder / output), "steps": STEPS, "save_every": SAVE_EVERY,
                         "validate_every": 7, "learning_rate": 1e-2, "dtype": "float32"} | training,
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }  # fmt: skip
        file = self.folder / f"{output}.json"
        file.write_text(json.dumps(raw))
        return file

    def start(self, config: Path, *arguments: str, world: int = 2, **more: Any) -> Job:
        """By the server: in a fraction of a second."""
        job = {"arguments": ["--config", str(config), *arguments], "world": world, "log": str(self._log())} | more
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Job(int(self.server.stdout.readline()), Path(job["log"]))

    def launch(self, config: Path, *arguments: str, world: int = 2, script: Path = TRAIN) -> Job:
        """By DeepSpeed's launcher, as a user does: every process imports all anew."""
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # left by runs in this process
        environment = {key: value for key, value in os.environ.items() if key not in ranks}
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(world)]
        command += ["--master_port", str(free_port()), str(script), "--config", str(config), *arguments]
        log = self._log()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})  # fmt: skip
        return Job(process.pid, log, process)

    def _log(self) -> Path:
        self.count += 1
        return self.folder / f"{self.count}.log"


def steps_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len([line for line in file.read_text().splitlines() if '"loss"' in line]) if file.exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves behind, byte for byte."""
    names = ("last/adapter_model.safetensors", "best/adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def metrics(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "validation_loss", "gradient_norm")) for line in lines]


def until(condition: Any, job: Job, pause: float = 0.002) -> bool:
    """Wait for a condition; False where the run ended before."""
    while not condition():
        if job.ended():
            return False
        time.sleep(pause)
    return True
