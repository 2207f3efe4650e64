"""safetensors <-> Llama: load tensor by tensor, quantise on the way in, write in shards; merge, quantize, inspect.

A model folder is Hugging Face's: config.json, model.safetensors (or model-*.safetensors and an index), a tokenizer.
Weights come from safetensors only; nothing here unpickles.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from radllama.files import check_links, read_json, sync
from radllama.lora import ALL_LINEAR, check_adapter, merged, read_adapter, replace_layer, scaling_of
from radllama.model import Llama, LlamaConfig
from radllama.quant import BLOCK, STATE_KEY, Linear4bit, QuantType

Quantize = Literal["nf4", "fp4"]
Partition = Callable[[nn.Parameter], None]  # replaces a parameter's data by this rank's part of it
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_SHARD = re.compile(r"[^/\\\x00-\x1f\ud800-\udfff]{1,50}\.safetensors")  # a plain name, which cannot leave its folder
FLOATS = ("F64", "F32", "F16", "BF16")  # what a weight may be stored as; safetensors' names
LARGEST_HEADER = 100 * 10**6  # bytes: safetensors' own bound for a file's header
_HEADER_ROOM = 2**16  # bytes in front of a file that is written: some 300 tensors
_STORED_AS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_STORED_AS |= {torch.uint8: "U8", torch.int8: "I8"}
_MERGED_AT_A_TIME = 2**17  # values of a weight; malloc keeps some twenty such pieces
LARGEST_STATE = 2**16  # bytes of the JSON record of a 4-bit layer
_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "prompt.json",
    "original/tokenizer.model",
)


def find_model(name: str, *, revision: str | None = None) -> Path:
    """A model folder: `name` itself if it is one, else the Hugging Face repository of that name, downloaded.

    Raises ValueError where there is neither, saying how to gain access or where to look.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{name}: no such folder (and not the form of a Hugging Face repository, owner/name)")
    try:
        patterns = ["config.json", "*.safetensors", INDEX_FILE, *_SIDE_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ValueError(
            f"{name}: a gated repository; accept its licence on its page, then log in (hf auth login) or set HF_TOKEN"
        ) from None
    except Exception as error:  # offline, refused, missing, a full disk: the classes differ between hub versions
        reason = type(error).__name__
        raise ValueError(f"{name}: neither a folder here nor a repository that can be downloaded ({reason})") from None


class WeightFiles:
    """The tensors of a model folder by name, each read when asked for. Sources are memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Open every shard and check names; ValueError names the file at fault."""
        self.folder = Path(folder)
        check_links(self.folder)
        index = self.folder / INDEX_FILE
        weight_map = _read_index(index) if index.exists() else None
        shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for shard in shards:
            file = self.folder / shard
            if not file.exists():
                hint = (
                    f"{index.name} lists it"
                    if weight_map is not None
                    else f"expected it, or {INDEX_FILE} and its shards"
                )
                raise ValueError(f"{file}: missing ({hint}); was the download complete?")
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file}: truncated or not a safetensors file ({error!s:.300}); fetch it again"
                ) from None
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                if weight_map is not None and weight_map.get(name) != shard:
                    raise ValueError(f"{file}: holds {name}, which {index.name} does not place there")
                self._files[name] = handle
                view = handle.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        if absent := sorted((weight_map or {}).keys() - self.shapes.keys()):
            raise ValueError(f"{index}: lists tensors that its shards do not hold: {', '.join(absent[:5])}")

    def read(self, name: str) -> Tensor:
        """The tensor, backed by the file's pages: copy before keeping it."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def layers_4bit(self) -> dict[str, list[str]]:
        """Layer name -> all tensor names of that layer, for each layer that is stored in 4 bits."""
        mark = f".weight.{STATE_KEY}"
        layers: dict[str, list[str]] = {name.split(mark)[0]: [] for name in self.shapes if mark in name}
        for name in self.shapes:
            layer = name.split(mark)[0] if mark in name else name.rpartition(".weight")[0]
            if layer in layers:
                layers[layer].append(name)
        return layers

    def shape_4bit(self, layer: str, names: list[str]) -> tuple[int, ...]:
        """The shape of a 4-bit layer's weight, from its small JSON record."""
        name = next(name for name in names if STATE_KEY in name)
        if self.dtypes[name] != "U8" or math.prod(self.shapes[name]) > LARGEST_STATE:
            raise ValueError(f"{self.folder}: {name}: expected JSON with a shape, as at most {LARGEST_STATE:,} bytes")
        try:
            shape = tuple(json.loads(self.read(name).numpy().tobytes())["shape"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.folder}: {name}: expected JSON with a shape ({error!r:.200})") from None
        if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**40 for size in shape):
            raise ValueError(f"{self.folder}: {name}: expected JSON with a shape of two sizes, found {shape!r:.80}")
        return shape

    def read_4bit(self, layer: str, names: list[str]) -> Linear4bit:
        try:
            return Linear4bit.from_tensors({name.removeprefix(f"{layer}."): self.read(name) for name in names})
        except ValueError as error:
            raise ValueError(f"{self.folder}: layer {layer}: {error!s:.500}") from None


def _read_index(file: Path) -> dict[str, str]:
    weight_map = read_json(file, most=LARGEST_HEADER).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{file}: expected an object called weight_map, found {type(weight_map).__name__}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(
                f"{file}: weight_map[{name!r:.200}]: expected a .safetensors file in this folder, found {shard!r:.200}"
            )
    return weight_map


def load_model(
    path: str | Path,
    *,
    quantize: Quantize | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    double_quant: bool = True,
    progress: bool = False,
    partition: Partition | None = None,
) -> Llama:
    """A Llama with the folder's weights in `dtype` on `device`.

    quantize: store the seven projections of every layer in 4 bits, each as it is read. A folder whose weights are
    in bitsandbytes' 4-bit format loads as it is. Memory: the finished model and two tensors.
    partition: called with each parameter as it is read, to keep this rank's part of it. What it finds may lie in the
    file's own pages, so that the other parts are never read.
    Raises ValueError listing every missing, unexpected and misshapen tensor at once.
    """
    folder = Path(path)
    config = LlamaConfig.from_json(folder)
    files = WeightFiles(folder)
    stored_4bit = files.layers_4bit()
    if stored_4bit and quantize is not None:
        raise ValueError(f"{folder}: the weights are stored in 4 bits already; load it without quantising again")
    with torch.device("meta"):
        model = Llama(config)
    _check_ledger(model, files, stored_4bit)
    bar = tqdm(total=len(files.shapes), desc="load weights", unit="tensor", disable=not progress, leave=False)

    def keep(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
        """Out of the file's pages: all of it, or this rank's part."""
        if partition is None:
            return nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=tensor.is_floating_point())
        parameter = nn.Parameter(tensor.to(dtype), requires_grad=tensor.is_floating_point())
        partition(parameter)
        return parameter

    for layer, names in stored_4bit.items():
        packed = files.read_4bit(layer, names)
        packed.weight, packed.statistics = keep(packed.weight.detach()), keep(packed.statistics.detach())
        replace_layer(model, layer, packed)
        bar.update(len(names))
    for name, _ in list(model.named_parameters()):
        layer, _, kind = name.rpartition(".")
        if layer in stored_4bit:
            continue
        stored = files.read(name)
        if quantize is not None and layer.rpartition(".")[2] in ALL_LINEAR:
            weight = stored.to(device=device, dtype=dtype)  # no copy where the file has that dtype: read in slices
            try:
                packed = Linear4bit.from_weight(weight, quant_type=quantize, double_quant=double_quant)
            except ValueError as error:
                raise ValueError(f"{folder}: {name}: {error}") from None
            if partition is not None:
                partition(packed.weight)
                partition(packed.statistics)
            replace_layer(model, layer, packed)
        else:
            setattr(model.get_submodule(layer), kind, keep(stored, dtype))
        bar.update()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    bar.close()
    return model


def _check_ledger(model: Llama, files: WeightFiles, stored_4bit: dict[str, list[str]]) -> None:
    """Every parameter has its tensor of the right shape, and every tensor its parameter."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: shape for name, shape in files.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some files repeat the tied embedding
    problems = []
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for layer, names in stored_4bit.items():
        shape = wanted.pop(f"{layer}.weight", None) if layer in linears else None
        for name in names:
            found.pop(name, None)
        stored = files.shape_4bit(layer, names)
        if shape is None:
            problems.append(f"unexpected: {layer}.weight (4-bit)")
        elif shape != stored:
            problems.append(f"misshapen: {layer}.weight: config.json says {shape}, the file (4-bit) {stored}")
    problems += [f"missing: {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected: {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"misshapen: {name}: config.json says {wanted[name]}, the file {found[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    problems += [
        f"{name}: expected floating point, found {files.dtypes[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if files.dtypes[name] not in FLOATS
    ]
    if problems:
        shown = [f"{problem:.300}" for problem in problems[:40]]
        shown += [f"... and {len(problems) - 40} more"] * (len(problems) > 40)
        raise ValueError(f"{files.folder}: weights and config.json disagree:\n  " + "\n  ".join(shown))


def save_model(model: Llama, path: str | Path, *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write config.json and the weights (4-bit layers as bitsandbytes stores them); all or nothing."""
    write_model(model_tensors(model), model.config, path, max_shard_bytes=max_shard_bytes)


def model_tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, under their names."""
    embedding = model.model.embed_tokens.weight
    if model.config.tie_word_embeddings and model.lm_head.weight is not embedding:
        raise ValueError("the head has weights of its own, but config.tie_word_embeddings says it is the embedding")
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        module = model.get_submodule(layer)
        if ".lora_" in name:
            raise ValueError("the model has LoRA layers: save_adapter them, or merge_lora(model) first")
        if isinstance(module, Linear4bit):
            if kind == "weight":
                yield from ((f"{layer}.{key}", tensor) for key, tensor in module.tensors(embedding.dtype).items())
        else:
            yield name, parameter.detach()


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    path: str | Path,
    *,
    max_shard_bytes: int = 5 * 2**30,
    side_files: Sequence[Path] = (),
) -> None:
    """Write tensors as they come, into shards, and config.json beside them; all or nothing.

    side_files: folders whose tokenizer and other small files go along; a later one's replace an earlier one's.
    """
    with atomic_folder(path) as folder:
        write_model_into(folder, tensors, config, max_shard_bytes=max_shard_bytes)
        for source in side_files:
            copy_side_files(source, folder)


def write_model_into(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], config: LlamaConfig, *, max_shard_bytes: int = 5 * 2**30
) -> None:
    """`write_model` into a folder that is there and empty of weights; not atomic by itself.

    Each tensor is written as it comes and is not kept.
    """
    weight_map: dict[str, int] = {}
    shards, total, dtype, quant = 1, 0, "float32", None
    shard = _ShardFile(folder / _shard_name(1, 0))
    for name, tensor in tensors:
        if shard.size and (shard.size + tensor.nbytes > max_shard_bytes or not shard.has_room(name)):
            shard.close()
            shards += 1
            shard = _ShardFile(folder / _shard_name(shards, 0))
        shard.add(name, tensor)
        weight_map[name] = shards
        total += tensor.nbytes
        if name.endswith("embed_tokens.weight"):
            dtype = str(tensor.dtype).removeprefix("torch.")
        if STATE_KEY in name:
            nested = f"{name.split(STATE_KEY)[0]}nested_absmax" in weight_map
            quant = _quantization_config(name.split(STATE_KEY)[1], nested, dtype)
        del tensor  # before the next one is made
    shard.close()
    if shards == 1:
        (folder / _shard_name(1, 0)).rename(folder / SINGLE_FILE)
    else:
        for number in range(1, shards + 1):
            (folder / _shard_name(number, 0)).rename(folder / _shard_name(number, shards))
        placed = {name: _shard_name(number, shards) for name, number in weight_map.items()}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": placed})
    extra = {"quantization_config": quant} if quant else {}
    _write_json(folder / "config.json", config.to_dict() | {"torch_dtype": dtype} | extra)


class _ShardFile:
    """A safetensors file that takes tensors one by one and holds none of them.

    The header stands in front of the tensors: room is left for it, and filled at the end (spaces may follow it). All
    tensors start at multiples of 8 bytes; those of an odd length wait for the end, the widest elements first.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.size = file, 0
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._waiting: list[tuple[str, Tensor]] = []
        self._header = 2  # bytes
        self._handle = file.open("wb")
        self._handle.seek(8 + _HEADER_ROOM)

    def has_room(self, name: str) -> bool:
        """Whether the header can take one more entry: a name, a dtype, a shape and two offsets."""
        return self._header + len(json.dumps(name)) + 200 <= _HEADER_ROOM

    def add(self, name: str, tensor: Tensor) -> None:
        self._header += len(json.dumps(name)) + 200
        self.size += tensor.nbytes
        if tensor.nbytes % 8:
            self._waiting.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        begin = self._handle.tell() - 8 - _HEADER_ROOM
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            self._handle.write(raw.numpy().data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        place = {"shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.nbytes]}
        self._entries[name] = {"dtype": _STORED_AS[tensor.dtype]} | place

    def close(self) -> None:
        for name, tensor in sorted(self._waiting, key=lambda pair: -pair[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._entries, separators=(",", ":")).encode().ljust(_HEADER_ROOM)
        try:
            self._handle.seek(0)
            self._handle.write(len(header).to_bytes(8, "little") + header)
            self._handle.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from None


def _shard_name(number: int, shards: int) -> str:
    return f"model-{number:05d}-of-{shards:05d}.safetensors"


def _quantization_config(quant_type: str, nested: bool, dtype: str) -> dict[str, Any]:
    """What transformers needs in config.json to read 4-bit tensors."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder that takes the place of `path` when the block ends well, and vanishes when it does not."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".replaced")
    if old.exists() and not target.exists():  # a run ended between the two renames below
        old.rename(target)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in (*beside.rglob("*"), beside):
            sync(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    beside.rename(target)
    sync(target.parent)  # or a power cut may leave neither
    shutil.rmtree(old, ignore_errors=True)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the tokenizer and the other small files that belong to a model."""
    for pattern in _SIDE_FILES:
        for file in filter(Path.is_file, source.glob(pattern)):
            destination = target / file.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, destination)


def quantize_folder(source: Path, target: Path, *, quant_type: QuantType, dtype: torch.dtype) -> None:
    """Write `source` with its projections in 4 bits, tensor by tensor."""
    config, files = LlamaConfig.from_json(source), WeightFiles(source)
    if files.layers_4bit():
        raise ValueError(f"{source}: the weights are stored in 4 bits already")
    with torch.device("meta"):
        model = Llama(config)
    _check_ledger(model, files, {})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, _ in tqdm(list(model.named_parameters()), desc="quantise", unit="tensor", leave=False):
            layer = name.removesuffix(".weight")
            tensor = files.read(name).to(dtype, copy=True)
            if layer.rpartition(".")[2] in ALL_LINEAR:
                packed = Linear4bit.from_weight(tensor, quant_type=quant_type).tensors(dtype)
                yield from ((f"{layer}.{key}", value) for key, value in packed.items())
            else:
                yield name, tensor

    write_model(tensors(), config, target, side_files=[source])


def merge_folder(
    source: Path, adapter: Path, target: Path, *, dtype: torch.dtype, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write `source` with the adapter folded in, tensor by tensor; 4-bit weights are de-quantised first."""
    config, files = LlamaConfig.from_json(source), WeightFiles(source)
    stored_4bit = files.layers_4bit()
    with torch.device("meta"):
        model = Llama(config)
    _check_ledger(model, files, stored_4bit)
    adapter_config, updates = read_adapter(adapter)
    scaling = scaling_of(adapter_config)
    check_adapter(model, adapter_config, updates, adapter)
    names = [name for name, _ in model.named_parameters()]
    if config.tie_word_embeddings and "lm_head.lora_A" in updates:
        raise ValueError(f"{adapter}: adapts lm_head, which {source} ties to the embedding: the two cannot be merged")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in tqdm(names, desc="merge", unit="tensor", leave=False):
            layer = name.removesuffix(".weight")
            if layer in stored_4bit:
                packed = files.read_4bit(layer, stored_4bit[layer])
                shape: tuple[int, ...] = (packed.out_features, packed.in_features)
                count = max(BLOCK, _MERGED_AT_A_TIME // shape[1] // BLOCK * BLOCK)
                parts: Iterable[Tensor] = packed.dequantized_rows(torch.float32, count)
            else:
                stored = files.read(name)
                shape, count = tuple(stored.shape), max(1, _MERGED_AT_A_TIME // stored.shape[-1])
                parts = stored.split(count)
            weight, first = torch.empty(shape, dtype=dtype), 0
            for rows in parts:  # so that no whole weight is there in fp32
                end = first + len(rows)
                if f"{layer}.lora_A" in updates:
                    rows = merged(rows, updates[f"{layer}.lora_A"], updates[f"{layer}.lora_B"][first:end], scaling)
                weight[first:end] = rows
                first = end
            yield name, weight

    # The model is asked as the adapter was trained: its prompt.json goes over the base's.
    write_model(tensors(), config, target, max_shard_bytes=max_shard_bytes, side_files=[source, adapter])


def describe(folder: Path) -> str:
    """What is in a model or adapter folder, as text."""
    if (folder / "adapter_config.json").exists():
        config, tensors = read_adapter(folder)
        count = sum(tensor.numel() for tensor in tensors.values())
        facts = {"kind": "LoRA adapter", "base": config.get("base_model_name_or_path"), "rank": config["r"]}
        facts |= {"alpha": config["lora_alpha"], "targets": ", ".join(config["target_modules"])}
        facts |= {"layers": len(tensors) // 2, "parameters": f"{count:,}"}
        return "\n".join(f"{key:<12} {value}" for key, value in facts.items())
    files, model_config = WeightFiles(folder), LlamaConfig.from_json(folder)
    with torch.device("meta"):
        model = Llama(model_config)
    stored_4bit = files.layers_4bit()
    _check_ledger(model, files, stored_4bit)
    kinds = Counter(files.dtypes[name] for name in files.shapes)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines = [f"{key:<24} {value}" for key, value in model_config.to_dict().items()]
    lines.append(f"{'parameters':<24} {sum(p.numel() for p in model.parameters()):,}")
    lines.append(f"{'tensors':<24} {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    lines.append(f"{'layers in 4 bits':<24} {len(stored_4bit)}")
    lines.append(f"{'weight files':<24} {size / 2**20:,.1f} MiB")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m radllama.checkpoint", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="fold a LoRA adapter into its base and write a full model")
    merge.add_argument("--adapter", required=True, type=Path, help="adapter folder (PEFT format)")
    quantize = commands.add_parser("quantize", help="write a model with its projections in 4 bits")
    quantize.add_argument("--type", choices=["nf4", "fp4"], default="nf4")
    for command in (merge, quantize):
        command.add_argument("--model", required=True, help="model folder or Hugging Face repository")
        command.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
        command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    inspect = commands.add_parser("inspect", help="say what a model or adapter folder holds, and check it")
    inspect.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "inspect":
            print(describe(options.folder))
            return
        if options.output.exists():
            raise ValueError(f"{options.output}: exists; choose another folder or remove it")
        source, dtype = find_model(options.model), getattr(torch, options.dtype)
        if options.command == "merge":
            merge_folder(source, options.adapter, options.output, dtype=dtype)
        else:
            quantize_folder(source, options.output, quant_type=options.type, dtype=dtype)
        print(f"wrote {options.output}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
