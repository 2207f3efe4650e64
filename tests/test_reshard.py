"""reshard.py: partitions cut anew are the whole, cut; a run that goes on with other ranks goes on as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Runs, metrics
from safetensors.torch import load_file

from radllama.config import parse_config
from radllama.reshard import cut, obstacle
from radllama.resume import check_ranks, checksum


@pytest.mark.parametrize("numel", [1, 5, 12, 13])
def test_parts_are_cut_anew(numel: int) -> None:
    whole = torch.randn(numel)

    def parts(world: int, padding: float = 0.0) -> list[torch.Tensor]:
        size = -(-numel // world)
        return list(torch.cat([whole, torch.full((size * world - numel,), padding)]).split(size))

    for then in range(1, 6):
        for now in range(1, 6):
            expected = parts(now)
            found = [cut(parts(then, 9.0), numel, rank * len(part), len(part)) for rank, part in enumerate(expected)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def rewind(folder: Path, step: int) -> None:
    """As if the run had been killed after this step's checkpoint."""
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (folder / "checkpoints/latest").write_text(f"step_{step:08d}")
    shutil.rmtree(folder / "last")


def go_on(runs: Runs, method: str, stage: int, worlds: tuple[int, int], **more: Any) -> None:
    """Train on some ranks, cut the run off after step 3, go on with others: what each loads is what was saved, bit for
    bit, as DeepSpeed itself gathers it, and the run ends as the other ranks would have made it alone."""
    name = f"{method}-{stage}-{worlds[0]}-{worlds[1]}"
    options = {"steps": 6, "save_every": 3, "keep_checkpoints": 2, "validate_every": 6} | more
    if method != "full":
        options["dropout"] = 0.0  # drawn by step and rank
    zero = options.pop("zero", {})
    configs = [runs.config(output, method, stage, **options) for output in (name, f"{name}-alone")]
    for config in configs:
        raw = json.loads(config.read_text())
        raw["deepspeed"]["zero_optimization"] |= zero
        config.write_text(json.dumps(raw))
    folder, alone = runs.folder / name, runs.folder / f"{name}-alone"
    for config, world, where in ((configs[0], worlds[0], folder), (configs[1], worlds[1], alone)):
        job = runs.start(config, world=world, dump=f"{where}-dump" if stage else None)
        assert job.finish() == 0, job.text()
    rewind(folder, 3)
    job = runs.start(configs[0], "--resume", world=worlds[1], dump=f"{folder}-dump" if stage else None)
    assert job.finish() == 0, job.text()
    assert f"was written by {worlds[0]} ranks: cut anew for {worlds[1]}" in job.text()
    assert "resumed from step 3 of 6" in job.text()
    if stage:
        saved, loaded = (torch.load(f"{folder}-dump/{file}.pt") for file in ("saved-3", "loaded"))
        assert saved.keys() == loaded.keys()
        for key, tensors in saved.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, loaded[key], strict=True)), key
            assert all(float(tensor.abs().sum()) > 0 for tensor in tensors), key
    for a, b in zip(metrics(folder), metrics(alone), strict=True):
        for found, expected in zip(a, b, strict=True):
            assert found == (expected and pytest.approx(expected, rel=1e-3 if "dtype" not in more else 5e-2))
    if "dtype" not in more:
        expected, found = (load_file(next((run / "last").glob("*.safetensors"))) for run in (alone, folder))
        assert all(float((expected[k] - found[k]).norm() / expected[k].norm()) < 1e-2 for k in expected)


def test_a_run_of_two_ranks_goes_on_with_one(runs: Runs) -> None:
    go_on(runs, "lora", 1, (2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (4, 3)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_any_ranks_go_on_with_any_others(runs: Runs, method: str, stage: int, worlds: tuple[int, int]) -> None:
    go_on(runs, method, stage, worlds)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_also_with_bitsandbytes_moments(runs: Runs, stage: int) -> None:
    go_on(runs, "full", stage, (2, 3), optimizer="paged_adamw")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_also_in_half_precision_in_small_sub_groups_and_offloaded(runs: Runs, stage: int) -> None:
    zero: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero |= {"offload_param": {"device": "cpu"}, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
    go_on(runs, "full", stage, (3, 2), dtype="bfloat16", zero=zero)


@pytest.mark.parametrize(
    ("training", "zero", "reason"),
    [
        ({"optimizer": "adamw_8bit"}, {}, "training.optimizer adamw_8bit"),
        ({}, {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_optimizer to nvme"),
        ({}, {"round_robin_gradients": True}, "round_robin_gradients"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tmp_path: Path, training: dict[str, Any], zero: dict[str, Any], reason: str
) -> None:
    raw = {"model": {"path": "m"}, "method": "lora", "data": {"train": "t"}}
    config = parse_config(
        raw | {"training": {"output": "o", "steps": 1} | training, "deepspeed": {"zero_optimization": zero}}
    )
    (tmp_path / "checkpoints/step_00000003").mkdir(parents=True)
    facts = {"step": 3, "world": 2, "files": {}}
    manifest = tmp_path / "checkpoints/step_00000003/manifest.json"
    manifest.write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    check_ranks(config, tmp_path, world=2)
    with pytest.raises(ValueError, match=rf"step_00000003 was written by 2 ranks, and these are 4; with .*{reason}"):
        check_ranks(config, tmp_path, world=4)
    assert obstacle(parse_config(raw | {"training": {"output": "o", "steps": 1}})) is None
