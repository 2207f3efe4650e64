"""One training step on torch's meta device: shapes without data, and a ledger of every tensor's bytes.

What a model keeps and needs while it runs is not guessed by a formula here: the very modules that train run forward
and backward, so that weights, adapters, saved activations, logits and de-quantised scratch follow the code whenever
it changes. Only an attention kernel's own memory has to be said (`AttentionKernel`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from radllama.config import Config
from radllama.lora import ALL_LINEAR, add_lora, replace_layer
from radllama.model import Attend, Llama, LlamaConfig
from radllama.quant import Linear4bit


@dataclass(frozen=True)
class PackShape:
    """The largest pack of a run: prefixes, then reports that each see one of them."""

    segments: tuple[tuple[int, int], ...]  # length, which segment is its prefix (-1: none), as in `data.Pack`
    labels: int
    source: str

    @property
    def tokens(self) -> int:
        return sum(length for length, _ in self.segments)


@dataclass(frozen=True)
class Pass:
    """One micro-step, in bytes above the weights; gradients count only as far as the caller lets them."""

    kept: int  # by the end of the forward pass: what the backward pass will read
    peak: int


class Ledger(TorchDispatchMode):
    """Bytes of all meta tensors that came up under it and live, and the most so far; a model's own do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_meta:
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.add(size)
                    weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class AttentionKernel(torch.autograd.Function):
    """Stands in for the attention of a packed row, whose kernels no meta tensor shows: right shapes, and what is kept.

    On both devices keys and values stand once more for every report, behind those of its prefix. On a CPU
    (`model.packed_attention`, in fp32) the rows' own are kept as well, and each report's mask as floats; on a GPU
    (`attention.varlen_attention`) the gradient of keys and values is summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: int, masked: int, cpu: bool) -> Tensor:  # type: ignore[override]
        _, heads, length, width = q.shape
        copies, mask = k.new_empty(2, k.shape[1], keys, width), q.new_empty(masked)
        logsumexp, out = q.new_empty(heads, length, dtype=torch.float32), torch.empty_like(q)
        ctx.shape, ctx.cpu = k.shape, cpu
        ctx.save_for_backward(q, copies, logsumexp, mask, out, *((k, v) if cpu else ()))
        return out.clone() if cpu else out.view_as(out)  # the segments' outputs in one row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, copies, *_ = ctx.saved_tensors
        q_grad, copies_grad = torch.empty_like(q), torch.empty_like(copies)
        wide = grad.dtype if ctx.cpu else torch.float32
        k_grad, v_grad = (grad.new_empty(ctx.shape, dtype=wide).to(grad.dtype) for _ in range(2))
        del copies_grad
        return q_grad, k_grad, v_grad, None, None, None


def attention_of(shape: PackShape, device: str) -> Callable[..., Attend]:
    """`Llama.packed_attention` for meta tensors."""
    cpu = device == "cpu"
    pairs = [(length, shape.segments[prefix][0] if prefix >= 0 else 0) for length, prefix in shape.segments]
    pairs = [(length, prefix) for length, prefix in pairs if prefix or not cpu]  # a CPU copies only behind a prefix
    keys = sum(length + prefix for length, prefix in pairs)
    masked = sum(length * (length + prefix) for length, prefix in pairs) if cpu else 0

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = masked * q.shape[2] // shape.tokens  # the last layer's queries may be the labels' alone
        wide = torch.promote_types(q.dtype, torch.float32) if cpu else q.dtype
        out: Tensor = AttentionKernel.apply(q.to(wide), k.to(wide), v.to(wide), keys, rows, cpu)
        return out.to(q.dtype)

    return lambda segments, queries=None: attend


def meta_model(config: Config, shape: LlamaConfig, dtype: torch.dtype) -> Llama:
    """The model of a job as `train.build_model` makes it, without its data."""
    with torch.device("meta"):
        model = Llama(shape).to(dtype)
    if config.method == "qlora":
        kind, double = config.quantization.type, config.quantization.double_quant
        for name, layer in list(model.named_modules()):
            if name.rpartition(".")[2] in ALL_LINEAR and isinstance(layer, nn.Linear):
                sizes = layer.in_features, layer.out_features
                replace_layer(model, name, Linear4bit(*sizes, quant_type=kind, double_quant=double, device="meta"))
    if config.method != "full":
        lora = config.lora
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=list(lora.targets))
    return model


class Mark(torch.autograd.Function):
    """Nothing, but `reached` is called when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reached: Callable[[], None]) -> Tensor:  # type: ignore[override]
        ctx.reached = reached
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.reached()
        return grad, None


def forward(model: Llama, shape: PackShape, device: str) -> Tensor:
    """The losses of one pack."""
    tokens = torch.zeros(1, shape.tokens, dtype=torch.long, device="meta")
    labels = torch.zeros(shape.labels, dtype=torch.long, device="meta")
    model.packed_attention = attention_of(shape, device)
    losses: Tensor = model(
        tokens, positions=tokens, segments=torch.tensor(shape.segments), label_positions=labels, labels=labels
    )
    return losses


def micro_step(
    model: Llama, shape: PackShape, *, layers: int, checkpointing: bool, device: str, grow: Callable[[int], int]
) -> Pass:
    """Run forward and backward over one pack of a meta model; grow(numel): bytes that a finished gradient adds.

    The model may have three layers in place of its `layers`. The middle one then stands for all that are missing: what
    it keeps counts that often until its backward pass is over, and from there on what its gradients add. In between
    memory goes up or down by the same for each layer, so that no peak lies there.
    """
    model.model.gradient_checkpointing = checkpointing
    ledger = Ledger(model)
    missing = layers - model.config.num_hidden_layers
    before: list[int] = []  # live bytes at the middle layer's and the last one's start

    def stand_in(sign: int) -> None:
        start, end = before
        ledger.add(sign * missing * (end - start))

    def passed_backward() -> None:
        stand_in(-1)
        ledger.add(missing * sum(grow(p.numel()) for p in model.model.layers[1].parameters() if p.requires_grad))

    def begins(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(before) == 2:  # checkpointing runs a layer again
            return arguments
        before.append(ledger.live)
        if len(before) == 2:
            stand_in(1)
            return arguments
        return Mark.apply(arguments[0], passed_backward), *arguments[1:]

    def finished(parameter: Tensor) -> None:
        parameter.grad = None
        ledger.add(grow(parameter.numel()))

    hooks = [p.register_post_accumulate_grad_hook(finished) for p in model.parameters() if p.requires_grad]
    if missing:
        hooks += [layer.register_forward_pre_hook(begins) for layer in model.model.layers[1:3]]
    with ledger:
        losses = forward(model, shape, device)
        kept = ledger.live
        losses.sum().backward()
    for hook in hooks:
        hook.remove()
    return Pass(kept, ledger.peak)


@dataclass(frozen=True)
class Visit:
    """A module's turn in a pass begins or ends, as DeepSpeed's hooks see it."""

    own: tuple[tuple[str, int, int], ...]  # its parameters: name, elements, bytes
    begins: bool
    kept: float  # the share of the layers whose activations live then


Turn = tuple[str, bool, bool]  # a module, whether it begins, whether what it takes or gives has a gradient


def visits_of(model: Llama, shape: PackShape, *, layers: int, checkpointing: bool, device: str) -> list[Visit]:
    """All turns of one micro-step of the model with `layers` layers, of which this one has three.

    A parameter is that of the innermost module around it that is called: LoRA's layers, computed together, are not, and
    ZeRO-3 gathers what is theirs with the attention or the MLP. The backward pass is the forward pass turned round.
    """
    turns: list[Turn] = []

    def note(name: str, begins: bool, tensors: Any) -> None:
        turns.append((name, begins, any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(tensors))))

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, True, inputs)))
        hooks.append(module.register_forward_hook(lambda _, __, outputs, name=name: note(name, False, outputs)))
    model.model.gradient_checkpointing = False
    forward(model, shape, device)
    for hook in hooks:
        hook.remove()

    own: dict[str, list[tuple[str, int, int]]] = {name: [] for name, *_ in turns}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        while owner not in own:
            owner = owner.rpartition(".")[0]
        own[owner].append((name, parameter.numel(), parameter.numel() * parameter.element_size()))

    few = model.config.num_hidden_layers
    places = {(name, begins): place for place, (name, begins, _) in enumerate(turns)}
    bounds = [(places[f"model.layers.{n}", True], places[f"model.layers.{n}", False] + 1) for n in range(few)]

    def visits(turns: list[Turn], kept: float, copy: int = 0) -> list[Visit]:
        named = {name: tuple((f"{key} {copy}", numel, size) for key, numel, size in own[name]) for name, *_ in turns}
        return [Visit(named[name], begins, kept) for name, begins, _ in turns]

    numbers = [0, *[1] * (layers - few + 1), 2] if few == 3 else list(range(few))
    each = [(turns[slice(*bounds[number])], copy) for copy, number in enumerate(numbers)]
    first, last = turns[: bounds[0][0]], turns[bounds[-1][1] :]
    found = visits(first, 0.0)
    for done, (inner, copy) in enumerate(each, 1):
        found += visits(inner, done / layers, copy)
    found += visits(last, 1.0) + visits(turned(last), 1.0)
    for left, (inner, copy) in reversed(list(enumerate(each, 1))):
        back = turned(inner)
        if checkpointing:  # runs forward again for the first tensor that is missing, up to the last one
            started = next(place for place, (_, begins, _) in enumerate(back) if not begins)
            again = inner[: len(inner) - started]
            back = back[:started] + again + back[started:]
        found += visits(back, left / layers, copy)
    return found + visits(turned(first), 0.0)


def turned(turns: list[Turn]) -> list[Turn]:
    """The backward pass: without what has no gradient."""
    return [(name, not begins, gradient) for name, begins, gradient in reversed(turns) if gradient]


@dataclass(frozen=True)
class Weight:
    """A parameter that stands `times` times in the whole model."""

    kind: str
    numel: int
    width: int
    trainable: bool
    times: int

    @property
    def size(self) -> int:
        return self.numel * self.width


def weights_of(model: Llama, layers: int) -> list[Weight]:
    """All parameters of the model with `layers` layers, of which this one has three."""
    missing = layers - model.config.num_hidden_layers
    found = []
    for name, parameter in model.named_parameters():
        times = 1 + missing if name.startswith("model.layers.1.") else 1
        facts = parameter.numel(), parameter.element_size(), parameter.requires_grad
        found.append(Weight(kind_of(name, parameter), *facts, times))
    return found


def kind_of(name: str, parameter: Tensor) -> str:
    if "lora_" in name:
        return "adapters"
    if name.endswith(".statistics"):
        return "4-bit statistics"
    if parameter.dtype == torch.uint8:
        return "4-bit codes"
    return "embedding and head" if "embed_tokens" in name or "lm_head" in name else "weights"
