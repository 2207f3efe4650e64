"""checkpoints/ in the run folder: what --resume continues from, whatever ended the run, and whenever.

    step_00000150/           DeepSpeed's files, and manifest.json with their sizes and checksums
    step_00000300.partial/   one being written: renamed once it is complete and on the disk
    latest                   the name of the last complete one; moves last

A checkpoint that does not match its manifest is passed over, with a note, for the one before. Older ones are removed
only when a newer one is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch.distributed

from radllama.config import Config
from radllama.files import read_json, replace_text, sync
from radllama.reshard import load_resharded, load_swapped, obstacle, swaps
from radllama.run import DATA_FILE, TrainingError, writing

logger = logging.getLogger("radllama")

MANIFEST, LATEST = "manifest.json", "latest"
SAMPLES, SAMPLE = 256, 2**16  # of a large file: places, and bytes at each
OF_RANK = re.compile(r"(?:zero_pp_rank_|/rank)(\d+)")


class Checkpoints:
    """The checkpoints of one run. All ranks call `save` and `load` together."""

    def __init__(self, folder: Path, *, rank: int, world: int, keep: int) -> None:
        self.folder, self.rank, self.world, self.keep = folder, rank, world, keep

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write what `load` needs to continue after `step` steps. Raises TrainingError where it cannot be written."""
        folder = self.folder / f"step_{step:08d}"
        partial = folder.with_name(folder.name + ".partial")
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            with writing(folder):
                engine.save_checkpoint(
                    str(self.folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True
                )
                files = {name: fingerprint(partial / name, sync=True) for name in self.own_files(partial)}
        except TrainingError:
            if self.world == 1:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        parts = everyones(files, self.world)
        if self.rank == 0:
            with writing(folder):
                files = {name: facts for part in parts for name, facts in part.items()}
                manifest = state | {"step": step, "world": self.world, "files": files}
                manifest["checksum"] = checksum(manifest)
                replace_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
                sync(partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
                sync(self.folder)
                replace_text(self.folder / LATEST, folder.name)
                sync(self.folder)
            self.remove_old(step)
        dist.barrier()

    def own_files(self, folder: Path) -> list[str]:
        """The files this rank has written, by the rank in their names; those without one are rank 0's."""
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        owners = [OF_RANK.search(f"/{name}") for name in names]
        return [name for name, owner in zip(names, owners, strict=True) if int(owner[1] if owner else 0) == self.rank]

    def remove_old(self, step: int) -> None:
        """Keep the last `keep` complete ones up to `step`, just written; later ones are of a past that was given up."""
        complete = [path for path in self.complete() if int(path.name[5:]) <= step]
        for path in self.folder.glob("step_*"):
            if path not in complete[: self.keep]:
                shutil.rmtree(path, ignore_errors=True)

    def complete(self) -> list[Path]:
        """Those that were written to their end, newest first."""
        found = [path for path in self.folder.glob("step_*") if path.name[5:].isdigit() and (path / MANIFEST).exists()]
        return sorted(found, reverse=True)

    def load(self, engine: Any) -> dict[str, Any] | None:
        """Put the last good checkpoint into the engine; returns its manifest. None where none was ever complete.

        Raises ValueError where there are some and none is whole.
        """
        names = [path.name for path in self.candidates()] if self.rank == 0 else []
        names = everyones(names, self.world)[0]  # one listing for all: folders on a network lag behind
        for name in names:
            faults = [fault for part in everyones(self.faults(self.folder / name), self.world) for fault in part]
            if not faults:
                return self._load(engine, self.folder / name)
            if self.rank == 0:
                logger.warning("%s is damaged and passed over: %s", self.folder / name, "; ".join(faults))
        if names:
            raise ValueError(f"--resume: no checkpoint in {self.folder} is whole; restore one, or start a new run")
        return None

    def candidates(self) -> list[Path]:
        """Complete checkpoints, in the order in which to try them: `latest`, then older ones."""
        for path in sorted(self.folder.glob("step_*.partial")):
            logger.warning("%s was never completed; it is ignored", path)
        complete, file = self.complete(), self.folder / LATEST
        latest = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
        if complete and latest not in [path.name for path in complete]:
            logger.warning("%s names no complete checkpoint; %s is the newest", file, complete[0].name)
            return complete
        return [path for path in complete if path.name <= latest]

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files."""
        try:
            files = read_manifest(folder)["files"]
        except (OSError, ValueError) as error:
            return [f"{MANIFEST}: {error}"]
        shares = [name for number, name in enumerate(sorted(files)) if number % self.world == self.rank]
        wrong = []
        for name in shares:
            try:
                size = (folder / name).stat().st_size
                if size != files[name]["bytes"]:
                    wrong.append(f"{name} has {size} bytes in place of {files[name]['bytes']}")
                elif fingerprint(folder / name) != files[name]:
                    wrong.append(f"{name} has another checksum")
            except OSError as error:
                wrong.append(f"{name}: {error.strerror}")
        return wrong

    def _load(self, engine: Any, folder: Path) -> dict[str, Any]:
        manifest = read_manifest(folder)
        if manifest["world"] != self.world:
            if self.rank == 0:
                logger.info("%s was written by %d ranks: cut anew for %d", folder, manifest["world"], self.world)
            load_resharded(engine, folder, then=manifest["world"], rank=self.rank, world=self.world)
            return manifest
        if swaps(engine):
            load_swapped(engine, folder, rank=self.rank)
            return manifest
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=folder.name, load_module_strict=False)
        if loaded is None:
            raise ValueError(f"--resume: DeepSpeed cannot load {folder}; remove it to continue from the one before")
        return manifest


def check_ranks(config: Config, folder: Path, world: int) -> None:
    """ValueError where a run folder's checkpoints are of another number of ranks, and cannot be cut for this one."""
    reason = obstacle(config)
    for manifest in sorted(folder.glob(f"checkpoints/step_*/{MANIFEST}"), reverse=bool(reason)):
        try:
            then = read_manifest(manifest.parent)["world"]
        except (OSError, ValueError):
            continue  # damaged: passed over with the rest of it
        if reason and then != world:
            raise ValueError(
                f"--resume: {manifest.parent} was written by {then} ranks, and these are {world}; with {reason}, a run "
                f"continues on as many ranks as it had: start {then}"
            )


def check_data(config: Config, folder: Path, source: Path, *, rank: int, world: int) -> None:
    """Data and base model must be those the run began with, on every rank: a step's reports are drawn by their number,
    and a checkpoint holds no frozen weights.

    Their fingerprints stand in the run folder. ValueError names what differs. `source`: the base model's folder.
    """
    paths = {"data.train": Path(config.data.train), "model.path": source}
    if config.data.validation:
        paths["data.validation"] = Path(config.data.validation)
    mine = {key: model_fingerprint(path) if path == source else fingerprint(path) for key, path in paths.items()}
    for number, theirs in enumerate(everyones(mine, world)):
        for key in mine:
            if theirs[key] != mine[key]:
                raise ValueError(f"{key}: rank {number} reads something else than rank {rank} under this name")
    file = folder / DATA_FILE
    before = read_json(file) if file.exists() else mine
    for key in mine:
        if before.get(key) != mine[key]:
            raise ValueError(f"{key}: {paths[key]} has changed since this run began; restore it, or start a new run")
    if rank == 0 and not file.exists():
        with writing(file):
            replace_text(file, json.dumps(mine, indent=1) + "\n")


def everyones(value: Any, world: int) -> list[Any]:
    """The values of all ranks, in their order."""
    values: list[Any] = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def fingerprint(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size and checksum of a file's content; with `sync`, written through to the disk before."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """Size and checksum of a model's weights, config and tokenizer; of large files 256 samples of 64 KiB each."""
    patterns = ("*.safetensors", "config.json", "tokenizer*")
    digest, total = hashlib.blake2b(digest_size=16), 0
    for file in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        size = file.stat().st_size
        total += size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for place in range(0, size, max(SAMPLE, size // SAMPLES)):
                content.seek(place)
                digest.update(content.read(SAMPLE))
    return {"bytes": total, "blake2b": digest.hexdigest()}


def checksum(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError where it is not what `save` wrote."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != checksum(manifest):
        raise ValueError("its own checksum is another")
    if manifest["step"] != int(folder.name.removeprefix("step_")):
        raise ValueError(f"it is of step {manifest['step']}")
    return manifest
