"""Steps whose loss or gradient cannot be trusted: found before the weights change, then skipped, or the end of the run.

Which reports they held goes to bad_steps.jsonl in the run folder: their ids, never their text.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from radllama.config import Training
from radllama.data import Pack
from radllama.files import some
from radllama.run import TrainingError, writing

BAD_STEPS_FILE = "bad_steps.jsonl"
WINDOW, ENOUGH = 32, 8  # good losses that say what is usual; the fewest that do
MOST_SKIPPED = 10  # in a row: then it is not the data


class Guard:
    """Judges every step by numbers that all ranks share, so that all decide alike."""

    def __init__(self, training: Training, optimizer: Any, *, gradients_of: list[nn.Parameter]) -> None:
        """`optimizer` is the one inside DeepSpeed's: it is kept from stepping while `hold` is set.

        `gradients_of`: parameters whose gradients nobody else checks (without ZeRO, DeepSpeed does not).
        """
        self.policy, self.spike = training.on_bad_loss, training.loss_spike
        self.recent: list[float] = []
        self.skipped = 0  # in a row
        self.hold = False
        self._parameters, self._step = gradients_of, optimizer.step
        optimizer.step = self._guarded

    def _guarded(self, *arguments: Any, **options: Any) -> Any:
        self.hold |= any(p.grad is not None and not p.grad.isfinite().all() for p in self._parameters)
        return None if self.hold else self._step(*arguments, **options)

    def judge(self, loss: float) -> str | None:
        """What is wrong with a step's loss, before the step; None: nothing. Sets `hold`."""
        fault = None
        if not math.isfinite(loss):
            fault = f"the loss is {loss}"
        elif self.spike and len(self.recent) >= ENOUGH and loss > self.spike * median(self.recent):
            fault = f"the loss is {loss:.4f}, {loss / median(self.recent):.1f} times the usual"
        self.hold = fault is not None
        if fault is None:
            self.recent = [*self.recent, loss][-WINDOW:]
        return fault

    def judge_gradient(self, norm: float | None, *, scaled: bool) -> str | None:
        """After the step; DeepSpeed leaves out one of infinite norm itself. `scaled`: fp16, where that is usual."""
        if self.hold or (norm is not None and not math.isfinite(norm) and not scaled):
            return "the gradient is not finite"
        self.skipped = 0
        return None

    def report(self, folder: Path | None, step: int, fault: str, loss: float, reports: list[tuple[str, float]]) -> str:
        """Write a bad step down (in `folder`, on one rank); TrainingError where the run must end.

        `reports`: id and mean loss of all of the step's reports. Returns what to tell the reader.
        """
        self.skipped += 1
        limit = self.spike * median(self.recent) if self.spike and len(self.recent) >= ENOUGH else math.inf
        ids = [name for name, value in reports if not math.isfinite(value)]
        ids = ids or [name for name, value in sorted(reports, key=lambda r: -r[1]) if value > limit]
        ids = ids or [name for name, _ in reports]
        stop = self.policy == "stop" or self.skipped >= MOST_SKIPPED
        if folder is not None:
            with writing(folder / BAD_STEPS_FILE), (folder / BAD_STEPS_FILE).open("a", encoding="utf-8") as file:
                action = "stopped" if stop else "skipped"
                value = loss if math.isfinite(loss) else None
                file.write(
                    json.dumps({"step": step, "fault": fault, "loss": value, "action": action, "ids": ids}) + "\n"
                )
                file.flush()
                os.fsync(file.fileno())
        told = f"step {step}: {fault}; reports: {some(ids)} ({BAD_STEPS_FILE})"
        if stop:
            often = f", the {self.skipped}th bad step in a row" if self.skipped > 1 else ""
            raise TrainingError(
                f"{told}{often}. The step was not taken; --resume starts from the "
                "last checkpoint, and with --set training.on_bad_loss=skip passes over such steps"
            )
        return f"{told}; skipped"

    def state(self) -> dict[str, Any]:
        return {"recent": self.recent, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        self.recent, self.skipped = list(state["recent"]), int(state["skipped"])


def mean_losses(losses: list[tuple[Pack, Tensor]]) -> list[tuple[str, float]]:
    """Id and mean token loss of every report in some packs; `losses`: a pack and its (N,) losses."""
    found = []
    for batch, values in losses:
        for number, name in enumerate(batch.ids):
            own = values[batch.owners.to(values.device) == number]
            found.append((name, float(own.mean()) if len(own) else 0.0))
    return found
