"""LoRA over any linear layer, quantised or not: inject, merge, save and load in PEFT's format.

y = base(x) + scaling * B(A(dropout(x))), with A (rank, in) random, B (out, rank) zero, and only these two trained
(Hu et al. 2021, arXiv 2106.09685). scaling is alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from radllama.files import check_links, read_json
from radllama.fused import linear
from radllama.quant import Linear4bit

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
LARGEST_RANK = 2**16  # more is no low rank
_PEFT_PREFIX = "base_model.model."
# PEFT's options that change which tensors there are, or what is computed with them.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "exclude_modules"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)


class LoRALinear(nn.Module):
    """A linear layer and its low-rank update; the base is frozen."""

    def __init__(
        self, base: nn.Linear | Linear4bit, *, rank: int, alpha: float, dropout: float, rslora: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout_p, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # PEFT's choice
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        (y,) = self.together(x, (self,))
        return y

    def plain(self, x: Tensor) -> Tensor:
        """The formula as it stands."""
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    @staticmethod
    def together(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """The outputs of layers that share their input, of which the first is a LoRALinear: the plain formula's values
        and gradients for less work and memory. With dropout, where every layer has an input of its own, plain."""
        fused = [
            layer
            for layer in layers
            if isinstance(layer, LoRALinear)
            and not (layer.training and layer.dropout_p > 0)
            and getattr(layer.base, "bias", None) is None
        ]
        if len(fused) < len(layers):
            return tuple(layer.plain(x) if isinstance(layer, LoRALinear) else layer(x) for layer in layers)
        factors = [part.weight for layer in fused for part in (layer.lora_A, layer.lora_B)]
        outputs: tuple[Tensor, ...] = _SharedInput.apply(x, fused, *factors)
        return outputs

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in); a 4-bit base's is de-quantised to `dtype`."""
        return self.base.dequantize(dtype) if isinstance(self.base, Linear4bit) else self.base.weight.detach()

    def base_product(self, x: Tensor) -> Tensor:
        """x W^T, without gradients and without the hooks of the base: what ZeRO-3 gathers, the whole layer has."""
        return self.base.product(x) if isinstance(self.base, Linear4bit) else linear(x, self.base.weight.detach())

    def merged_weight(self) -> Tensor:
        """W + scaling * B A (out, in) in the adapter's dtype, summed in fp32; a 4-bit base is de-quantised first."""
        weight = self.base_weight(torch.float32)
        return merged(weight, self.lora_A.weight, self.lora_B.weight, self.scaling).to(self.lora_A.weight.dtype)


class _SharedInput(torch.autograd.Function):
    """y_i = x W_i^T + scaling_i (x A_i^T) B_i^T of layers i that share x.

    Kept for the backward pass are x and x A^T, nothing of a frozen W, which is de-quantised again. The products with
    all A are one, and every update is added by the matrix product that computes it. The idea is Unsloth's
    (unsloth/kernels/fast_lora.py). N rows, C inputs, R all ranks, O a layer's outputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[LoRALinear], *factors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x_NC, lora_A = x.reshape(-1, x.shape[-1]), factors[::2]
        inner_NR = linear(x_NC, torch.cat(lora_A))
        outputs = []
        for layer, inner, lora_B in zip(layers, _by_layer(inner_NR, lora_A), factors[1::2], strict=True):
            y_NO = layer.base_product(x_NC)
            y_NO.addmm_(inner, lora_B.T, alpha=layer.scaling)
            outputs.append(y_NO.view(*x.shape[:-1], y_NO.shape[1]))  # not -1: x may have no rows
        ctx.layers = layers  # and not W: under ZeRO-3 it comes and goes between forward and backward
        ctx.save_for_backward(x_NC, inner_NR, *factors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, inner_NR, *factors = ctx.saved_tensors
        lora_A = factors[::2]
        x_grad, inner_grads, B_grads = None, [], []
        parts = zip(ctx.layers, grads, _by_layer(inner_NR, lora_A), factors[1::2], strict=True)
        for layer, grad, inner, lora_B in parts:
            grad_NO = grad.reshape(-1, grad.shape[-1])
            inner_grads.append(linear(grad_NO, lora_B.T).mul_(layer.scaling))
            B_grads.append((grad_NO.T @ inner).mul_(layer.scaling))
            if ctx.needs_input_grad[0]:  # not in the first layer: the embedding is frozen
                weight = layer.base_weight(grad.dtype)
                part = linear(grad_NO, weight.T)
                x_grad = part if x_grad is None else x_grad.add_(part)
        inner_grad_NR = torch.cat(inner_grads, dim=1)
        if x_grad is not None:
            x_grad = x_grad.addmm_(inner_grad_NR, torch.cat(lora_A)).view(*grads[0].shape[:-1], x_NC.shape[1])
        A_grads = (inner_grad_NR.T @ x_NC).split([len(A) for A in lora_A])
        return x_grad, None, *(grad for pair in zip(A_grads, B_grads, strict=True) for grad in pair)


def _by_layer(inner_NR: Tensor, lora_A: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return inner_NR.split([len(A) for A in lora_A], dim=1)


def merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """weight + scaling * lora_B lora_A in fp32: (out, in) + (out, rank) (rank, in)."""
    return weight.float() + scaling * (lora_B.detach().float() @ lora_A.detach().float())


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: tuple[str, ...] | list[str] = ALL_LINEAR,
    rslora: bool = False,
) -> list[str]:
    """Freeze the model and wrap every linear layer whose last name part is in `targets`; returns their full names.

    Raises ValueError for a target that no linear layer matches, or a model that has LoRA layers already.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, found {rank}")
    _refuse_lora(model)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Linear4bit)}
    unmatched = sorted(set(targets) - {name.rpartition(".")[2] for name in linears})
    if unmatched or not targets:
        present = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"targets: no linear layer is called {unmatched}; the model has {present}")
    model.requires_grad_(False)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    adapted = [name for name in linears if name.rpartition(".")[2] in targets]
    for name in adapted:
        layer = LoRALinear(linears[name], rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dtype=dtype)
        replace_layer(model, name, layer)
    return adapted


def _refuse_lora(model: nn.Module) -> None:
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model already has LoRA layers; merge_lora(model) first")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The LoRA layers and their full names."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Exactly the parameters that training changes."""
    return [p for _, layer in lora_layers(model) for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]


def merge_lora(model: nn.Module) -> None:
    """Fold every update into its weight and put plain linear layers back; a 4-bit base becomes full precision."""
    for name, layer in list(lora_layers(model)):
        weight = layer.merged_weight()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        replace_layer(model, name, linear)


def save_adapter(model: nn.Module, path: str | Path, *, base_model: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does. `base_model` names the base in the config.

    Under ZeRO-3 the caller gathers `lora_parameters(model)` first.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    tensors = {}
    for name, layer in layers.items():
        for part, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if factor.weight.dim() != 2 or not factor.weight.numel():
                raise ValueError(f"{name}.{part} is partitioned: gather lora_parameters(model) before saving")
            tensors[f"{_PEFT_PREFIX}{name}.{part}.weight"] = factor.weight.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout_p,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights, facts = folder / f"{WEIGHTS_FILE}.partial", folder / f"{CONFIG_FILE}.partial"
    try:
        write_tensors(tensors, weights)
        facts.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights.replace(folder / WEIGHTS_FILE)
        facts.replace(folder / CONFIG_FILE)
    finally:
        weights.unlink(missing_ok=True)
        facts.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file; OSError, naming it, where that fails (safetensors raises an error of its own)."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written ({error})") from None


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Add LoRA layers to the model as the folder's adapter_config.json says and fill them from its weights.

    Raises ValueError that lists all missing, unexpected and misshapen tensors at once.
    """
    config, tensors = read_adapter(path)
    _refuse_lora(model)
    check_adapter(model, config, tensors, path)
    add_lora(
        model,
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=config["target_modules"],
        rslora=config.get("use_rslora", False),
    )
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.weight.copy_(tensors[f"{name}.lora_A"])
            layer.lora_B.weight.copy_(tensors[f"{name}.lora_B"])


def check_adapter(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> None:
    """ValueError unless an adapter's tensors are those that its config asks for on this model (as yet without LoRA)."""
    wanted: dict[str, tuple[int, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Linear4bit) and name.rpartition(".")[2] in config["target_modules"]:
            wanted[f"{name}.lora_A"] = (config["r"], layer.in_features)
            wanted[f"{name}.lora_B"] = (layer.out_features, config["r"])
    linears = {key.rpartition(".")[0].rpartition(".")[2] for key in wanted}
    problems = [f"target_modules: no linear layer is called {name}" for name in {*config["target_modules"]} - linears]
    problems += [f"missing: {key}" for key in wanted.keys() - tensors.keys()]
    problems += [f"unexpected: {key}" for key in tensors.keys() - wanted.keys()]
    problems += [
        f"misshapen: {key}: expected {wanted[key]}, found {tuple(tensors[key].shape)}"
        for key in wanted.keys() & tensors.keys()
        if wanted[key] != tuple(tensors[key].shape)
    ]
    problems += [
        f"{key}: expected floating point, found {tensors[key].dtype}"
        for key in wanted.keys() & tensors.keys()
        if not tensors[key].is_floating_point()
    ]
    if problems:
        shown = [f"{problem:.300}" for problem in sorted(problems)[:40]] + [f"... and {len(problems) - 40} more"] * (
            len(problems) > 40
        )
        raise ValueError(f"{path}: the adapter does not fit this model:\n  " + "\n  ".join(shown))


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter folder's config and its tensors, keyed "<layer name>.lora_A" and ".lora_B".

    Raises ValueError if a file is missing or malformed, or the config asks for what LoRALinear does not compute.
    """
    folder = Path(path)
    check_links(folder)
    try:
        config = read_json(folder / CONFIG_FILE)
        _check_adapter_config(config, folder / CONFIG_FILE)
        raw = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE}; {error.filename or error} is missing"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: truncated or not a safetensors file ({error!s:.300})") from None
    tensors = {key.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): value for key, value in raw.items()}
    return config, tensors


def scaling_of(config: dict[str, Any]) -> float:
    """The factor of an adapter's update, from its adapter_config.json."""
    return float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _check_adapter_config(config: dict[str, Any], file: Path) -> None:
    problems = []
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha", 0), config.get("lora_dropout", 0.0)
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: expected 'LORA', found {config.get('peft_type')!r:.80}")
    if type(rank) is not int or not 0 < rank <= LARGEST_RANK:
        problems.append(f"r: expected a positive integer up to {LARGEST_RANK}, found {rank!r:.80}")
    if type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e9:
        problems.append(f"lora_alpha: expected a number, found {alpha!r:.80}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout: expected a number from 0 to below 1, found {dropout!r:.80}")
    if not isinstance(config.get("use_rslora", False), bool):
        problems.append(f"use_rslora: expected true or false, found {config['use_rslora']!r:.80}")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        problems.append(f"target_modules: expected a list of layer names, found {targets!r:.80}")
    problems += [f"{key}: {config[key]!r:.80} is not supported" for key in _UNSUPPORTED if config.get(key)]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        problems.append(
            f"init_lora_weights: {start!r:.80} changes the base's weights; let PEFT convert it to plain LoRA"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias: expected 'none', found {config['bias']!r:.80}")
    if problems:
        raise ValueError(f"{file}: not an adapter this code can load:\n  " + "\n  ".join(problems))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the model's sub-module called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
