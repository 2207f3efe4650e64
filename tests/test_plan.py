"""The planner against real objects: exact bytes of weights, adapters, optimizer and saved tensors."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from conftest import random_llama, tiny_config
from torch import Tensor, nn

from radllama import build
from radllama import plan as planner
from radllama import train as train_module
from radllama import zero as zero_module
from radllama.attention import row_attention
from radllama.checkpoint import load_model, save_model
from radllama.config import Config, parse_config, read_config
from radllama.dry_run import PackShape, Visit, meta_model, micro_step, visits_of, weights_of
from radllama.lora import add_lora
from radllama.model import Llama, LlamaConfig
from radllama.plan import GB, SHAPES, Machine, changed, estimated_pack, measured_pack, plan
from radllama.train import deepspeed_settings, start, start_engine
from radllama.zero import (
    Training,
    Zero,
    gathered_bytes,
    moments_of,
    offloaded_weights,
    phases_of_step,
    resident_of,
    weight_bytes,
)

ROOT = Path(__file__).parents[1]
PACK = PackShape(((7, -1), (20, 0), (13, 0), (5, -1), (30, 3)), 19, "test")


def job(method: str = "full", zero: dict[str, Any] | None = None, **training: Any) -> Config:
    raw: dict[str, Any] = {
        "model": {"path": "somewhere"},
        "method": method,
        "data": {"train": "nothing.jsonl"},
        "training": {"output": "run", "steps": 2, "dtype": "float32", "gradient_checkpointing": "off"} | training,
        "deepspeed": {"zero_optimization": zero or {"stage": 1}},
    }
    if method != "full":
        raw["lora"] = {"rank": 4, "alpha": 8}
    return parse_config(raw)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("layers", [2, 5])
def test_weights_are_those_of_the_loaded_model(tmp_path: Path, layers: int, double: bool) -> None:
    shape = tiny_config(num_hidden_layers=layers, hidden_size=64, intermediate_size=96)
    save_model(random_llama(shape), tmp_path)
    model = load_model(tmp_path, quantize="nf4", dtype=torch.float32, double_quant=double)
    add_lora(model, rank=4, alpha=8)
    config = changed(job("qlora"), [f"quantization.double_quant={str(double).lower()}"])
    short = replace(shape, num_hidden_layers=min(layers, 3))
    weights = weights_of(meta_model(config, short, torch.float32), layers)
    found = weight_bytes(weights, Zero.of(config, torch.float32), 1)
    real: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = "adapters" if "lora_" in name else "4-bit statistics" if name.endswith("statistics") else "4-bit codes"
        if parameter.dtype != torch.uint8 and kind != "adapters":
            kind = "embedding and head" if "embed" in name or "lm_head" in name else "weights"
        real[kind] = real.get(kind, 0) + parameter.numel() * parameter.element_size()
    assert found == real
    assert sum(w.numel * w.times for w in weights if w.trainable) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def real_kept(model: Llama, pack: PackShape) -> int:
    """Bytes of all storages that a real forward pass saves for the backward pass, the weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    tokens = torch.arange(pack.tokens)[None] % 90
    labels = torch.arange(pack.labels)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(
            tokens, positions=tokens, segments=torch.tensor(pack.segments), label_positions=labels + 5, labels=labels
        )
    assert out.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("pack", [PACK, PackShape(((11, -1), *[(40, 0)] * 6), 60, "test")], ids=["small", "large"])
@pytest.mark.parametrize("shape", [tiny_config(), tiny_config(hidden_size=64, num_hidden_layers=3)], ids=["C32", "C64"])
def test_kept_activations_are_those_that_a_real_pass_saves(method: str, pack: PackShape, shape: LlamaConfig) -> None:
    config = job(method)
    model = random_llama(shape)
    if method != "full":  # 4-bit layers keep nothing of their weight: what lora keeps of a frozen one is not counted
        add_lora(model, rank=4, alpha=8)
    layers = shape.num_hidden_layers
    found = micro_step(
        meta_model(config, shape, torch.float32), pack, layers=layers, checkpointing=False, device="cpu", grow=int
    )
    real = real_kept(model, pack)
    # Live at the end of a pass, and not saved: the last rows, integers, the losses. Saved and not live: views.
    assert found.kept == pytest.approx(real, rel=0.05)


def test_in_bf16_a_cpu_keeps_what_attention_computes_in_fp32() -> None:
    shape, layers = tiny_config(hidden_size=64, num_hidden_layers=3), 3
    pack = PackShape(((11, -1), *[(40, 0)] * 6), 60, "test")
    model = random_llama(shape).bfloat16()
    model.packed_attention = row_attention
    add_lora(model, rank=4, alpha=8)
    found = micro_step(
        meta_model(job("lora"), shape, torch.bfloat16), pack, layers=layers, checkpointing=False, device="cpu", grow=int
    )
    assert found.kept == pytest.approx(real_kept(model, pack), rel=0.05)


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("width", [0, 2, 40])
def test_three_layers_stand_for_all(method: str, checkpointing: bool, width: int) -> None:
    def run(real_layers: int) -> Any:
        model = meta_model(job(method), tiny_config(num_hidden_layers=real_layers), torch.float32)
        return micro_step(
            model, PACK, layers=8, checkpointing=checkpointing, device="cpu", grow=lambda numel: width * numel
        )

    run(8)  # RoPE's frequencies are computed once a shape
    run(3)
    assert run(3) == run(8)


def test_checkpointing_keeps_a_layers_input_alone() -> None:
    shape = tiny_config(num_hidden_layers=6)
    model = meta_model(job(), shape, torch.float32)

    def kept(layers: int) -> int:
        return micro_step(model, PACK, layers=layers, checkpointing=True, device="cpu", grow=int).kept

    kept(6)  # RoPE's frequencies are computed once a shape
    assert kept(7) - kept(6) == PACK.tokens * shape.hidden_size * 4


@pytest.mark.parametrize("optimizer", ["adamw"])
def test_optimizer_bytes_are_those_after_a_step(optimizer: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(96, 64))
    adam = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    adam.step()
    state = [value for value in adam.state[parameter].values() if value.dim()]
    assert moments_of(parameter.numel(), optimizer) == sum(value.numel() * value.element_size() for value in state)


def test_eight_bit_moments_are_bitsandbytes_own() -> None:
    import bitsandbytes as bnb

    parameter = torch.nn.Parameter(torch.randn(128, 96))
    adam = bnb.optim.AdamW8bit([parameter])
    adam.init_state(adam.param_groups[0], parameter, 0, 0)
    state = adam.state[parameter]
    real = sum(state[key].numel() * state[key].element_size() for key in ("state1", "state2", "absmax1", "absmax2"))
    assert moments_of(parameter.numel(), "adamw_8bit") == real


def storages() -> dict[int, int]:
    """Bytes of all tensors that Python knows, once for each address; compilers keep stand-ins, which are none."""
    found: dict[int, int] = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@contextmanager
def engine_of(config: Config, model: Llama) -> Iterator[Any]:
    """DeepSpeed's engine around a model in this process alone, after two steps."""
    place = start(config)
    try:
        model.packed_attention = row_attention
        model.model.gradient_checkpointing = config.training.gradient_checkpointing == "on"
        engine, _ = start_engine(config, model, place, deepspeed_settings(config, place, model.config))
        tokens, labels = torch.arange(PACK.tokens)[None] % 90, torch.arange(PACK.labels)
        for _ in range(2):
            losses = engine(
                tokens, positions=tokens, segments=torch.tensor(PACK.segments), label_positions=labels, labels=labels
            )
            engine.backward(losses.sum())
            del losses
            engine.step()
        yield engine
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_stays_is_what_an_engine_holds_after_a_step(stage: int, method: str) -> None:
    shape = tiny_config(hidden_size=64, intermediate_size=128, vocab_size=1024, num_hidden_layers=3)
    config = job(method, {"stage": stage})
    gc.collect()
    before = storages()
    model = random_llama(shape)
    if method != "full":
        add_lora(model, rank=4, alpha=8)
    weights = weights_of(meta_model(config, shape, torch.float32), 3)
    trainable = [w.numel * w.times for w in weights if w.trainable]
    with engine_of(config, model) as engine:
        bucket = engine.optimizer.reduce_bucket_size if stage else None
        gc.collect()
        real = sum(size for address, size in storages().items() if address not in before)
    zero = Zero.of(config, torch.float32)
    training = Training(sum(trainable), max(trainable), 2 if method == "full" else 1, 4, 1, 1, "adamw", "cpu")
    resident, host, disk = resident_of(training, zero)
    expected = sum(weight_bytes(weights, zero, 1).values()) + sum(resident.values())
    assert real == pytest.approx(expected, rel=0.02)
    assert bucket in (None, training.bucket(zero))
    assert not host
    assert not disk


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_visits_are_those_that_deepspeed_records(tmp_path: Path, method: str, checkpointing: str) -> None:
    shape = tiny_config(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    config = job(method, {"stage": 3}, gradient_checkpointing=checkpointing)
    save_model(random_llama(shape), tmp_path)
    model = load_model(tmp_path, quantize="nf4" if method == "qlora" else None, dtype=torch.float32)
    if method != "full":
        add_lora(model, rank=4, alpha=8)
    names = {parameter: name for name, parameter in model.named_parameters()}
    with engine_of(config, model) as engine:
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        modules = coordinator._PartitionedParameterCoordinator__submodule_order
        own = [
            [*module.parameters(recurse=False), *(p for _, p in module.ds_external_parameters())] for module in modules
        ]
    real = [sorted(names[parameter] for parameter in parameters) for parameters in own]
    short = meta_model(config, replace(shape, num_hidden_layers=3), torch.float32)
    visits = visits_of(short, PACK, layers=4, checkpointing=checkpointing == "on", device="cpu")

    def name(key: str) -> str:  # the middle layer's copies have numbers
        name, copy = key.split()
        return re.sub(r"layers\.\d+", f"layers.{copy}", name)

    found = [sorted(name(key) for key, *_ in visit.own) for visit in visits if visit.begins]
    assert found == real


def test_gathering_ahead_takes_flat_buffers_and_copies() -> None:
    """Four modules of 100 elements; two are fetched ahead, none is kept for its next use."""
    own = [((f"p{number}", 100, 400),) for number in range(4)]
    forward = [Visit(one, begins, 0.0) for one in own for begins in (True, False)]
    section = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 200}
    zero = Zero.of(job(zero=section | {"stage3_max_reuse_distance": 0}), torch.float32)
    # p0 alone, p1 and p2 ahead in one buffer; p0 goes; both are copied out of it, p3 comes; p1 goes; p2 and the buffer
    assert gathered_bytes(forward, zero, 2, "cuda") == [1200, 800, 2000, 1600, 800, 400, 400, 0]
    pairs = zip(gathered_bytes(forward, zero, 2, "cpu"), gathered_bytes(forward, zero, 2, "cuda"), strict=True)
    copies = [one - other for one, other in pairs]
    assert copies == [800, 800, 400, 400, 400, 400, 0, 0]  # gloo's
    assert gathered_bytes(forward, zero, 1, "cuda") == [1200, 800, 1200, 800, 800, 400, 400, 0]
    capped = replace(zero, live=200)
    assert gathered_bytes(forward, capped, 2, "cuda") == [800, 400, 800, 400, 800, 400, 400, 0]


def terms(stage: int, *, ranks: int = 2, accumulation: int = 1, device: str = "cuda", **zero: Any) -> tuple[Any, Any]:
    config = job(zero={"stage": stage} | zero, dtype="bfloat16", accumulation=accumulation)
    training = Training(1_000_000, 200_000, 2, 2, ranks, accumulation, "adamw", device)
    return training, Zero.of(config, torch.bfloat16)


def test_zero_splits_what_its_stage_says() -> None:
    one, *_ = resident_of(*terms(1, ranks=1))
    two, *_ = resident_of(*terms(1, ranks=4))
    assert one == {"fp32 master weights": 4_000_000, "optimizer moments": 8_000_000}
    assert two == {key: size // 4 for key, size in one.items()}
    device, host, disk = resident_of(*terms(2, offload_optimizer={"device": "cpu"}))
    assert set(device) == {"DeepSpeed's offload buffer"}
    assert host["fp32 master weights"] + host["optimizer moments"] + host["fp32 gradients"] == 16 * 500_000
    assert disk == 0
    assert resident_of(*terms(3, offload_optimizer={"device": "nvme", "nvme_path": "d"}))[2] == 16 * 500_000
    assert Zero.of(job(zero={"stage": 0}, dtype="bfloat16"), torch.bfloat16).stage == 1  # as train does
    assert phases_of_step(*terms(2))["optimizer step"]["gradients"] == 4 * 500_000


def test_parameters_on_a_disk_leave_their_buffers_on_the_host() -> None:
    def found(size: int = 2_000_000, **options: Any) -> tuple[dict[str, int], int]:
        return offloaded_weights(*terms(3, offload_param={"device": "nvme", "nvme_path": "d"} | options), size, 300_000)

    assert zero_module.SWAP_BUFFERS == build.BUFFERS
    assert found() == ({"weights": 1_000_000, "parameters' swap buffers": 10 * 2 * 150_000}, 1_000_000)
    assert found(max_in_cpu=0) == ({"weights": 0, "parameters' swap buffers": 10 * 2 * 150_000 + 1_000_000}, 2_000_000)
    assert found(buffer_count=20, buffer_size=400_000)[0]["parameters' swap buffers"] == 20 * 2 * 400_000
    assert offloaded_weights(*terms(3, offload_param={"device": "cpu"}), 7, 3) == ({"weights": 7}, 0)
    host = resident_of(*terms(3, offload_optimizer={"device": "nvme", "nvme_path": "d", "buffer_count": 5}))[1]
    assert host["swap buffers"] == 5 * 4 * 500_000
    section, swapping = "deepspeed.zero_optimization", '{"device":"nvme","nvme_path":"d"}'
    keys = [f"{section}.stage=3", f"{section}.offload_param={swapping}"]
    config = changed(read_config(ROOT / "configs/llama3-8b-full-8gpu.json"), keys)
    planned = plan(config, SHAPES["llama3-8b"], Machine(8, 80 * GB, "cuda"), PACK)
    assert planned.host["parameters' swap buffers"] >= 8 * 10 * 2 * 128_256 * 4096 // 8


@pytest.mark.parametrize("multiplies", [True, False])
def test_the_dtype_is_the_one_that_training_chooses(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes in bf16 where it has products for it, and says so; another one in fp32."""
    for module in (planner, train_module):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: multiplies)
    config = job("qlora", dtype="auto")
    dtype, reason = train_module.choose_dtype(config, torch.device("cpu"))
    assert dtype == planner.dtype_of(config, "cpu") == (torch.bfloat16 if multiplies else torch.float32)
    assert "AVX512-BF16" in reason


def test_more_of_anything_takes_more() -> None:
    shape, pack = SHAPES["llama3-8b"], PackShape(((65, -1), *[(280, 0)] * 8), 400, "test")

    def total(settings: list[str], ranks: int = 8, pack: PackShape = pack, config: str = "llama3-8b-full-8gpu") -> int:
        job = changed(read_config(ROOT / f"configs/{config}.json"), settings)
        return plan(job, shape, Machine(ranks, 80 * GB, "cuda"), pack).total

    stage = "deepspeed.zero_optimization.stage="
    assert total([stage + "1"]) >= total([stage + "2"]) > total([stage + "3"])
    assert total([], ranks=4) > total([], ranks=8)
    off, on = "training.gradient_checkpointing=off", "training.gradient_checkpointing=on"
    longer = PackShape((*pack.segments, *[(280, 0)] * 8), 800, "test")
    assert total([off]) > total([on])
    assert total([off], pack=longer) > total([off])
    qlora = partial(total, ranks=1, config="llama3-8b-qlora-1gpu")
    assert qlora([]) < total([], ranks=1)
    layers = shape.num_hidden_layers * shape.hidden_size * (3 * shape.intermediate_size + 2.5 * shape.hidden_size)
    assert qlora(["quantization.keep_dequantized=true"]) - qlora([]) == 2 * layers  # bytes of bf16


def test_estimated_packs_follow_the_batch() -> None:
    config = job(batch_size=32, accumulation=2)
    one, two = (estimated_pack(config, ranks, tokens_per_report=345, prefix=65) for ranks in (1, 2))
    assert 0.45 < two.tokens / one.tokens < 0.6
    assert 32 * 280 / 2 < one.tokens < 32 * 345
    with pytest.raises(ValueError, match="batch_size: 32 reports cannot fill 32 ranks x 2"):
        estimated_pack(config, 32, tokens_per_report=345, prefix=65)
    with pytest.raises(ValueError, match="--prefix-tokens"):
        estimated_pack(config, 1, tokens_per_report=60, prefix=65)


def test_the_jobs_own_data_give_the_packs(tmp_path: Path) -> None:
    config = read_config(ROOT / "qlora.json")
    config = changed(
        config, [f"model.path={ROOT / 'assets/tiny-llama3'}", f"data.train={ROOT / 'assets/reports/train.jsonl'}"]
    )
    found = measured_pack(config, 1)
    assert found
    assert found.tokens > 32 * 60
    assert sum(prefix >= 0 for _, prefix in found.segments) == 32
    assert measured_pack(job(), 1) is None
    rows = [
        json.loads(line) | {"similar": ["No acute disease."]}
        for line in Path(config.data.train).read_text().splitlines()
    ]
    (tmp_path / "similar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = measured_pack(changed(config, [f"data.train={tmp_path / 'similar.jsonl'}", "data.similar=1"]), 1)
    assert asked
    assert asked.tokens >= found.tokens + 32 * 5  # what stands in every prompt


GPUS = {path.stem: int(path.stem.rpartition("-")[2][:-3]) for path in (ROOT / "configs").glob("llama3-*.json")}


@pytest.mark.parametrize("name", sorted(GPUS))
def test_shipped_configs_fit_the_gpus_in_their_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "llama3-70b" if "70b" in name else "llama3-8b"
    arguments = ["--config", str(ROOT / f"configs/{name}.json"), "--shape", shape, "--gpus", str(GPUS[name])]
    planner.main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["fits"]
    # Its comment names the figure with gradient checkpointing. Within 15 %: a better kernel need not change it.
    planner.main([*arguments, "--json", "--set", "training.gradient_checkpointing=on"])
    found = json.loads(capsys.readouterr().out)
    comment = " ".join(read_config(ROOT / f"configs/{name}.json").comment or [])
    said = re.search(r"about (\d+) GB a GPU", comment)
    assert said
    assert float(said[1]) == pytest.approx(found["total"] / GB, rel=0.15)


def test_says_what_to_change(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(ROOT / "configs/llama3-8b-full-1gpu.json")
    planner.main(["--config", file, "--shape", "llama3-8b", "--gpu-memory", "16GB"])
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "--set deepspeed.zero_optimization.stage=3" in out
    for arguments, message in (
        (["--gpu-memory", "lots", "--shape", "llama3-8b"], "--gpu-memory lots: expected a size such as 80GB"),
        (["--set", "model.path=./nowhere"], "model.path: ./nowhere: no such folder; make it, or give --shape"),
        (["--gpus", "0", "--shape", "llama3-8b"], "--gpus: expected at least 1, found 0"),
    ):
        with pytest.raises(SystemExit):
            planner.main(["--config", file, *arguments])
        assert message in capsys.readouterr().err
