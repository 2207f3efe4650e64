"""Loading a model of 1.2 billion parameters: against transformers + bitsandbytes, and in parts for ZeRO-3.

    python bench/load.py [--folder runs/bench-load] [--rounds 3]          quantising to NF4 on load; an NF4 checkpoint
    python bench/load.py --zero3 1 2 4                                    peak memory of each of so many ranks
    python bench/load.py --merge                                          peak memory of merging and saving
    python bench/load.py --hidden 1024 --layers 8 ...                     the same with a model of 0.5 GB

The model (Llama 3.2 1B's shape, random bf16 weights, 2.5 GB) is made in the folder once and kept. Every load is a
process of its own; importing and compiling stand before the clock and are printed apart; the files are in the page
cache. Asserted: all codes and statistics are transformers', and what ZeRO-3's ranks gather is what one process loads,
bit for bit. Bars: quantising 4 x as fast as `from_pretrained(load_in_4bit)`, an NF4 checkpoint 15 x; peak anonymous
memory at most the finished model (with ZeRO-3, the rank's part) and two of the largest tensors. Merging an adapter:
one tensor and 32 MB, at a model and at one of half its layers, so that the slope shows; saving: 4 MB. (These with a
vocabulary of 8,192: no tensor is larger than the projections, which take the work.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from radllama.checkpoint import Partition, load_model, merge_folder, save_model, write_model
from radllama.checkpoint import main as checkpoint
from radllama.lora import add_lora, lora_layers, save_adapter
from radllama.model import Llama, LlamaConfig
from radllama.quant import Linear4bit, compiled_quantizer

FOLDERS = {"plain": "model", "quantise": "model", "checkpoint": "nf4", "peers": "model"}
MERGES = {"merge": "model", "merge of NF4": "nf4", "save": "model"}
Result = TypeVar("Result")
BARS = {"quantise": 4.0, "checkpoint": 15.0}


def shape(hidden: int, layers: int, vocabulary: int = 128_256) -> LlamaConfig:
    """Llama 3.2 1B is 2048 x 16."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, head_dim=64,
        tie_word_embeddings=True)  # fmt: skip


def make_model(folder: Path, config: LlamaConfig) -> None:
    """The bf16 model, and its NF4 checkpoint as radllama.checkpoint writes it."""
    if not (folder / "model").exists():
        with torch.device("meta"):
            model = Llama(config)
        generator = torch.Generator().manual_seed(0)
        tensors = (
            (name, (0.02 * torch.randn(parameter.shape, generator=generator)).bfloat16())
            for name, parameter in model.named_parameters()
        )
        write_model(tensors, config, folder / "model", max_shard_bytes=2**30)
    if not (folder / "nf4").exists():
        checkpoint(["quantize", "--model", str(folder / "model"), "--output", str(folder / "nf4")])


def resident(key: str) -> int:
    """Bytes of this process: RssAnon, which no file backs, or RssFile."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def measured(work: Callable[[], Result]) -> tuple[Result, dict[str, Any]]:
    """What the work returns, the seconds it took, and above what was there before the peaks of anonymous memory and of
    the files' pages that it touched."""
    peak = baseline = resident("RssAnon")
    read = files = resident("RssFile")
    done = threading.Event()

    def sample() -> None:
        nonlocal peak, read
        while not done.wait(0.002):
            peak, read = max(peak, resident("RssAnon")), max(read, resident("RssFile"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    begun = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begun
    done.set()
    sampler.join()
    peak = max(peak, resident("RssAnon")) - baseline
    return result, {"seconds": seconds, "peak": peak, "read": read - files}


def warm_up(what: str) -> float:
    """Seconds that the first use of the quantiser takes: compiling, or loading what was compiled before."""
    begun = time.perf_counter()
    if what == "quantise":
        compiled_quantizer("nf4", torch.bfloat16)
    Linear4bit.from_weight(torch.randn(64, 64))
    return time.perf_counter() - begun


def load_ours(folder: Path, what: str, partition: Partition | None = None) -> Llama:
    return load_model(folder / FOLDERS[what], quantize="nf4" if what == "quantise" else None, partition=partition)


def ours(folder: Path, what: str) -> dict[str, Any]:
    compiling = warm_up(what)
    model, found = measured(lambda: load_ours(folder, what))
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    codes = ((name, layer.tensors(torch.bfloat16)) for name, layer in layers)
    facts = {"compiling": compiling, "finished": sum(sizes), "largest": max(sizes), "digest": digest(codes)}
    return found | facts


def peers(folder: Path) -> dict[str, Any]:
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    transformers.logging.disable_progress_bar()
    load = transformers.LlamaForCausalLM.from_pretrained
    warm_up("peers")
    model, found = measured(lambda: load(folder / "model", dtype=torch.bfloat16, quantization_config=settings))
    weights = ((name, getattr(layer, "weight", None)) for name, layer in model.named_modules())
    states = ((name, weight) for name, weight in weights if hasattr(weight, "quant_state"))
    codes = (
        (name, {"weight": weight.data} | {f"weight.{key}": value for key, value in state.items()})
        for name, weight in states
        for state in [weight.quant_state.as_dict(packed=True)]
    )
    return found | {"digest": digest(codes)}


def digest(layers: Iterable[tuple[str, dict[str, Tensor]]]) -> str:
    """A checksum over all 4-bit layers: names, codes and statistics."""
    total = hashlib.sha256()
    for name, tensors in sorted(layers):
        for key, tensor in sorted(tensors.items()):
            total.update(f"{name} {key} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run(what: str, folder: Path) -> dict[str, Any]:
    """One piece of work in a process of its own, after its files were read once."""
    for file in (folder / (FOLDERS | MERGES)[what]).glob("*.safetensors"):
        with file.open("rb") as handle:
            while handle.read(2**24):
                pass
    command = [sys.executable, __file__, "--only", what, "--folder", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def compare(folder: Path, rounds: int) -> bool:
    """Print every round and the medians; whether all bars are met."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(LlamaConfig.from_json(folder / "model")).parameters())
    turns = ("peers", "quantise", "checkpoint")
    seconds: dict[str, list[float]] = {what: [] for what in turns}
    good = True
    for number in range(rounds):
        found = {}
        for what in turns if number % 2 else reversed(turns):
            one = found[what] = run(what, folder)
            seconds[what].append(one["seconds"])
            rate = parameters / one["seconds"] / 1e6
            line = f"round {number + 1}: {what:<10} {one['seconds']:6.2f} s, {rate:5,.0f} M parameters/s"
            line += f", peak {one['peak'] / 1e9:.2f} GB"
            if what != "peers":
                limit = one["finished"] + 2 * one["largest"]
                good &= one["peak"] <= limit
                line += f" (finished model {one['finished'] / 1e9:.2f} GB, bar {limit / 1e9:.2f} GB)"
                line += f", compiling and first use beforehand {one['compiling']:.1f} s"
            print(line, flush=True)
        assert len({one["digest"] for one in found.values()}) == 1, "the codes differ"
    print(f"{parameters:,} parameters; codes and statistics the same, bit for bit")
    for what, bar in BARS.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["peers"], seconds[what], strict=True))
        good &= ratio >= bar
        middle = statistics.median(seconds[what]), statistics.median(seconds["peers"])
        print(f"{what}: {middle[0]:.2f} s against {middle[1]:.2f} s, {ratio:.1f} x (median of {rounds}; bar {bar:g} x)")
    return good


def rank(folder: Path, what: str, output: Path) -> None:
    """One rank of a load for ZeRO-3: write what it took and what it holds, and compare what all gather."""
    import deepspeed
    import deepspeed.comm as dist

    from radllama.build import partition_of

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    partition = partition_of(settings, torch.device("cpu"), torch.bfloat16)
    assert partition is not None
    warm_up(what)
    partition(nn.Parameter(torch.zeros(64)))
    dist.barrier()
    model, found = measured(lambda: load_ours(folder, what, partition))
    found["held"] = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    found["model"] = sum(parameter.ds_numel * parameter.element_size() for parameter in model.parameters())
    whole = load_ours(folder, what) if dist.get_rank() == 0 else None
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if whole is not None:
                expected = whole.get_parameter(name)
                assert parameter.dtype == expected.dtype, name
                assert torch.equal(parameter, expected), name
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def zero3(folder: Path, worlds: list[int]) -> bool:
    """Print every rank's peak at every number of ranks; whether each is within its part and two source tensors."""
    good = True
    with torch.device("meta"):
        sources = Llama(LlamaConfig.from_json(folder / "model")).parameters()
    largest = max(parameter.numel() for parameter in sources) * 2  # bf16
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", "29533"]
    for what in ("plain", "quantise", "checkpoint"):
        for world in worlds:
            with tempfile.TemporaryDirectory() as output:
                command = [*launcher, "--num_gpus", str(world), __file__, "--only", what, "--folder", str(folder)]
                environment = os.environ | {"DS_ACCELERATOR": "cpu"}
                done = subprocess.run(
                    [*command, "--rank-output", output], env=environment, capture_output=True, text=True
                )
                if done.returncode:
                    sys.exit(done.stderr)
                ranks = [json.loads(file.read_text()) for file in sorted(Path(output).glob("*.json"))]
            limit = ranks[0]["model"] / world + 2 * largest  # the bar also allows these in fp32: not needed
            good &= len(ranks) == world and all(one["peak"] <= limit for one in ranks)
            peaks = ", ".join(f"{one['peak'] / 1e6:,.0f}" for one in ranks)
            reads = ", ".join(f"{one['read'] / 1e6:,.0f}" for one in ranks)
            print(f"{what:<10} {world} rank(s): model {ranks[0]['model'] / 1e6:,.0f} MB, each holds "
                  f"{ranks[0]['held'] / 1e6:,.0f}; peak of anonymous memory {peaks} (bar {limit / 1e6:,.0f}); "
                  f"pages of the files touched {reads}; {max(one['seconds'] for one in ranks):.1f} s",
                  flush=True)  # fmt: skip
    print(f"gathered weights are those of one process, bit for bit; largest source tensor {largest / 1e6:,.0f} MB")
    return good


def merge_or_save(folder: Path, what: str) -> dict[str, Any]:
    """Peak memory of one of MERGES in shards of eight of the largest tensors, whatever the model, and those sizes."""
    source = folder / MERGES[what]
    with torch.device("meta"):
        parameters = [parameter.numel() * 2 for parameter in Llama(LlamaConfig.from_json(source)).parameters()]  # bf16
    shard = 8 * max(parameters)
    torch.randn(256, 64) @ torch.randn(64, 2048)  # the first product takes memory of its own
    with tempfile.TemporaryDirectory(dir=folder) as output:
        target = Path(output) / "written"
        if what == "save":
            model = load_model(source)
            _, found = measured(lambda: save_model(model, target, max_shard_bytes=shard))
        else:
            _, found = measured(
                lambda: merge_folder(
                    source, folder / "adapter", target, dtype=torch.bfloat16, max_shard_bytes=shard))  # fmt: skip
        written = [file.stat().st_size for file in target.glob("*.safetensors")]
    return found | {
        "model": sum(parameters),
        "largest": max(parameters),
        "shard": max(written),
        "shards": len(written),
    }


def make_adapter(folder: Path) -> None:
    """A rank-64 adapter on all seven projections of the folder's model, of random values."""
    if (folder / "adapter").exists():
        return
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_json(folder / "model"))
        add_lora(model, rank=64, alpha=16)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for linear in (layer.lora_A, layer.lora_B):
            linear.weight = nn.Parameter((0.02 * torch.randn(linear.weight.shape, generator=generator)).bfloat16())
    save_adapter(model, folder / "adapter", base_model="model")


def merges(folders: list[Path]) -> bool:
    """Print the peaks of merging and saving for models of growing size, and their slope; whether the bars are met."""
    good = True
    for what in MERGES:
        points = []
        for folder in folders:
            found = run(what, folder)
            limit = 2**22 if what == "save" else found["largest"] + 2**25
            good &= found["peak"] <= limit
            points.append((found["model"], found["peak"]))
            sizes = ("model", "peak", "shard", "largest")
            model, peak, shard, largest = (f"{found[key] / 1e6:,.0f}" for key in sizes)
            print(f"{what:<12} model {model} MB in {found['shards']} shards: peak of anonymous memory {peak} MB "
                  f"(largest shard {shard}, largest tensor {largest}, bar {limit / 1e6:,.0f}); "
                  f"{found['seconds']:.1f} s", flush=True)  # fmt: skip
        (small, first), (large, last) = points
        print(f"{what:<12} slope of the peak: {1e3 * (last - first) / (large - small):+.1f} MB a GB")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading and quantising against transformers + bitsandbytes.")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-load"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero3", type=int, nargs="+", metavar="RANKS", help="measure loading for ZeRO-3 instead")
    parser.add_argument("--merge", action="store_true", help="measure merging and saving instead")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 256")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", choices=[*FOLDERS, *MERGES], help=argparse.SUPPRESS)
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_args()
    if options.rank_output:
        rank(options.folder, options.only, options.rank_output)
        return
    if options.only:
        work = merge_or_save if options.only in MERGES else ours
        print(json.dumps(peers(options.folder) if options.only == "peers" else work(options.folder, options.only)))
        return
    packages = ("torch", "deepspeed" if options.zero3 else "transformers", "bitsandbytes", "safetensors")
    print(", ".join(f"{name} {version(name)}" for name in packages) + f"; {os.cpu_count()} cores")
    layers = (options.layers // 2, options.layers) if options.merge else (options.layers,)
    vocabulary = 8192 if options.merge else 128_256
    folders = [options.folder / f"{options.hidden}x{count}-{vocabulary}" for count in layers]
    for folder, count in zip(folders, layers, strict=True):
        make_model(folder, shape(options.hidden, count, vocabulary))
        if options.merge:
            make_adapter(folder)
    if options.merge:
        good = merges(folders)
    else:
        good = zero3(folders[0], options.zero3) if options.zero3 else compare(folders[0], options.rounds)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
