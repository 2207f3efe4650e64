"""Predicted against measured memory on a CPU: real training runs, each in processes of its own.

    python bench/plan.py [--set calibration|held-out] [--case NAME] [--output FILE]
    python bench/plan.py --table                            # the README's table: computed, nothing is run

Measured: the most anonymous memory (RssAnon) of a training process, the largest rank's, above what it held after its
imports, from the start of train() to the end of its third step. Predicted: `radllama.plan` on the same config. The
constant of a CPU in plan.py (PROCESS) was fitted on the calibration set alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from radllama.checkpoint import save_model
from radllama.config import parse_config
from radllama.model import Llama, LlamaConfig
from radllama.plan import GB, SHAPES, Machine, Plan, estimated_pack, measured_pack, plan, render

ROOT = Path(__file__).parents[1]
SMALL = LlamaConfig(12288, 640, 1792, 8, 10, 5, 64)  # 55 M parameters, for full fine-tuning
WIDE = LlamaConfig(8192, 1024, 2816, 12, 16, 4, 64)  # 147 M, for LoRA and QLoRA
CODE = """
import sys, time
import radllama.train as train
anon = next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]
print("RssAnon", anon, flush=True)
train.main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Case:
    method: str
    stage: int
    ranks: int = 1
    batch: int = 8
    accumulation: int = 1
    checkpointing: str = "off"
    optimizer: str = "adamw"
    zero: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def shape(self) -> LlamaConfig:
        return SMALL if self.method == "full" else WIDE

    @property
    def name(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.zero.items() if not isinstance(value, dict))
        extra += " offload" if "offload_optimizer" in self.zero else ""
        parts = [self.method, f"zero{self.stage}", f"{self.ranks}x{self.accumulation}x{self.batch}"]
        parts += [f"checkpointing-{self.checkpointing}", self.dtype]
        return "/".join(parts) + ("" if self.optimizer == "adamw" else f"/{self.optimizer}") + extra


CALIBRATION = [
    Case("full", 1),
    Case("full", 2, ranks=2, batch=16, checkpointing="on"),
    Case("lora", 1, batch=12),
    Case("qlora", 1, batch=8, checkpointing="on"),
    Case("qlora", 2, batch=16),
    Case("lora", 1, ranks=2, batch=20, accumulation=2, checkpointing="on"),
    Case("full", 3, ranks=2, batch=12),
    Case("full", 2, batch=16),
    Case("full", 1, accumulation=2, batch=16, checkpointing="on"),
    Case("full", 2, ranks=2, accumulation=2, batch=32),
    Case("full", 3, ranks=2, batch=8),
    Case("full", 3, batch=8, checkpointing="on"),
    Case("full", 0, batch=8),
    Case("full", 1, dtype="bfloat16", batch=8),
    Case("lora", 2, ranks=2, batch=16, checkpointing="on"),
    Case("lora", 1, batch=24, accumulation=2),
    Case("qlora", 1, batch=24),
    Case("qlora", 2, ranks=2, batch=16),
    Case("qlora", 3, ranks=2, batch=8, checkpointing="on"),
    Case("full", 1, batch=12),
    Case("full", 0, ranks=2, batch=12),
    Case("full", 2, ranks=2, batch=24),
    Case("full", 3, ranks=2, accumulation=2, batch=16),
    Case("full", 1, dtype="bfloat16", batch=12, checkpointing="on"),
    Case("lora", 1, ranks=2, batch=16),
    Case("lora", 3, ranks=2, batch=8, checkpointing="on"),
    Case("qlora", 1, batch=16, accumulation=2),
    Case("qlora", 2, batch=12, checkpointing="on"),
    Case("qlora", 3, ranks=2, batch=12),
    Case("full", 2, batch=8, zero={"offload_optimizer": {"device": "cpu"}}),
    Case("qlora", 1, batch=8, optimizer="adamw_8bit"),
]
HELD_OUT = [
    Case("full", 1, ranks=2, batch=20),
    Case("full", 2, batch=12, accumulation=2, dtype="bfloat16", checkpointing="on"),
    Case("full", 3, ranks=3, batch=9, checkpointing="on"),
    Case("full", 0, ranks=2, batch=16, accumulation=2, checkpointing="on"),
    Case("full", 2, ranks=2, batch=12, zero={"offload_optimizer": {"device": "cpu"}}),
    Case("lora", 1, batch=10, checkpointing="on", optimizer="adamw_8bit"),
    Case("lora", 3, ranks=2, batch=12, accumulation=2),
    Case("lora", 2, batch=16, dtype="bfloat16"),
    Case("qlora", 1, ranks=2, batch=20, checkpointing="on"),
    Case("qlora", 3, ranks=2, batch=16),
    Case("full", 3, ranks=4, batch=8, checkpointing="on"),  # chosen after a term had been added for the third
    Case("full", 3, ranks=2, batch=6, checkpointing="on"),
]


def config_of(case: Case, model: Path, output: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "method": case.method,
        "data": {"train": str(ROOT / "assets/reports/train.jsonl"), "max_length": 512},
        "training": {
            "output": str(output),
            "steps": 3,
            "batch_size": case.batch,
            "accumulation": case.accumulation,
            "optimizer": case.optimizer,
            "gradient_checkpointing": case.checkpointing,
            "dtype": case.dtype,
            "device": "cpu",
        },
        "deepspeed": {"zero_optimization": {"stage": case.stage} | case.zero},
    }


def write_model(shape: LlamaConfig, folder: Path) -> Path:
    if not folder.exists():
        torch.manual_seed(0)
        save_model(Llama(shape).to(torch.bfloat16), folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "assets/tiny-llama3" / file, folder)
    return folder


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def baseline(rank: subprocess.Popen[str]) -> int:
    """What the process says that it holds after its imports."""
    assert rank.stdout
    line = next((line for line in rank.stdout if line.startswith("RssAnon ")), None)
    if line is None:
        raise RuntimeError("a rank ended within its imports")
    return int(line.split()[1])


def measure(case: Case, config: Path, output: Path) -> float:
    """The peak of the largest rank in bytes above its baseline."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = output.with_suffix(".log").open("w", encoding="utf-8")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, "--config", str(config)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        for rank in range(case.ranks)
    ]
    try:
        base = [baseline(rank) for rank in ranks]
        peaks, metrics, deadline = [0] * len(ranks), output / "metrics.jsonl", time.monotonic() + 500
        while True:
            seen = peaks
            for _ in range(20):
                seen = [max(peak, anonymous(rank.pid)) for peak, rank in zip(seen, ranks, strict=True)]
                time.sleep(0.002)
            if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 3:
                break  # these samples may be of the saving that follows
            peaks = seen
            if time.monotonic() > deadline or any(rank.poll() is not None for rank in ranks):
                raise RuntimeError(f"{case.name}: ended early; {Path(log.name).read_text(encoding='utf-8')[-2000:]}")
        return max(peak - start for peak, start in zip(peaks, base, strict=True)) * 1024
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def predict(config: dict[str, Any], case: Case) -> Plan:
    parsed = parse_config(config)
    packing = measured_pack(parsed, case.ranks)
    assert packing
    return plan(parsed, case.shape, Machine(case.ranks, 64 * GB, "cpu"), packing)


# The first that fits 80 GB is taken, from the fastest to the smallest.
LADDER = {
    "qlora": [("ZeRO-1", {"stage": 1})],
    "full": [
        ("ZeRO-2", {"stage": 2}),
        ("ZeRO-3", {"stage": 3}),
        ("ZeRO-2, optimizer on the host", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        ("ZeRO-3, optimizer on the host", {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
    ],
}


def cell(shape: str, method: str, ranks: int) -> str:
    """The first of the ladder that fits, or what is missing with the last."""
    raw = json.loads((ROOT / f"configs/{shape}-{method}-8gpu.json").read_text(encoding="utf-8"))
    raw["training"] |= {"batch_size": 16 * ranks, "gradient_checkpointing": "on"}
    text = ""
    for name, zero in LADDER[method]:
        config = parse_config(raw | {"deepspeed": {"zero_optimization": zero}})
        packing = estimated_pack(config, ranks, tokens_per_report=345, prefix=65)
        found = plan(config, SHAPES[shape], Machine(ranks, 80 * GB, "cuda"), packing)
        host = f", host {sum(found.host.values()) / GB:.0f} GB" if found.host else ""
        text = f"{found.total / GB:.0f} GB ({name}{host})"
        if found.fits:
            return text
    return f"does not fit: {text}"


def table() -> Iterator[str]:
    """The README's table: 16 reports a GPU in a step, one pack, gradient checkpointing, 80 GB."""
    yield "| | 1 GPU | 2 GPUs | 8 GPUs |"
    yield "|---|---|---|---|"
    for shape, method in itertools.product(SHAPES, LADDER):
        yield f"| {shape} {method} | {' | '.join(cell(shape, method, ranks) for ranks in (1, 2, 8))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--set", choices=["calibration", "held-out"], default="held-out")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="append the results here, a JSON object a line")
    parser.add_argument("--dry", action="store_true", help="predict only")
    parser.add_argument("--parts", action="store_true", help="show the prediction by part")
    parser.add_argument("--table", action="store_true", help="print the README's table instead")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table()))
        return
    cases = CALIBRATION if options.set == "calibration" else HELD_OUT
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(c for c in cases if not options.case or options.case in c.name):
            model = write_model(case.shape, Path(folder) / case.method.replace("qlora", "lora"))
            raw, output = config_of(case, model, Path(folder) / f"run-{number}"), Path(folder) / f"run-{number}"
            file = Path(folder) / f"{number}.json"
            file.write_text(json.dumps(raw), encoding="utf-8")
            predicted = predict(raw, case)
            measured = 0.0 if options.dry else measure(case, file, output)
            error = (predicted.total - measured) / measured if measured else 0.0
            facts = f"{predicted.pack.tokens:6} tokens  predicted {predicted.total / GB:6.3f} GB"
            print(f"{case.name:60} {facts}  measured {measured / GB:6.3f} GB  error {error:+6.1%}", flush=True)
            if options.parts:
                print(render(predicted, case.name), flush=True)
            if options.output:
                record = {"set": options.set, "case": case.name, "predicted": predicted.total, "measured": measured}
                with options.output.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(record) + "\n")
            shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
