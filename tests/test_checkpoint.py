"""Model folders: against transformers in both directions, against a ledger of reads, and with every part spoilt."""

from __future__ import annotations

import itertools
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
import transformers
from conftest import random_llama, tiny_config
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from radllama import checkpoint, lora
from radllama.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Quantize,
    WeightFiles,
    atomic_folder,
    find_model,
    load_model,
    main,
    save_model,
    write_model,
)
from radllama.lora import ALL_LINEAR, add_lora, load_adapter, lora_layers, lora_parameters, merge_lora, save_adapter
from radllama.model import Llama, LlamaConfig
from radllama.quant import STATE_KEY, Linear4bit

CONFIG = tiny_config(hidden_size=64, intermediate_size=128, head_dim=16)
TIED = tiny_config(hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=True)
TOKENS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(3))
SMALL = 20_000  # bytes a shard: a dozen shards
Edit = Callable[[Path], Any]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random fp32 weights, in one file; tests read it only."""
    path = tmp_path_factory.mktemp("whole") / "model"
    save_model(random_llama(CONFIG), path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in many shards, to be spoilt."""
    save_model(random_llama(CONFIG), tmp_path / "sharded", max_shard_bytes=SMALL)
    return tmp_path / "sharded"


@pytest.fixture(scope="session")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a random B for that model."""
    model, path = load_model(folder, dtype=torch.float32), tmp_path_factory.mktemp("lora") / "adapter"
    add_lora(model, rank=4, alpha=16, targets=("q_proj", "down_proj"))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    save_adapter(model, path, base_model="owner/base")
    return path


def hf_model(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """transformers' model, in train(): in eval(), bitsandbytes repacks 4-bit weights for a kernel in bf16."""
    model: nn.Module = transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return model.train()


def four_bit(quant_type: str, double_quant: bool, dtype: torch.dtype, **options: Any) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


def assert_same_logits(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-5) -> None:
    found, expected = ours(TOKENS), theirs(TOKENS)
    expected = expected if isinstance(expected, Tensor) else expected.logits
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, path / SINGLE_FILE, metadata={"format": "pt"})


def edit_index(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def apply(path: Path) -> None:
        index = json.loads((path / INDEX_FILE).read_text())
        edit(index["weight_map"])
        (path / INDEX_FILE).write_text(json.dumps(index))

    return apply


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, SMALL], ids=["one file", "shards"])
def test_round_trip(config: LlamaConfig, dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path) -> None:
    model = random_llama(config).to(dtype)
    save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    again = load_model(tmp_path / "model", dtype=dtype)
    assert again.config == config
    assert_same_weights(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == config.tie_word_embeddings
    assert torch.equal(again(TOKENS), model(TOKENS))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_shards_and_index(shards: Path) -> None:
    index = json.loads((shards / INDEX_FILE).read_text())
    names = sorted(file.name for file in shards.glob("*.safetensors"))
    count = len(names)
    assert count > 5
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert {file.name for file in shards.iterdir()} == {*names, INDEX_FILE, "config.json"}
    placed = {name: file for file in names for name in load_file(shards / file)}
    assert index["weight_map"] == placed
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in stored(shards).values())
    for file in names:
        sizes = [4 * tensor.numel() for tensor in load_file(shards / file).values()]
        assert sum(sizes) <= SMALL or len(sizes) == 1


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_while_loading(file_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_llama(CONFIG).to(file_dtype)
    save_model(model, tmp_path / "model")
    assert_same_weights(load_model(tmp_path / "model", dtype=dtype), model.to(dtype))


@pytest.mark.parametrize("four_bits", [False, True])
def test_weights_are_no_view_of_the_file(four_bits: bool, tmp_path: Path) -> None:
    """What happens to the file later is nothing to the model."""
    expected = random_llama(CONFIG)
    save_model(expected, tmp_path / "model")
    if four_bits:
        expected = load_model(tmp_path / "model", quantize="nf4", dtype=torch.float32)
        save_model(expected, tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32)
    file = tmp_path / "model" / SINGLE_FILE
    with file.open("r+b") as handle:  # in place: a mapped page would change, and truncating would end the process
        handle.write(bytes(file.stat().st_size))
    assert_same_weights(model, expected)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, SMALL], ids=["one file", "shards"])
def test_transformers_reads_what_we_write(config: LlamaConfig, max_shard_bytes: int, tmp_path: Path) -> None:
    model = random_llama(config)
    save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_size", ["5GB", SMALL], ids=["one file", "shards"])
def test_we_read_what_transformers_writes(config: LlamaConfig, max_shard_size: Any, tmp_path: Path) -> None:
    save_model(random_llama(config, seed=4), tmp_path / "ours")
    theirs = hf_model(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (tmp_path / "theirs" / INDEX_FILE).exists() == (max_shard_size == SMALL)
    ours = load_model(tmp_path / "theirs", dtype=torch.float32)
    assert ours.config == config
    assert_same_logits(ours, theirs)


# ---------------------------------------------------------------- four bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "double_quant"), itertools.product(("nf4", "fp4"), (True, False)))
def test_we_read_transformers_four_bit_models(
    quant_type: Quantize, double_quant: bool, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    """Its file, our quantiser and our writer: the same bytes and the same logits."""
    theirs = hf_model(folder, dtype, quantization_config=four_bit(quant_type, double_quant, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype=dtype)
    assert len(quantised(ours)) == 14
    kinds = {(layer.quant_type, layer.double_quant) for layer in quantised(ours).values()}
    assert kinds == {(quant_type, double_quant)}
    assert_same_logits(ours, theirs)
    on_the_way_in = load_model(folder, quantize=quant_type, double_quant=double_quant, dtype=dtype)
    assert_same_weights(on_the_way_in, ours)
    assert quantised(ours).keys() == {name for name, _ in ours.named_modules() if name.endswith("_proj")}
    save_model(on_the_way_in, tmp_path / "ours")
    found, expected = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert_same_logits(on_the_way_in, hf_model(tmp_path / "ours", dtype))


def quantised(model: nn.Module) -> dict[str, Linear4bit]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_quantize_writes(quant_type: Quantize, tied: bool, tmp_path: Path) -> None:
    save_model(random_llama(TIED if tied else CONFIG), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    command = ["quantize", "--model", tmp_path / "model", "--output", tmp_path / "small"]
    run([*command, "--type", quant_type, "--dtype", "float32"])
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"
    expected = load_model(tmp_path / "model", quantize=quant_type, dtype=torch.float32)
    assert_same_weights(load_model(tmp_path / "small", dtype=torch.float32), expected)
    theirs = hf_model(tmp_path / "small")
    layer = theirs.get_submodule("model.layers.1.mlp.down_proj")
    assert type(layer).__module__.startswith("bitsandbytes")
    assert torch.equal(layer.weight.data, expected.get_submodule("model.layers.1.mlp.down_proj").weight)
    assert_same_logits(expected, theirs)


def test_codes_stored_as_bf16(folder: Path, tmp_path: Path) -> None:
    options = {"bnb_4bit_quant_storage": torch.bfloat16}
    theirs = hf_model(folder, torch.bfloat16, quantization_config=four_bit("nf4", True, torch.bfloat16, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    assert stored(tmp_path / "theirs")["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert_same_weights(load_model(tmp_path / "theirs"), load_model(folder, quantize="nf4"))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_quantization_config(quant_type: Quantize, double_quant: bool, folder: Path, tmp_path: Path) -> None:
    """What transformers would write for this model; other readers than transformers go by it."""
    model = load_model(folder, quantize=quant_type, double_quant=double_quant)
    save_model(model, tmp_path / "small", max_shard_bytes=3000)
    found = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    expected = four_bit(quant_type, double_quant, torch.bfloat16, llm_int8_skip_modules=["lm_head"]).to_dict()
    assert found == {key: expected[key] for key in found}
    assert {key for key in expected if "4bit" in key and not key.startswith("_")} <= found.keys()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_four_bit_shards(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, quantize="nf4", dtype=torch.float32)
    save_model(model, tmp_path / "small", max_shard_bytes=3000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 5
    assert_same_weights(load_model(tmp_path / "small", dtype=torch.float32), model)
    assert_same_logits(model, hf_model(tmp_path / "small"))


def test_quantising_twice_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(load_model(folder, quantize="nf4"), tmp_path / "small")
    with pytest.raises(ValueError, match="stored in 4 bits already"):
        load_model(tmp_path / "small", quantize="nf4")
    error = fails(["quantize", "--model", tmp_path / "small", "--output", tmp_path / "out"], capsys)
    assert "stored in 4 bits already" in error
    assert not (tmp_path / "out").exists()


def test_four_bits_elsewhere_are_refused(folder: Path, tmp_path: Path) -> None:
    """An embedding in 4 bits is none that this model can look up; an incomplete layer is named."""
    model = load_model(folder, quantize="nf4", dtype=torch.float32)
    save_model(model, tmp_path / "small")
    tensors = load_file(tmp_path / "small" / SINGLE_FILE)
    embedding = Linear4bit.from_weight(tensors["model.embed_tokens.weight"]).tensors(torch.float32)
    odd = {f"model.embed_tokens.{key}": value for key, value in embedding.items()}
    odd |= {f"stray.{STATE_KEY}nf4": torch.zeros(3, dtype=torch.uint8)}
    save_file(tensors | odd, tmp_path / "small" / SINGLE_FILE)
    with pytest.raises(ValueError, match="disagree") as caught:
        load_model(tmp_path / "small")
    assert r"unexpected: model.embed_tokens.weight (4-bit)" in str(caught.value)
    assert f"unexpected: stray.{STATE_KEY}nf4" in str(caught.value)
    for name, message in (("weight", "'weight'"), ("weight.absmax", "'absmax'")):
        key = f"model.layers.1.mlp.up_proj.{name}"
        save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "small" / SINGLE_FILE)
        with pytest.raises(ValueError, match=rf"layer model\.layers\.1\.mlp\.up_proj: .*{message}"):
            load_model(tmp_path / "small")
    record = f"model.layers.1.mlp.up_proj.weight.{STATE_KEY}nf4"
    save_file(tensors | {record: torch.tensor([123], dtype=torch.uint8)}, tmp_path / "small" / SINGLE_FILE)
    with pytest.raises(ValueError, match="expected JSON with a shape"):
        load_model(tmp_path / "small")


def test_a_head_in_four_bits_is_read(folder: Path, tmp_path: Path) -> None:
    """Some checkpoints quantise it, too."""
    model = load_model(folder, dtype=torch.float32)
    head = Linear4bit.from_weight(model.lm_head.weight)
    tensors = stored(folder)
    del tensors["lm_head.weight"]
    copy(folder, tmp_path / "model")
    save_file(
        tensors | {f"lm_head.{k}": v for k, v in head.tensors(torch.float32).items()}, tmp_path / "model" / SINGLE_FILE
    )
    lora.replace_layer(model, "lm_head", head)
    assert torch.equal(load_model(tmp_path / "model", dtype=torch.float32)(TOKENS), model(TOKENS))


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for name, content in files_of(source).items():
        (target / name).write_bytes(content)
    return target


# ---------------------------------------------------------------- the ledger


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_every_tensor_is_read_once(
    quantize: Quantize | None, config: LlamaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(random_llama(config), tmp_path / "model", max_shard_bytes=SMALL)
    save_model(load_model(tmp_path / "model", quantize="nf4"), tmp_path / "small")
    reads: Counter[str] = Counter()
    original = WeightFiles.read

    def read(files: WeightFiles, name: str) -> Tensor:
        reads[name] += 1
        return original(files, name)

    monkeypatch.setattr(WeightFiles, "read", read)
    load_model(tmp_path / "model", quantize=quantize)
    assert reads == dict.fromkeys(stored(tmp_path / "model"), 1)
    reads.clear()
    load_model(tmp_path / "small")
    # the few bytes with a 4-bit layer's shape are looked at beforehand, as the shapes of the others are
    assert reads == {name: 2 if STATE_KEY in name else 1 for name in stored(tmp_path / "small")}


def test_all_that_does_not_fit_is_in_one_message(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "model")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.pop("model.layers.0.self_attn.q_proj.weight")
        tensors.pop("model.norm.weight")
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(96, 64)
        tensors["model.embed_tokens.weight"] = torch.zeros(99, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # old files have it; not a weight

    edit_tensors(path, spoil)
    with pytest.raises(ValueError, match=r"weights and config\.json disagree") as caught:
        load_model(path)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.0.self_attn.q_proj.weight",
        "  missing: model.norm.weight",
        "  unexpected: model.layers.0.self_attn.q_proj.bias",
        "  unexpected: model.layers.2.mlp.up_proj.weight",
        "  misshapen: model.embed_tokens.weight: config.json says (97, 64), the file (99, 64)",
        "  misshapen: model.layers.1.mlp.down_proj.weight: config.json says (64, 128), the file (96, 64)",
    ]
    assert str(path) in str(caught.value)


def test_a_long_list_is_cut(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path / "model")
    edit_tensors(path, lambda tensors: tensors.update({f"stray.{i}": torch.zeros(1) for i in range(50)}))
    with pytest.raises(ValueError, match=r"\.\.\. and 10 more"):
        load_model(path)


def test_four_bit_layers_of_another_shape(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder, quantize="nf4"), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 112}))
    with pytest.raises(ValueError, match="disagree") as caught:
        load_model(tmp_path / "small")
    assert (
        "misshapen: model.layers.1.mlp.up_proj.weight: config.json says (112, 64), the file (4-bit) (128, 64)"
        in str(caught.value)
    )


def test_a_tied_head_may_be_repeated(tmp_path: Path) -> None:
    save_model(random_llama(TIED), tmp_path / "model")
    assert "lm_head.weight" not in stored(tmp_path / "model")
    edit_tensors(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_model(tmp_path / "model", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_weights(model, random_llama(TIED))


# ---------------------------------------------------------------- bad files

SHARD = "model-00002-of-"
NORM = "model.layers.0.input_layernorm.weight"  # shares its shard with others


def shard(path: Path, number: int = 2) -> Path:
    return next(path.glob(f"model-{number:05d}-of-*"))


def truncate(path: Path) -> None:
    shard(path).write_bytes(shard(path).read_bytes()[:-100])


def point_elsewhere(where: str) -> Edit:
    return edit_index(lambda weight_map: weight_map.update({"model.norm.weight": where}))


def into_a_second_shard(path: Path) -> None:
    name, tensor = next(iter(load_file(shard(path)).items()))
    third = load_file(shard(path, 3))
    save_file(third | {name: tensor}, shard(path, 3))


SPOILERS: dict[str, tuple[Edit, str]] = {
    "shard missing": (lambda p: shard(p).unlink(), rf"{SHARD}.*: missing \({INDEX_FILE} lists it\)"),
    "shard truncated": (truncate, f"{SHARD}.*: truncated or not a safetensors file"),
    "shard empty": (lambda p: shard(p).write_bytes(b""), f"{SHARD}.*: truncated or not a safetensors file"),
    "shard garbage": (lambda p: shard(p).write_bytes(b"\x80\x02}q\x00." * 99), f"{SHARD}.*: truncated or not a safe"),
    "shard a folder": (lambda p: (shard(p).unlink(), (p / SHARD).mkdir(), (p / SHARD).rename(shard_name(p))), SHARD),
    "outside, relative": (point_elsewhere("../x.safetensors"), "this folder, found '../x.safetensors'"),
    "outside, deeper": (point_elsewhere("a/../../x.safetensors"), "this folder, found 'a/../../x.safetensors'"),
    "outside, absolute": (point_elsewhere("/etc/x.safetensors"), "this folder, found '/etc/x.safetensors'"),
    "sub-folder": (point_elsewhere("sub/x.safetensors"), "expected a .safetensors file in this folder"),
    "a pickle": (point_elsewhere("pytorch_model.bin"), "expected a .safetensors file in this folder"),
    "no name": (edit_index(lambda m: m.update({"model.norm.weight": 3})), "expected a .safetensors file"),
    "in two shards": (into_a_second_shard, "model-000.*does not place there"),
    "listed, not held": (
        edit_index(lambda m: m.update({"ghost.weight": shard_of(m)})),
        "lists tensors that its shards do not hold: ghost.weight",
    ),
    "held, not listed": (edit_index(lambda m: m.pop(NORM)), rf"holds {NORM}, which {INDEX_FILE} does not place there"),
    "index garbage": (lambda p: (p / INDEX_FILE).write_text("{"), f"{INDEX_FILE}: not valid JSON"),
    "index no text": (lambda p: (p / INDEX_FILE).write_bytes(b"\xff\xfe"), f"{INDEX_FILE}: not valid JSON"),
    "index without a map": (lambda p: (p / INDEX_FILE).write_text("{}"), "an object called weight_map"),
    "index a list": (lambda p: (p / INDEX_FILE).write_text("[1]"), "expected a JSON object"),
    "map a list": (lambda p: (p / INDEX_FILE).write_text('{"weight_map": ["a"]}'), "an object called weight_map"),
    "no index": (lambda p: (p / INDEX_FILE).unlink(), f"{SINGLE_FILE}: missing .expected it, or {INDEX_FILE}"),
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json: not found"),
}


def shard_name(path: Path) -> Path:
    names = json.loads((path / INDEX_FILE).read_text())["weight_map"].values()
    return path / next(name for name in names if name.startswith(SHARD))


def shard_of(weight_map: dict[str, str]) -> str:
    return next(iter(weight_map.values()))


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_spoilt_folders(spoiler: str, shards: Path) -> None:
    load_model(shards)
    spoil, message = SPOILERS[spoiler]
    spoil(shards)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(shards)
    assert str(shards) in str(caught.value)


def test_a_map_that_leaves_the_folder_reads_nothing_there(shards: Path) -> None:
    """Even where the file it points to is there and right."""
    shard(shards).rename(shards.parent / "x.safetensors")
    moved = set(load_file(shards.parent / "x.safetensors"))
    edit_index(lambda m: m.update(dict.fromkeys(moved, "../x.safetensors")))(shards)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file in this folder"):
        load_model(shards)


# ---------------------------------------------------------------- all or nothing


def tensors_that_fail(error: BaseException, config: LlamaConfig = CONFIG) -> Iterator[tuple[str, Tensor]]:
    for number, (name, parameter) in enumerate(random_llama(config).named_parameters()):
        if number == 9:
            raise error
        yield name, parameter.detach()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_an_error_while_writing_leaves_things_as_they_were(error: BaseException, there: bool, tmp_path: Path) -> None:
    if there:
        save_model(random_llama(CONFIG), tmp_path / "model")
    before = files_of(tmp_path)
    with pytest.raises(type(error)):
        write_model(tensors_that_fail(error), CONFIG, tmp_path / "model", max_shard_bytes=SMALL)
    assert files_of(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"model"} if there else set())


def test_a_new_model_replaces_the_old_one_whole(tmp_path: Path) -> None:
    save_model(random_llama(CONFIG), tmp_path / "model", max_shard_bytes=SMALL)
    save_model(random_llama(CONFIG, seed=1), tmp_path / "model")
    assert files_of(tmp_path).keys() == {f"model/{SINGLE_FILE}", "model/config.json"}
    assert_same_weights(load_model(tmp_path / "model", dtype=torch.float32), random_llama(CONFIG, seed=1))


def test_nothing_is_lost_where_a_process_ends_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.name == "a.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    def write() -> None:
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "new").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a"):  # the next run fails, too
        raise RuntimeError
    assert files_of(tmp_path) == {"a/old": b""}


def test_a_folder_is_on_the_disk_before_it_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the old one's removal must find the new one's content."""
    (tmp_path / "a").mkdir()
    done: list[tuple[str, str]] = []
    rename = Path.rename
    monkeypatch.setattr(checkpoint, "sync", lambda path: done.append(("sync", path.name)))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append(("rename", path.name)) or rename(path, to))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: done.append(("remove", path.name)))
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "original").mkdir()
        (folder / "original/file").touch()
    assert done[:2] == [("remove", "a.partial"), ("remove", "a.replaced")]
    assert set(done[2:5]) == {("sync", "original"), ("sync", "file"), ("sync", "a.partial")}
    assert done[5:] == [("rename", "a"), ("rename", "a.partial"), ("sync", tmp_path.name), ("remove", "a.replaced")]


def test_side_files_come_with_the_model_or_not_at_all(
    folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(folder, tmp_path / "model")
    sides = ["tokenizer.json", "tokenizer_config.json", "prompt.json", "generation_config.json"]
    sides += ["original/tokenizer.model"]
    for name in sides:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer_files").mkdir()
    (source / "notes.txt").write_text("private")
    command = ["quantize", "--model", source, "--output", tmp_path / "out"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "copyfile", full)
        assert "No space left" in fails(command, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    run(command)
    assert files_of(tmp_path / "out").keys() == {*sides, SINGLE_FILE, "config.json"}
    assert (tmp_path / "out" / "original" / "tokenizer.model").read_text() == "original/tokenizer.model"
    run(["merge", "--model", source, "--adapter", adapter, "--output", tmp_path / "merged"])
    assert files_of(tmp_path / "merged").keys() == files_of(tmp_path / "out").keys()
    (adapter / "prompt.json").write_text("the adapter's")
    run(["merge", "--model", source, "--adapter", adapter, "--output", tmp_path / "asked"])
    assert (tmp_path / "asked" / "prompt.json").read_text() == "the adapter's"


def test_shards_are_written_tensor_by_tensor_as_safetensors_reads_them(tmp_path: Path) -> None:
    """Every dtype, odd lengths between even ones: each tensor at a multiple of its element's size, nothing between."""
    generator = torch.Generator().manual_seed(4)
    dtypes = (torch.bfloat16, torch.uint8, torch.float32, torch.float16, torch.float64, torch.int8)
    tensors = {
        f"{number}.{str(dtype).rpartition('.')[2]}": (100 * torch.randn(shape, generator=generator)).to(dtype)
        for number, shape in enumerate([(3, 5), (4, 8), (), (7,), (1, 1, 3), (0, 4), (64, 32)])
        for dtype in dtypes
    }
    tensors["spread"] = torch.randn(6, 4, generator=generator).T
    write_model(tensors.items(), CONFIG, tmp_path / "model", max_shard_bytes=SMALL)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    found = stored(tmp_path / "model")
    assert len(files) > 1
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    for file in files:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = [entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"]
        assert length % 8 == 0
        for entry in entries:
            begin, end = entry["data_offsets"]
            assert begin % (int(entry["dtype"].strip("BFUI")) // 8) == 0 or begin == end


def test_a_full_header_begins_another_shard(tmp_path: Path) -> None:
    tensors = {f"{number}." + 150 * "x": torch.full((2,), float(number)) for number in range(500)}
    write_model(tensors.items(), CONFIG, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    assert {name: float(value[0]) for name, value in stored(tmp_path / "model").items()} == {
        name: float(value[0]) for name, value in tensors.items()
    }


def test_no_space_left(folder: Path, tmp_path: Path) -> None:
    """The real thing, in a process whose files may not grow beyond 50 kB: safetensors raises an error of its own."""
    script = f"""
import resource
from radllama.checkpoint import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
main(["quantize", "--model", {str(folder)!r}, "--output", {str(tmp_path / "out")!r}, "--dtype", "float32"])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert f"{SINGLE_FILE.split('.')[0]}-00001" in done.stderr
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def test_saving_refuses_what_loading_would_not_give_back(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    add_lora(model, rank=2, alpha=2)
    with pytest.raises(ValueError, match="merge_lora"):
        save_model(model, tmp_path / "a")
    tied = random_llama(TIED)
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight + 1)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        save_model(tied, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- memory

MEASURE = """
import json, os, sys, threading, time
import torch
from pathlib import Path
from radllama.checkpoint import load_model, merge_folder, save_model
from radllama.quant import Linear4bit

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def peak_of(work):
    peak = baseline = anonymous()
    done = threading.Event()
    def sample():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)
    sampler = threading.Thread(target=sample)
    sampler.start()
    result = work()
    done.set()
    sampler.join()
    return result, max(peak, anonymous()) - baseline

def load(quantize):
    Linear4bit.from_weight(torch.randn(512, 512).bfloat16())  # the first call imports and compiles: not the loader's
    model, peak = peak_of(lambda: load_model(sys.argv[1], quantize=quantize))
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    return {"peak": peak, "finished": sum(sizes), "largest": max(sizes)}

def merge():
    torch.randn(256, 64) @ torch.randn(64, 2048)  # the first product takes memory of its own
    source, adapter, target = map(Path, sys.argv[1:4])
    _, peak = peak_of(lambda: merge_folder(source, adapter, target, dtype=torch.bfloat16, max_shard_bytes=2**26))
    return {"peak": peak}

def save():
    model = load_model(sys.argv[1])
    return {"peak": peak_of(lambda: save_model(model, sys.argv[3] + "-saved", max_shard_bytes=2**26))[1]}

for work in (lambda: load(None), lambda: load("nf4"), merge, save):
    if os.fork() == 0:  # a process each: memory that the first one's allocator kept would hide the second one's need
        print(json.dumps(work()), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_while_loading_merging_and_saving(tmp_path: Path) -> None:
    """Peak anonymous memory, 246 MB of bf16 in four shards.

    The promise of loading is the finished model and two of its largest tensors. The sharper bound, half a tensor, would
    notice one copy; NF4 takes 3 to 26 MiB of it: a slice's scratch (5 MB), the next layer's codes, and what malloc
    keeps. Merging and saving promise a shard and a tensor; they hold one tensor (78 MiB) and some rows of it in fp32.
    """
    shape = {"vocab_size": 40_000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 3}
    config = tiny_config(**shape, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    tensors = ((name, torch.empty(size, dtype=torch.bfloat16).uniform_(-0.05, 0.05)) for name, size in names.items())
    write_model(tensors, config, tmp_path / "model", max_shard_bytes=64 * 2**20)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    with torch.device("meta"):
        adapted = Llama(config)
        add_lora(adapted, rank=8, alpha=16)
    for _, layer in lora_layers(adapted):
        for linear in (layer.lora_A, layer.lora_B):
            linear.weight = nn.Parameter(0.02 * torch.randn(linear.weight.shape))
    save_adapter(adapted, tmp_path / "adapter", base_model="model")
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("model", "adapter", "merged"))]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=environment() | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    plain, nf4, merge, save = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert plain["finished"] == sum(2 * size.numel() for size in names.values())
    assert nf4["finished"] < 0.8 * plain["finished"]
    for name, found in (("bf16", plain), ("nf4", nf4)):
        print(name, {key: f"{value / 2**20:.1f} MiB" for key, value in found.items()})
        assert found["peak"] > 0.9 * found["finished"]  # the sampler works
        assert found["peak"] <= found["finished"] + 2 * found["largest"]
        assert found["peak"] <= found["finished"] + found["largest"] / 2
    print("merge", merge, "save", save)
    assert 0.9 * plain["largest"] <= merge["peak"] <= plain["largest"] + 24 * 2**20
    assert save["peak"] <= 2**22
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 4
    assert stored(tmp_path / "merged-saved").keys() == names.keys()


# ---------------------------------------------------------------- where models come from


def hub_error(kind: type[Exception]) -> Exception:
    """An error as the hub's client raises it, whatever its constructor wants in this version."""
    error = kind.__new__(kind)
    error.args = ("hub says no",)
    return error


def test_find_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert find_model(str(folder)) == folder
    for name in (str(tmp_path / "nowhere"), "./nowhere", "../a", "~/model", "a/b/c", "nowhere"):
        with pytest.raises(ValueError, match="no such folder") as caught:
            find_model(name)
        assert name in str(caught.value)
    assert not calls  # none of these asks the network
    assert find_model("owner/name", revision="v1") == folder
    assert calls[0]["name"] == "owner/name"
    assert calls[0]["revision"] == "v1"
    patterns = calls[0]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern or "pt" in pattern.split(".")[-1] for pattern in patterns)  # nothing pickled


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub.GatedRepoError), "owner/name: a gated repository; accept its licence .* HF_TOKEN"),
        (hub_error(hub.RepositoryNotFoundError), r"owner/name: neither a folder .*\(RepositoryNotFoundError\)"),
        (hub_error(hub.RevisionNotFoundError), r"neither .*\(RevisionNotFoundError\)"),
        (hub_error(hub.LocalEntryNotFoundError), r"neither .*\(LocalEntryNotFoundError\)"),  # no network, not cached
        (hub_error(hub.OfflineModeIsEnabled), r"neither .*\(OfflineModeIsEnabled\)"),
        (hub_error(hub.HFValidationError), r"neither .*\(HFValidationError\)"),
        (ConnectionResetError(), r"neither .*\(ConnectionResetError\)"),
        (OSError(28, "No space left on device"), r"neither .*\(OSError\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_find_model_errors(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message):
        find_model("owner/name")
    assert "owner/name" in fails(["quantize", "--model", "owner/name", "--output", tmp_path / "out"], capsys)
    assert not list(tmp_path.iterdir())


def test_find_model_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own client, told to stay offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder here nor a repository that can be downloaded"):
        find_model("owner/name")


# ---------------------------------------------------------------- the command line


def run(command: list[Any]) -> None:
    main([str(argument) for argument in command])


def fails(command: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; exit code 2 and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(command)
    assert caught.value.code == 2
    output, error = capsys.readouterr()
    assert not output
    assert "error: " in error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_equals_merge_lora(quantize: Quantize | None, folder: Path, adapter: Path, tmp_path: Path) -> None:
    """From full precision and from 4 bits; every layer comes out in full precision."""
    source = folder
    if quantize:
        source = tmp_path / "small"
        save_model(load_model(folder, quantize=quantize, dtype=torch.float32), source)
    command = ["merge", "--model", source, "--adapter", adapter, "--output", tmp_path / "out", "--dtype", "float32"]
    run(command)
    merged = load_model(tmp_path / "out", dtype=torch.float32)
    assert not quantised(merged)
    expected = load_model(source, dtype=torch.float32)
    load_adapter(expected, adapter)
    assert_same_logits(merged, expected)
    names = {name for name, _ in lora_layers(expected)}
    assert len(names) == 4
    merge_lora(expected)
    for name, parameter in merged.named_parameters():
        layer = expected.get_submodule(name.removesuffix(".weight"))
        weight = layer.dequantize(torch.float32) if isinstance(layer, Linear4bit) else layer.weight
        assert torch.equal(parameter, weight), name
    assert_same_logits(merged, hf_model(tmp_path / "out"))
    with torch.no_grad():
        assert not torch.allclose(merged(TOKENS), load_model(source, dtype=torch.float32)(TOKENS), atol=0.01)


def test_merge_in_bf16(folder: Path, adapter: Path, tmp_path: Path) -> None:
    """From fp32 weights, summed in fp32, rounded once."""
    run(["merge", "--model", folder, "--adapter", adapter, "--output", tmp_path / "out"])
    expected = load_model(folder, dtype=torch.float32)
    load_adapter(expected, adapter)
    merge_lora(expected)
    assert_same_weights(load_model(tmp_path / "out"), expected.bfloat16())


def test_an_adapter_of_another_model_is_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(random_llama(tiny_config(num_hidden_layers=1)), tmp_path / "other")
    command = ["merge", "--model", tmp_path / "other", "--adapter", adapter, "--output", tmp_path / "out"]
    error = fails(command, capsys)
    assert "misshapen: model.layers.0.self_attn.q_proj.lora_A: expected (4, 32), found (4, 64)" in error
    assert "unexpected: model.layers.1.mlp.down_proj.lora_B" in error
    tied = random_llama(TIED)
    save_model(tied, tmp_path / "tied")
    add_lora(tied, rank=2, alpha=2, targets=("lm_head",))
    save_adapter(tied, tmp_path / "head", base_model="tied")
    command = ["merge", "--model", tmp_path / "tied", "--adapter", tmp_path / "head", "--output", tmp_path / "out"]
    assert "lm_head" in fails(command, capsys)
    assert not (tmp_path / "out").exists()


def test_inspect_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["inspect", folder])
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if not line.startswith("layers"))
    assert facts["hidden_size"] == "64"
    assert facts["num_key_value_heads"] == "2"
    assert facts["parameters"] == f"{sum(tensor.numel() for tensor in stored(folder).values()):,}"
    assert facts["tensors"] == "21 F32"


def test_inspect_four_bits(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(load_model(folder, quantize="nf4"), tmp_path / "small")
    run(["inspect", tmp_path / "small"])
    output = capsys.readouterr().out
    assert "layers in 4 bits         14\n" in output
    assert f"{sum(tensor.numel() for tensor in stored(folder).values()):,}" in output  # of the model, not of its file
    assert "7 BF16" in output


def test_inspect_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["inspect", adapter])
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    count = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert facts == {
        "kind": "LoRA adapter",
        "base": "owner/base",
        "rank": "4",
        "alpha": "16",
        "targets": "down_proj, q_proj",
        "layers": "4",
        "parameters": f"{count:,}",
    }


def test_bad_arguments(folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    for command, message in (
        ([], "required: command"),
        (["bake"], "invalid choice"),
        (["merge", "--model", folder, "--output", out], "--adapter"),
        (["quantize", "--model", folder, "--output", out, "--type", "int8"], "invalid choice: 'int8'"),
        (["quantize", "--model", folder, "--output", out, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["quantize", "--model", nowhere, "--output", out], f"{nowhere}: no such folder"),
        (["quantize", "--model", tmp_path, "--output", out], "config.json: not found"),
        (["quantize", "--model", folder, "--output", adapter], f"{adapter}: exists"),
        (["merge", "--model", folder, "--adapter", nowhere, "--output", out], "adapter_config.json"),
        (["merge", "--model", folder, "--adapter", folder, "--output", out], "adapter_config.json"),
        (["inspect", nowhere], str(nowhere)),
        (["inspect", tmp_path], str(tmp_path)),
    ):
        assert message in fails(command, capsys), command
    assert not list(tmp_path.iterdir())


def test_inspect_checks_the_weights(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(shards)
    assert "truncated or not a safetensors file" in fails(["inspect", shards], capsys)


def test_every_projection_is_quantised(folder: Path) -> None:
    layers = quantised(load_model(folder, quantize="nf4"))
    assert {name.rpartition(".")[2] for name in layers} == set(ALL_LINEAR)
    assert {layer.double_quant for layer in layers.values()} == {True}
