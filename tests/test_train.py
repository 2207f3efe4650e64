"""train.py: the loop end to end in one process and on two ranks, resume bit for bit, bad input, schedules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from conftest import random_llama, synthetic_examples, tiny_config
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, partitioned_param_swapper
from safetensors.torch import load_file

from radllama import build
from radllama import train as module
from radllama.checkpoint import load_model, save_model
from radllama.config import Config, parse_config
from radllama.lora import load_adapter
from radllama.resume import checksum, read_manifest
from radllama.tokenizer import Tokenizer
from radllama.train import TrainingError, learning_rate_at, train

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Make:
    """A folder with a tiny model and pairs, and configs over it."""
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    examples = synthetic_examples(40)
    for name, part in (("train", examples[:32]), ("validation", examples[32:])):
        rows = [{"id": e.id, "findings": e.findings, "impression": e.impression} for e in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(output: str, method: str = "qlora", stage: int = 1, **training: Any) -> dict[str, Any]:
        lora = {} if method == "full" else {"lora": {"rank": 4, "alpha": 8, "dropout": training.pop("dropout", 0.0)}}
        return lora | {
            "model": {"path": str(tmp_path / "base")},
            "method": method,
            "data": {
                "train": str(tmp_path / "train.jsonl"),
                "validation": str(tmp_path / "validation.jsonl"),
                "max_length": 512,
                "instructions": ["Derive the impression.", "What is the impression?"],
            },
            "training": {"output": str(tmp_path / output), "steps": 4, "learning_rate": 1e-2, "dtype": "float32"}
            | training,
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }

    return config


def records(folder: Path, *keys: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys if key in line} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_learns_and_leaves_a_complete_folder(make: Make, method: str) -> None:
    folder = train(parse_config(make("run", method, steps=40)))
    losses = [record["loss"] for record in records(folder, "loss") if record]
    assert losses[-1] < 0.8 * losses[0]
    for name in ("last", "best"):
        assert (folder / name / "prompt.json").exists()
        assert Tokenizer.from_dir(folder / name).encode("effusion")
    for name in ("config.json", "loss.png", "metrics.jsonl", "checkpoints/latest"):
        assert (folder / name).stat().st_size > 0
    source = Path(make("run")["model"]["path"])
    if method == "full":
        assert load_model(folder / "last", dtype=torch.float32).config == load_model(source).config
    else:
        load_adapter(load_model(source, dtype=torch.float32), folder / "last")
    assert not list(folder.rglob("*.partial"))
    text = (folder / "metrics.jsonl").read_text() + (folder / "config.json").read_text()
    assert "effusion" not in text  # no report text in logs


def test_weights_kept_dequantised_change_no_number(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    dequantize = bnb.dequantize_4bit

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return dequantize(*arguments)

    monkeypatch.setattr(bnb, "dequantize_4bit", counted)
    folders, counts = [], []
    for keep in (False, True):
        raw = make(f"keep-{keep}", steps=4, accumulation=2)
        folders.append(train(parse_config(raw | {"quantization": {"keep_dequantized": keep}})))
        counts.append(len(calls))
        calls.clear()
    weights_in_4bit = 7 * tiny_config().num_hidden_layers
    assert counts[1] < 2 * weights_in_4bit  # once each, and some where activations are measured beforehand
    assert counts[0] > 4 * 2 * weights_in_4bit  # forward in every micro-step, and nearly all of them backward
    keys = ("step", "loss", "validation_loss", "gradient_norm")
    assert records(folders[0], *keys) == records(folders[1], *keys)
    before, after = (weights(folder / "last") for folder in folders)
    assert all(torch.equal(after[key], before[key]) for key in before)


class Cut(BaseException):
    pass


def train_until(config: Config, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as a run that ends within the step after `last`."""

    def bomb(step: int, total: int, config: Config) -> float:
        if step == last:
            raise Cut
        return learning_rate_at(step, total, config)

    with monkeypatch.context() as patch:
        patch.setattr(module, "learning_rate_at", bomb)
        with pytest.raises(Cut):
            train(config)


@pytest.mark.parametrize(("method", "stage"), [("qlora", 1), ("full", 2), ("lora", 3)])
def test_resume_is_bit_exact(make: Make, monkeypatch: pytest.MonkeyPatch, method: str, stage: int) -> None:
    options: dict[str, Any] = {"steps": 7, "save_every": 3, "validate_every": 2}
    if method != "full":
        options["dropout"] = 0.2
    whole = train(parse_config(make("whole", method, stage, **options)))
    cut = parse_config(make("cut", method, stage, **options))
    train_until(cut, 5, monkeypatch)
    folder = train(cut, resume=True)
    keys = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")
    assert records(folder, *keys) == records(whole, *keys)
    for name in ("last", "best"):
        expected, found = weights(whole / name), weights(folder / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


RANKS = """
import json, sys
import deepspeed, deepspeed.comm as dist, torch
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
from radllama import train as module
from radllama.build import build_model
from radllama.config import parse_config
from radllama.train import Run, train

def loop(run, *arguments, **options):
    original(run, *arguments, **options)
    if run.config.method == "full":
        return
    # What is frozen (codes, statistics, embedding, norms) is as it was loaded, bit for bit
    loaded = build_model(run.config, run.source, device=run.place.device, dtype=run.place.dtype)
    for name, parameter in run.engine.module.named_parameters():
        if not parameter.requires_grad:
            expected = loaded.get_parameter(name)
            if run.engine.zero_optimization_stage() == 3:
                assert parameter.numel() == 0, name + " is whole between the steps"
                part = -(-expected.numel() // dist.get_world_size())
                assert parameter.ds_tensor.ds_numel == part, name
                parameter.all_gather()
            assert parameter.dtype == expected.dtype, name
            assert torch.equal(parameter.view(torch.uint8), expected.view(torch.uint8)), name
    (run.folder / f"checked-{dist.get_rank()}").touch()

original, Run.loop = Run.loop, loop
module.draw_losses = lambda folder: None  # takes longer than the training
for raw in json.load(open(sys.argv[-1])):
    train(parse_config(raw))
dist.destroy_process_group()
"""
# Every parameter is partitioned, however small, and let go as soon as it was used: forward, backward and recomputation
# each gather it. By default DeepSpeed would keep a model of this size whole.
GATHER_EACH_TIME = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_and_accumulation_equal_one(make: Make, tmp_path: Path, world: int) -> None:
    """The same steps on one rank and several, in one pack and several, at ZeRO 0 to 3, with and without recomputation.

    At the same ranks and accumulation the stages differ in the order of sums alone, if at all.
    """
    alone = {method: train(parse_config(make(f"alone-{method}", method, steps=3))) for method in ("qlora", "full")}
    accumulated = train(parse_config(make("accumulated", "qlora", steps=3, accumulation=4)))
    compare(alone["qlora"], accumulated)
    kinds = [("qlora", 0, 1, "off"), ("qlora", 2, 1, "off"), ("full", 1, 2, "off"), ("full", 2, 1, "off")]
    for accumulation in (1, 2):
        kinds += [("qlora", 1, accumulation, "off"), ("qlora", 3, accumulation, "off")]
        kinds += [("full", 0, accumulation, "off"), ("full", 3, accumulation, "off"), ("qlora", 3, accumulation, "on")]
    jobs = {kind: several(make, *kind) for kind in kinds}
    launch(tmp_path, world, list(jobs.values()))
    runs = {kind: Path(job["training"]["output"]) for kind, job in jobs.items()}
    for (method, stage, accumulation, _), run in runs.items():
        compare(alone[method], run)
        same = runs[method, 1 if method == "qlora" else 0, accumulation, "off"]
        for a, b in zip(records(same, "loss"), records(run, "loss"), strict=True):
            assert a == pytest.approx(b, rel=1e-5), (method, stage, accumulation)
        assert len(list(run.glob("checked-*"))) == (world if method == "qlora" else 0)


def several(make: Make, method: str, stage: int, accumulation: int, checkpointing: str) -> dict[str, Any]:
    name = f"{method}-{stage}-{accumulation}-{checkpointing}"
    training = {"steps": 3, "accumulation": accumulation, "gradient_checkpointing": checkpointing}
    job = make(name, method, stage, **training)
    if stage == 3:
        job["deepspeed"]["zero_optimization"] |= GATHER_EACH_TIME
    return job


def launch(folder: Path, world: int, jobs: list[dict[str, Any]]) -> None:
    """Train on so many ranks: all jobs one after the other, since starting is what takes long."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "ranks.py").write_text(RANKS)
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(world), "--master_port", str(module.free_port())]
    done = subprocess.run(
        [*command, str(folder / "ranks.py"), str(folder / "jobs.json")],
        env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def compare(one: Path, other: Path) -> None:
    for a, b in zip(records(one, "loss", "validation_loss"), records(other, "loss", "validation_loss"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    expected, found = weights(one / "last"), weights(other / "last")
    for key in expected:
        assert float((expected[key] - found[key]).norm() / expected[key].norm()) < 1e-2


def test_a_nan_loss_stops_before_the_step_and_names_reports(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(make("nan", save_every=2))
    forward = module.Run.forward

    def poisoned(run: module.Run, batch: Any) -> Any:
        losses = forward(run, batch)
        # the learning rate of step 4 is under way once the checkpoint of step 2 is there
        if (run.folder / "checkpoints/latest").exists() and run.engine.module.training:
            losses = losses * torch.where(batch.owners == 0, float("nan"), 1.0)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "forward", poisoned)
        with pytest.raises(TrainingError, match=r"step 3: the loss is nan; reports: r\d+ \("):
            train(config)
    folder = Path(config.training.output)
    assert (folder / "checkpoints/latest").read_text() == "step_00000002"
    assert len(records(train(config, resume=True), "loss")) == 5


@pytest.mark.parametrize(("method", "stage"), [("lora", 0), ("lora", 1), ("full", 2), ("lora", 3)])
def test_a_skipped_step_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch, method: str, stage: int) -> None:
    """A run whose second step is bad equals one in which that step is left out."""
    forward, step = module.Run.forward, module.Guard.judge
    config = make("bad", method, stage, steps=3, on_bad_loss="skip", accumulation=2)
    calls = iter(range(100))

    def poisoned(run: module.Run, batch: Any) -> Any:
        losses = forward(run, batch)
        return losses * float("nan") if run.engine.module.training and next(calls) == 3 else losses

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "forward", poisoned)
        bad = train(parse_config(config))
    numbers = iter(range(100))

    def left_out(guard: Any, loss: float) -> str | None:
        fault = step(guard, loss)
        guard.hold = next(numbers) == 1
        return "left out" if guard.hold else fault

    with monkeypatch.context() as patch:
        patch.setattr(module.Guard, "judge", left_out)
        clean = train(parse_config(config | {"training": config["training"] | {"output": str(bad) + "-clean"}}))
    expected, found = weights(clean / "last"), weights(bad / "last")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [record["loss"] is None for record in records(bad, "loss") if record] == [False, True, False]
    line = json.loads((bad / "bad_steps.jsonl").read_text())
    assert (line["step"], line["action"]) == (2, "skipped")
    assert 0 < len(line["ids"]) < config["training"].get("batch_size", 8)


@pytest.mark.parametrize(("step", "training"), [(2, True), (2, False), (4, True), (4, False)])
def test_a_signal_saves_before_the_validation_which_is_made_up_for(
    make: Make, monkeypatch: pytest.MonkeyPatch, step: int, training: bool
) -> None:
    """It comes within a step, or within the validation after it, which a grace of seconds may be too short for."""
    whole = train(parse_config(make("whole", validate_every=2, batch_size=4)))
    config, forward = parse_config(make("run", validate_every=2, batch_size=4)), module.Run.forward

    def interrupted(run: module.Run, batch: Any) -> Any:
        if (run.engine.global_steps + run.engine.module.training, run.engine.module.training) == (step, training):
            run.watch.signal = "SIGTERM"
        return forward(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "forward", interrupted)
        run = train(config)
    assert records(run, "step")[-1] == {"step": step}
    assert "validation_loss" not in records(run, "validation_loss")[-1]
    assert not (run / "last").exists()
    assert read_manifest(run / f"checkpoints/step_{step:08d}")["validation_due"]
    train(config, resume=True)
    keys = "step", "loss", "validation_loss"
    assert records(run, *keys) == records(whole, *keys)
    for name in ("best", "last"):
        expected, found = weights(whole / name), weights(run / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_ranks_recompute_activations_together(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank with too little free memory is enough: under ZeRO-3 what runs again is gathered again by all."""
    found = []

    def seen(config: Config, model: Any, place: Any, settings: Any) -> Any:
        found.append(model.model.gradient_checkpointing)
        raise ValueError("enough")

    monkeypatch.setattr(module, "start_engine", seen)
    for others in (False, True):
        monkeypatch.setattr(module, "everyones", lambda value, world, others=others: [value, others])
        with pytest.raises(ValueError, match="enough"):
            train(parse_config(make("run")))
    assert found == [False, True]


def test_a_run_that_ends_with_a_bad_step_is_written(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = module.Run.forward

    def poisoned(run: module.Run, batch: Any) -> Any:
        losses = forward(run, batch)
        return losses * float("nan") if run.engine.module.training and run.engine.global_steps == 3 else losses

    monkeypatch.setattr(module.Run, "forward", poisoned)
    run = train(parse_config(make("run", on_bad_loss="skip")))
    assert records(run, "loss")[3] == {"loss": None}
    assert f"| loss | {records(run, 'loss')[2]['loss']:.6g} |" in (run / "last/README.md").read_text()


def test_data_weights_reach_training_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make("run", steps=1)
    lines = [json.loads(line) for line in Path(raw["data"]["train"]).read_text().splitlines()]
    rows = [line | {"modality": "CT" if number % 4 == 0 else "CR"} for number, line in enumerate(lines)]
    Path(raw["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw["data"]["weights"] = {"modality": {"CT": 1e9}}
    seen: list[set[str]] = []
    original = module.Run.loop

    def spy(self: module.Run, training: Any, validation: Any, *, resume: bool) -> None:
        seen.extend([{row.id for row in training.step(0, 64)}, {row.id for row in validation.step(0, 64)}])
        original(self, training, validation, resume=resume)

    monkeypatch.setattr(module.Run, "loop", spy)
    train(parse_config(raw))
    assert seen[0] == {line["id"] for line in lines[::4]}
    assert len(seen[1]) == 8
    assert list((Path(raw["data"]["train"]).parent / ".radllama-cache").glob("*/header.json"))


def test_run_folders_are_protected(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        train(parse_config(make("run")), resume=True)
    train(parse_config(make("run", steps=1)))
    with pytest.raises(ValueError, match="continue it with --resume"):
        train(parse_config(make("run", steps=1)))
    with pytest.raises(ValueError, match=r"another config \(training\.steps\)"):
        train(parse_config(make("run", steps=2)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="not a run folder"):
        train(parse_config(make("mine")))


def test_ranks_that_cannot_go_on_are_refused_before_anything_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make("run", steps=2, optimizer="adamw_8bit")
    folder = train(parse_config(raw))
    manifest = folder / "checkpoints/step_00000002/manifest.json"
    facts = read_manifest(manifest.parent) | {"world": 3}
    manifest.write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "build_model", None)
    with pytest.raises(ValueError, match=r"written by 3 ranks, and these are 1; with .*adamw_8bit.*: start 3"):
        train(parse_config(raw), resume=True)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only, for root as well: over a mount of its own, empty at first."""
    folders: list[Path] = []

    def seal(folder: Path) -> None:
        folders.append(folder)
        if os.geteuid():
            folder.chmod(0o555)
            return
        commands = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]]
        if any(subprocess.run(command, capture_output=True).returncode for command in commands):
            pytest.skip("root can write everywhere, and may not mount here")

    yield seal
    for folder in folders:
        if os.geteuid():
            folder.chmod(0o755)
        else:
            subprocess.run(["umount", folder], capture_output=True)


def test_a_read_only_run_folder_is_an_error_at_the_start(
    make: Make, tmp_path: Path, read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(make("run", steps=2, save_every=1))
    folder = train(config)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "sealed").mkdir()
    read_only(folder)
    read_only(tmp_path / "sealed")
    monkeypatch.setattr(module, "build_model", None)  # nothing is loaded
    with pytest.raises(ValueError, match=rf"training\.output: nothing can be written to {folder} \(read-only\)"):
        train(config, resume=True)
    with pytest.raises(ValueError, match=r"training\.output: nothing can be written to .*/sealed \(read-only\)"):
        train(parse_config(make("sealed/deep/run")))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"device": "cuda"}}, "no CUDA GPU"),
        ({"training": {"batch_size": 2, "accumulation": 4}}, "cannot fill"),
        ({"data": {"max_length": 8}}, "data.max_length"),
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"model": {"path": "./nowhere"}}, "nowhere"),
    ],
)
def test_bad_input_leaves_nothing_behind(make: Make, changes: dict[str, Any], message: str) -> None:
    raw = make("bad")
    for section, values in changes.items():
        raw[section] |= values
    with pytest.raises(ValueError, match=message):
        train(parse_config(raw))
    assert not Path(raw["training"]["output"]).exists()


def test_the_command_line_says_what_is_wrong(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps(make("run")))
    with pytest.raises(SystemExit) as caught:
        module.main(["--config", str(tmp_path / "c.json"), "--set", "training.stpes=3"])
    assert caught.value.code == 2
    assert "training.stpes: unknown key" in capsys.readouterr().err


def test_learning_rate_schedules() -> None:
    def curve(schedule: str) -> list[float]:
        raw = {"model": {"path": "m"}, "method": "lora", "data": {"train": "t"}}
        training = {"output": "o", "steps": 10, "learning_rate": 1.0, "min_learning_rate": 0.1, "warmup": 0.2}
        config = parse_config(raw | {"training": training | {"schedule": schedule}})
        return [round(learning_rate_at(step, 10, config), 6) for step in range(10)]

    assert curve("constant") == [0.333333, 0.666667, *[1.0] * 8]
    assert curve("linear")[2:] == [round(0.1 + 0.9 * (8 - i) / 8, 6) for i in range(8)]
    cosine = curve("cosine")
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.55)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers(make: Make, optimizer: str) -> None:
    folder = train(parse_config(make("run", "lora", steps=6, optimizer=optimizer)))
    losses = [record["loss"] for record in records(folder, "loss") if record]
    assert losses[-1] < losses[0]


def test_fp16_scales_its_loss_and_follows_fp32_or_is_refused(make: Make) -> None:
    config = parse_config(make("half", dtype="float16"))
    if not get_accelerator().is_fp16_supported():  # CPUs without AVX512-FP16
        with pytest.raises(ValueError, match=r"^training\.dtype: this cpu does not compute in float16"):
            train(config)
        assert not Path(config.training.output).exists()
        return
    half = train(config)
    single = train(parse_config(make("single")))
    for a, b in zip(records(half, "loss"), records(single, "loss"), strict=True):
        assert a == pytest.approx(b, rel=5e-3)


OFFLOADED = [
    ("full", {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
    ("qlora", {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
]


@pytest.mark.parametrize(("method", "zero"), OFFLOADED, ids=["optimizer", "parameters"])
def test_offload_to_cpu_memory_changes_nothing(make: Make, method: str, zero: dict[str, Any]) -> None:
    raw = make("offloaded", method)
    raw["deepspeed"]["zero_optimization"] = zero
    compare(train(parse_config(make("plain", method))), train(parse_config(raw)))


@pytest.fixture
def wide(make: Make, tmp_path: Path) -> Make:
    """As `make`, with a model whose parameters, also in 4 bits, and adapters are of the size that DeepSpeed swaps."""
    shape = {"hidden_size": 768, "intermediate_size": 1024, "head_dim": 64}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
    tokenizer = Tokenizer.from_dir(tmp_path / "base")
    save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size, **shape, **heads)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")

    def config(output: str, method: str, zero: dict[str, Any], **training: Any) -> dict[str, Any]:
        raw = make(output, method, steps=3, learning_rate=1e-3, **training)
        if method != "full":
            raw["lora"] = {"rank": 128, "alpha": 128}
        return raw | {"deepspeed": {"zero_optimization": zero | {"stage3_param_persistence_threshold": 0}}}

    return config


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Bytes by kind and direction: ("params" | "optimizer", "in" | "out")."""
    counts: Counter[tuple[str, str]] = Counter()

    def counting(way: str, swap: Callable[..., None]) -> Callable[..., None]:
        def counted(handle: Any, tensors: list[torch.Tensor], paths: list[str]) -> None:
            for tensor, path in zip(tensors, paths, strict=True):
                counts["optimizer" if "optimizer" in path else "params", way] += tensor.nbytes
            swap(handle, tensors, paths)

        return counted

    for user in (partitioned_param_swapper, partitioned_optimizer_swapper):
        for way in ("in", "out"):
            name = f"swap_{way}_tensors"
            monkeypatch.setattr(user, name, counting(way, getattr(user, name)))
    return counts


def disk(tmp_path: Path, **options: Any) -> dict[str, Any]:
    return {"device": "nvme", "nvme_path": str(tmp_path / "disk")} | options


def both_on_disk(tmp_path: Path, method: str) -> dict[str, Any]:
    in_memory = {"max_in_cpu": 0} if method == "full" else {}  # by default DeepSpeed keeps 1e9 trainable elements there
    return {"stage": 3, "offload_param": disk(tmp_path, **in_memory), "offload_optimizer": disk(tmp_path)}


@pytest.mark.system  # libaio
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_is_swapped_to_disk_trains_as_zero_0_does(
    wide: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: Counter[tuple[str, str]], method: str
) -> None:
    plain = train(parse_config(wide("plain", method, {"stage": 0})))
    whole = train(parse_config(wide("whole", method, {"stage": 3})))
    assert not swapped
    disks = both_on_disk(tmp_path, method)
    for name, parts in (("both", list(disks)), ("optimizer", ["stage", "offload_optimizer"]), ("cut", list(disks))):
        swapped.clear()
        config = parse_config(wide(name, method, {key: disks[key] for key in parts}, save_every=2))
        if name == "cut":
            train_until(config, 2, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(module.Run, "loop", frozen_is_as_loaded(module.Run.loop))
            run = train(config, resume=name == "cut")
        kinds = ("params", "optimizer") if "offload_param" in parts else ("optimizer",)
        assert swapped.keys() == {(kind, way) for kind in kinds for way in ("in", "out")}
        assert min(swapped.values()) > 2 * 2**20
        assert not list((tmp_path / "disk").iterdir())  # the checkpoints have copies of what was there
        compare(plain, run)
        for a, b in zip(records(whole, "loss", "gradient_norm"), records(run, "loss", "gradient_norm"), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        expected, found = weights(whole / "last"), weights(run / "last")
        assert all(float((expected[key] - found[key]).norm() / expected[key].norm()) < 1e-4 for key in expected)


def frozen_is_as_loaded(loop: Callable[..., None]) -> Callable[..., None]:
    def checked(run: module.Run, *arguments: Any, **options: Any) -> None:
        loop(run, *arguments, **options)
        loaded = module.build_model(run.config, run.source, device=run.place.device, dtype=run.place.dtype)
        for name, parameter in run.engine.module.named_parameters():
            if not parameter.requires_grad:
                with module.gather([parameter]):
                    assert parameter.dtype == loaded.get_parameter(name).dtype, name
                    assert torch.equal(parameter, loaded.get_parameter(name)), name

    return checked


@pytest.mark.system
def test_ranks_that_swap_equal_one_that_does_not(wide: Make, tmp_path: Path) -> None:
    alone = {method: train(parse_config(wide(f"alone-{method}", method, {"stage": 0}))) for method in ("full", "qlora")}
    jobs = {method: wide(f"two-{method}", method, both_on_disk(tmp_path, method)) for method in alone}
    launch(tmp_path, 2, list(jobs.values()))
    for method, job in jobs.items():
        compare(alone[method], Path(job["training"]["output"]))


@pytest.mark.parametrize(
    ("key", "options", "libaio", "message"),
    [
        ("offload_param", {"buffer_size": 100}, True, r"offload_param\.buffer_size: 100 is too little .* use \d+, or"),
        ("offload_param", {"buffer_count": 5}, True, r"offload_param\.buffer_count: 5 is too little .* use 10, or"),
        (
            "offload_param",
            {"nvme_path": "/proc/nowhere"},
            True,
            r"offload_param\.nvme_path: nothing can be .*/nowh",
        ),
        (
            "offload_optimizer",
            {"nvme_path": "/proc/nowhere"},
            True,
            r"optimizer\.nvme_path: nothing can be .*/nowh",
        ),
        ("offload_optimizer", {}, False, r"offload_optimizer: nvme needs libaio .*apt install libaio-dev"),
        ("offload_param", {}, False, r"offload_param: nvme needs libaio .*apt install libaio-dev"),
    ],
)
def test_a_disk_that_cannot_be_swapped_to_is_refused_before_anything_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch, key: str, options: dict[str, Any], libaio: bool, message: str
) -> None:
    raw = make("run", "full")
    folder = Path(raw["training"]["output"])
    raw["deepspeed"]["zero_optimization"] = {"stage": 3, key: disk(folder.parent, **options)}
    monkeypatch.setattr(module, "build_model", None)
    monkeypatch.setattr(build.AsyncIOBuilder, "is_compatible", lambda builder: libaio)
    with pytest.raises(ValueError, match=rf"^deepspeed\.zero_optimization\..*{message}"):
        train(parse_config(raw))
    assert not folder.exists()


def test_deepspeeds_monitors_get_the_losses(make: Make, tmp_path: Path) -> None:
    raw = make("run")
    raw["deepspeed"]["csv_monitor"] = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    folder = train(parse_config(raw))
    lines = (tmp_path / "csv/job/Train_loss.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[1]) for line in lines] == [r["loss"] for r in records(folder, "loss") if r]
    assert (tmp_path / "csv/job/Validation_loss.csv").exists()


FULL_DISK = """
import resource, sys
from radllama import resume, train
save = resume.Checkpoints.save
def limited(checkpoints, engine, step, state):
    if step == 4:  # from here on no file may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, -1))
    save(checkpoints, engine, step, state)
resume.Checkpoints.save = limited
train.main(["--config", sys.argv[1], *sys.argv[2:]])
"""


def test_a_full_disk_keeps_the_last_checkpoint(make: Make, tmp_path: Path) -> None:
    raw = make("run", steps=6, save_every=2)
    (tmp_path / "c.json").write_text(json.dumps(raw))
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "c.json")]
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # left by runs in this process
    environment = {key: value for key, value in os.environ.items() if key not in launchers}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 1
    assert "checkpoints/step_00000004 cannot be written" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    folder = Path(raw["training"]["output"])
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_00000002"]
    resumed = train(parse_config(raw), resume=True)
    assert len(records(resumed, "loss")) == 7


def test_gradient_checkpointing_changes_nothing(make: Make) -> None:
    on, off = (train(parse_config(make(choice, gradient_checkpointing=choice))) for choice in ("on", "off"))
    assert records(on, "loss", "gradient_norm") == records(off, "loss", "gradient_norm")
