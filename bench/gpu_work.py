"""What the contestants of bench/gpu.py share: the same weights, the same reports, the clock, the record of results."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from radllama import model as model_module
from radllama.attention import row_attention
from radllama.data import Row
from radllama.fused import plain_rms_norm, plain_swiglu
from radllama.lora import ALL_LINEAR, add_lora, lora_layers, replace_layer
from radllama.model import MLP, Llama, LlamaConfig, RMSNorm
from radllama.quant import Linear4bit

PEAK = 989e12  # bf16 FLOP/s without sparsity, an H100's and an H200's data sheet
GIB = 2**30
CONFIGS = {
    "8b": LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128),
    "70b": LlamaConfig(128_256, 8192, 28_672, 80, 64, 8, 128),
}
TINY = LlamaConfig(512, 64, 128, 2, 4, 2, 16)  # whole blocks of 64, as bitsandbytes on a CPU needs
Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What a stage is given."""

    device: torch.device
    dtype: torch.dtype
    smoke: bool
    out: Path
    deadline: float
    results: list[Result]

    def add(self, **result: Any) -> None:
        """Record a result at once: the stage may be cut short."""
        self.results.append(result)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        print({key: value for key, value in result.items() if value is not None}, flush=True)

    @contextlib.contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """A measurement whose failure is recorded and does not end the stage."""
        try:
            yield
        except Exception as error:  # whatever a GPU, a kernel or a peer may throw
            if self.smoke:
                raise
            self.add(**what, error=f"{type(error).__name__}: {str(error)[:300]}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def in_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("the stage's time is up")

    def config(self, size: str) -> LlamaConfig:
        return TINY if self.smoke else CONFIGS[size]

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, run: Callable[[], Any], *, turns: int = 5, warm_up: int = 2) -> tuple[float, float]:
        """Median seconds, and the most GiB allocated in a turn."""
        self.in_time()
        seconds = []
        for turn in range(warm_up + turns):
            if turn == warm_up and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else 0.0
        return statistics.median(seconds[warm_up:]), peak


# ---------------------------------------------------------------- weights and reports, the same for every side


def values(name: str, shape: torch.Size | tuple[int, ...], bench: Bench, scale: float | None = None) -> Tensor:
    """Random numbers that depend on the name alone; a matrix keeps its input's magnitude, a norm's weights are one."""
    if len(shape) == 1:
        return torch.ones(shape, device=bench.device, dtype=bench.dtype)
    generator = torch.Generator(bench.device).manual_seed(zlib.crc32(name.encode()))
    numbers = torch.randn(shape, generator=generator, device=bench.device, dtype=bench.dtype)
    return numbers.mul_(shape[-1] ** -0.5 if scale is None else scale)


def fill(model: nn.Module, bench: Bench, quantised: Callable[[Tensor], nn.Module]) -> None:
    """Give a model on the meta device its weights, one tensor after the other, the seven projections in 4 bits."""
    bench.in_time()
    for name, parameter in list(model.named_parameters()):
        layer, _, leaf = name.rpartition(".")
        weight = values(name, parameter.shape, bench)
        if layer.rpartition(".")[2] in ALL_LINEAR:
            replace_layer(model, layer, quantised(weight))
        else:
            setattr(model.get_submodule(layer), leaf, nn.Parameter(weight, requires_grad=False))


def ours(bench: Bench, config: LlamaConfig, rank: int | None) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    fill(model, bench, Linear4bit.from_weight)
    model.packed_attention = row_attention
    if rank is not None:
        add_lora(model, rank=rank, alpha=2 * rank)
        for name, layer in lora_layers(model):
            for part, linear in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                # B is not zero as in training, where A's first gradient would be nothing
                linear.weight.data = values(f"{name}.{part}", linear.weight.shape, bench, 0.02)
    return model


def theirs(bench: Bench, shape: LlamaConfig) -> Any:
    """transformers' model with bitsandbytes' layers, as from_pretrained(quantization_config=...) makes it of files."""
    import bitsandbytes
    import transformers

    def quantised(weight: Tensor) -> nn.Module:
        with torch.device("meta"):
            layer = bitsandbytes.nn.Linear4bit(
                weight.shape[1], weight.shape[0], bias=False, compute_dtype=bench.dtype, quant_type="nf4"
            )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(bench.device)
        return layer

    config = transformers.LlamaConfig(**shape.to_dict(), attn_implementation="sdpa")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    fill(model, bench, quantised)
    with torch.device(bench.device):  # no parameter, and so not filled
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = True
    return model


def reports(bench: Bench, tokens: int, vocabulary: int, *, wordings: int = 4) -> list[Row]:
    """As many reports as fill a pack of `tokens`, sorted by wording as in a step."""
    draw = random.Random(tokens)
    prefix, findings, impression = (9, 20, 6) if bench.smoke else (65, 230, 50)

    def text(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    starts, rows, used = [text(prefix) for _ in range(wordings)], list[Row](), wordings * prefix
    while True:
        lengths = [max(2, round(draw.lognormvariate(-0.1, 0.45) * mean)) for mean in (findings, impression)]
        used += sum(lengths)
        if used > tokens:
            return sorted(rows, key=lambda row: row.wording)
        wording = draw.randrange(wordings)
        mask = [False] * (prefix + lengths[0]) + [True] * lengths[1]
        rows.append(Row(f"r{len(rows)}", starts[wording] + text(sum(lengths)), mask, wording))


def heads(bench: Bench, config: LlamaConfig, tokens: int) -> list[Tensor]:
    """Random queries, keys and values, (1, heads, T, D), as a projection and a transpose leave them."""
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [
        values(f"heads {number}", (1, tokens, count, config.head_dim), bench, 1.0).transpose(1, 2).requires_grad_()
        for number, count in enumerate(counts)
    ]


# ---------------------------------------------------------------- a training step


def recompute(model: Llama, share: float) -> None:
    """The first layers, as many as `share` says, keep no activations."""
    count = round(share * len(model.model.layers))
    for number, layer in enumerate(model.model.layers):
        layer.__dict__.pop("forward", None)
        if number < count:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_elementwise() -> None:
    """RMSNorm, RoPE and SwiGLU as one kernel each, compiled for the first length of a row, then once more for any."""
    plain = RMSNorm.forward
    if hasattr(plain, "compiled"):
        return

    fused = torch.compile(plain_rms_norm)

    def forward(self: RMSNorm, x_BTC: Tensor) -> Tensor:
        return fused(x_BTC, self.weight, self.eps)

    forward.compiled = True  # type: ignore[attr-defined]
    RMSNorm.forward = forward  # type: ignore[method-assign]
    swiglu = torch.compile(plain_swiglu)
    MLP.forward = lambda self, x_BTC: self.down_proj(swiglu(*self.gate_up(x_BTC)))  # type: ignore[method-assign]
    model_module.rotate = torch.compile(model_module.rotate)


def gradients(parameters: dict[str, nn.Parameter]) -> Tensor:
    """The gradients of some LoRA matrices, one behind the other, in fp32 on the CPU."""
    chosen = [name for name in sorted(parameters) if name.partition(".lora_")[0].endswith(("q_proj", "down_proj"))]
    return torch.cat([parameters[name].grad.float().flatten().cpu() for name in chosen])  # type: ignore[union-attr]


def parameters_of(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


def rates(tokens: int, reports: int, seconds: float, peak: float, count: int) -> Result:
    return {
        "computed_tokens": tokens,
        "reports": reports,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "reports_per_second": reports / seconds,
        "mfu": 4 * count * tokens / seconds / PEAK,
        "peak_gib": peak,
    }


def best_rates(rows: list[Result]) -> dict[str, float]:
    """Each side's most reports a second."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["side"]] = max(best.get(row["side"], 0.0), row.get("reports_per_second", 0.0))
    return {side: rate for side, rate in best.items() if rate}


def ratios(rows: list[Result]) -> list[str]:
    best = best_rates(rows)
    return [f"  {side}: {best['ours'] / rate:.2f}" for side, rate in best.items() if side != "ours" and "ours" in best]


class Still(torch.optim.SGD):
    """Leaves weights and gradients as they are."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]

    def zero_grad(self, set_to_none: bool = True) -> None: ...
