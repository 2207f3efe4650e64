"""4-bit linear layers (NF4 and FP4) over bitsandbytes' kernels.

A weight is cut into blocks of 64 values; each block is divided by its largest magnitude ("absmax") and every value is
replaced by the nearest of 16 codes (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3). With double
quantisation the absmax values are themselves stored in 8 bits, in blocks of 256, less their mean.

Codes *and* statistics are uint8 parameters. DeepSpeed's engine casts floating parameters to its dtype, which would ruin
them, and ZeRO-3 partitions parameters only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from radllama.fused import can_pack, linear, pack, packed_product

QuantType = Literal["nf4", "fp4"]
BLOCK = 64  # values that share one absmax
NESTED_BLOCK = 256  # absmax values that share one second-level absmax
STATE_KEY = "quant_state.bitsandbytes__"  # + quant_type: where a checkpoint keeps shape, dtype and offset
_SLICE = BLOCK * NESTED_BLOCK * 16  # values quantised at a time on a CPU, where bitsandbytes takes 12 to 20 bytes each

logger = logging.getLogger("radllama")


class Linear4bit(nn.Module):
    """y = x W^T with a frozen 4-bit W (out_features, in_features), de-quantised to x's dtype at each use.

    weight (out_features * in_features / 2, 1) uint8: two codes a byte, bitsandbytes' layout.
    statistics uint8: the bytes of the fp32 absmax values; or, double-quantised, those of the fp32 second-level absmax
    values and of the fp32 mean, followed by one 8-bit code for each block.
    """

    weight: nn.Parameter
    statistics: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        quant_type: QuantType = "nf4",
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.double_quant = quant_type, double_quant
        values = in_features * out_features
        if values % 2:
            raise ValueError(
                f"4-bit weights are packed in pairs: {out_features} x {in_features} values is an odd number"
            )
        blocks = math.ceil(values / BLOCK)
        self._nested_blocks = math.ceil(blocks / NESTED_BLOCK)
        self._kept: Tensor | None = None
        self._packed: Tensor | None = None
        statistics = 4 * (self._nested_blocks + 1) + blocks if double_quant else 4 * blocks
        self.weight = _frozen(torch.empty(values // 2, 1, dtype=torch.uint8, device=device))
        self.statistics = _frozen(torch.empty(statistics, dtype=torch.uint8, device=device))

    @classmethod
    def from_weight(cls, weight: Tensor, *, quant_type: QuantType = "nf4", double_quant: bool = True) -> Linear4bit:
        """Quantise a floating (out_features, in_features) weight on its device; same codes as bitsandbytes'."""
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"expected a floating (out, in) weight, found {weight.dtype} {tuple(weight.shape)}")
        layer = cls(weight.shape[1], weight.shape[0], quant_type=quant_type, double_quant=double_quant, device="meta")
        flat = weight.detach().reshape(-1)
        codes = torch.empty_like(layer.weight, device=flat.device)
        absmax = torch.empty(math.ceil(len(flat) / BLOCK), dtype=torch.float32, device=flat.device)
        step = _SLICE if flat.device.type == "cpu" else len(flat)  # a GPU's kernel needs no scratch
        for start in range(0, len(flat), step):
            end = min(start + step, len(flat))
            packed, largest = quantize_values(flat[start:end], quant_type)
            codes[start // 2 : end // 2] = packed.view(-1, 1)
            absmax[start // BLOCK : math.ceil(end / BLOCK)] = largest
        if not absmax.isfinite().all():
            raise ValueError("expected a weight of finite values, found NaN or infinity")
        layer.weight = _frozen(codes)
        if double_quant:
            mean = absmax.mean()
            blocks, nested = bnb.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
            layer.statistics = _frozen(torch.cat((_bytes(nested.absmax), _bytes(mean[None]), blocks)))
        else:
            layer.statistics = _frozen(_bytes(absmax))
        return layer

    def quant_state(self, dtype: torch.dtype) -> QuantState:
        """bitsandbytes' description of this weight, to be de-quantised to `dtype`."""
        device = self.weight.device
        state = QuantState(
            absmax=None,
            shape=torch.Size((self.out_features, self.in_features)),
            code=_codes(self.quant_type, device),
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=dtype,
        )
        if not self.double_quant:
            state.absmax = _floats(self.statistics)
            return state
        floats = _floats(self.statistics[: 4 * (self._nested_blocks + 1)])
        state.absmax = self.statistics[4 * (self._nested_blocks + 1) :].detach()
        state.offset = floats[-1]
        state.state2 = QuantState(
            absmax=floats[:-1], code=_dynamic_map(device), blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state.nested = True
        return state

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features); a new tensor, but within `kept`."""
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        return self._dequantized(self.weight.detach(), self.quant_state(dtype))

    def _dequantized(self, codes: Tensor, state: QuantState) -> Tensor:
        shape = state.shape
        if self.in_features % BLOCK:  # bitsandbytes' CPU kernel misreads rows that end in half a block
            state.shape = torch.Size((shape.numel(),))
        weight: Tensor = bnb.dequantize_4bit(codes, state)
        return weight.view(shape)

    def dequantized_rows(self, dtype: torch.dtype, count: int) -> Iterator[Tensor]:
        """`dequantize`, bit for bit, `count` rows (a multiple of 64: rows may share a block) at a time."""
        if count % BLOCK:
            raise ValueError(f"count: expected a multiple of {BLOCK}, found {count}")
        state, codes = self.quant_state(dtype), self.weight.detach()
        absmax = state.absmax
        if self.double_quant:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        blocks = count * self.in_features // BLOCK
        for first in range(0, self.out_features, count):
            part = self.quant_state(dtype)
            part.absmax, part.nested, part.offset, part.state2 = absmax[:blocks], False, None, None
            part.shape = torch.Size((min(count, self.out_features - first), self.in_features))
            yield self._dequantized(codes[: blocks * BLOCK // 2], part)
            absmax, codes = absmax[blocks:], codes[blocks * BLOCK // 2 :]

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without gradients."""
        if self._packed is not None and self._packed.dtype == x.dtype:
            return packed_product(x, self._packed)
        return linear(x, self.dequantize(x.dtype))

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a checkpoint holds for this layer, in the format that transformers and bitsandbytes read."""
        state = self.quant_state(dtype).as_dict(packed=True)
        return {"weight": self.weight.detach()} | {
            # all layers share the two code tables; safetensors refuses tensors that share memory
            f"weight.{key}": value.clone() if key.endswith("quant_map") else value
            for key, value in state.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Linear4bit:
        """The inverse of `tensors`, sharing memory with them where it can.

        Raises ValueError where the format is not one this layer can hold.
        """
        state_key = next((key for key in tensors if key.startswith(f"weight.{STATE_KEY}")), None)
        if state_key is None:
            raise ValueError(f"expected a tensor weight.{STATE_KEY}nf4 or ...fp4 beside the packed weight")
        record = {key.removeprefix("weight."): tensors[key] for key in tensors if key != "weight"}
        try:
            packed = tensors["weight"].contiguous().view(torch.uint8).reshape(-1, 1)
            state = QuantState.from_dict(record, "cpu")
        except (KeyError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError, OverflowError) as error:
            raise ValueError(f"incomplete or malformed 4-bit tensors ({error!r:.200})") from None
        if state.shape is None or len(state.shape) != 2 or state.blocksize != BLOCK:
            raise ValueError(f"expected a 2-D weight in blocks of {BLOCK}, found {state.shape} in {state.blocksize}")
        quant_type = cls._check_codes(state)
        layer = cls(state.shape[1], state.shape[0], quant_type=quant_type, double_quant=state.nested, device="meta")
        absmax, double = state.absmax, state.nested
        if absmax.dtype != (torch.uint8 if double else torch.float32) or (double and not state.offset.numel() == 1):
            raise ValueError(f"absmax: expected uint8 (double-quantised) or float32, found {absmax.dtype}")
        if state.nested:
            parts = (_bytes(state.state2.absmax), _bytes(state.offset.reshape(1)), state.absmax)
            statistics = torch.cat([part.to(packed.device).flatten() for part in parts])
        else:
            statistics = _bytes(state.absmax).flatten()
        for name, found, wanted in (("weight", packed, layer.weight), ("absmax", statistics, layer.statistics)):
            if found.shape != wanted.shape:
                raise ValueError(
                    f"{name}: expected {wanted.numel()} bytes for {tuple(state.shape)}, found {found.numel()}"
                )
        layer.weight, layer.statistics = _frozen(packed), _frozen(statistics)
        return layer

    @staticmethod
    def _check_codes(state: Any) -> QuantType:
        """The layer keeps no code tables of its own, so the checkpoint's must be the standard ones."""
        if state.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"expected quant_type nf4 or fp4, found {state.quant_type!r}")
        quant_type: QuantType = state.quant_type
        tables = [(state.code, _codes(quant_type, torch.device("cpu")))]
        if state.nested:
            if state.state2.blocksize != NESTED_BLOCK:
                raise ValueError(f"expected a nested block size of {NESTED_BLOCK}, found {state.state2.blocksize}")
            tables.append((state.state2.code, _dynamic_map(torch.device("cpu"))))
        for found, standard in tables:
            if found.shape != standard.shape or not torch.allclose(found.float().cpu(), standard, atol=1e-6):
                raise ValueError("a code table (quant_map) differs from bitsandbytes' own")
        return quant_type

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self.quant_type}, double_quant={self.double_quant}"


@contextmanager
def kept(model: nn.Module, dtype: torch.dtype, *, packed: bool = False) -> Iterator[None]:
    """Meanwhile hold the de-quantised 4-bit weights, too: the same numbers, without the work at each use.

    packed: where that is known (`can_pack`), in the order in which the CPU's product reads them. Only for passes
    without gradients: a backward pass would de-quantise again.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    try:
        for layer in layers:
            weight = layer.dequantize(dtype)
            if packed and can_pack(weight):
                layer._packed = pack(weight)
            else:
                layer._kept = weight
        yield
    finally:
        for layer in layers:
            layer._kept = layer._packed = None


class _FrozenMatmul(torch.autograd.Function):
    """x W^T that keeps nothing for the backward pass: W is de-quantised again, and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:  # type: ignore[override]
        ctx.layer = layer  # not the tensors: under ZeRO-3 they come and go between forward and backward
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return linear(grad, ctx.layer.dequantize(grad.dtype).T), None


def quantize_values(values: Tensor, quant_type: QuantType) -> tuple[Tensor, Tensor]:
    """Packed codes (values / 2,) uint8 and absmax (blocks,) fp32 of a flat floating tensor: bitsandbytes', bit for bit.

    A whole slice on a CPU goes through `compiled_quantizer`, ten times as fast; all else through bitsandbytes itself.
    """
    if values.device.type == "cpu" and len(values) == _SLICE:
        quantizer = compiled_quantizer(quant_type, values.dtype)
        if quantizer is not None:
            return quantizer(values)
    packed, state = bnb.quantize_4bit(values, blocksize=BLOCK, quant_type=quant_type)
    return packed.flatten(), state.absmax


@cache
def compiled_quantizer(quant_type: QuantType, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """bitsandbytes' 4-bit quantiser for one slice of `dtype`, compiled; None where nothing can be compiled.

    A code is found by comparing with the 15 midpoints between neighbouring values, where bitsandbytes searches: fp32
    compares, summed, become vector instructions. The first call on a machine compiles (seconds), later ones load that.
    """
    table = bnb.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(table)  # FP4's codes do not ascend with their values
    midpoints = ((table[order[:-1]] + table[order[1:]]) / 2).tolist()
    codes = order.tolist()

    def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
        blocks = values.view(-1, BLOCK).float()
        absmax = blocks.abs().amax(1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)  # not blocks / absmax: bitsandbytes'
        code = torch.full_like(scaled, codes[0])
        for midpoint, below, above in zip(midpoints, codes, codes[1:], strict=False):
            code = code + torch.where(scaled > midpoint, float(above - below), 0.0)
        pairs = code.to(torch.uint8).view(
            torch.int16
        )  # two codes: the first is the low byte, and goes to the high half
        return (pairs << 4 | pairs >> 8).to(torch.uint8).flatten(), absmax

    compiled: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(quantize, dynamic=False)
    try:
        compiled(torch.zeros(_SLICE, dtype=dtype))
    except Exception as error:  # no compiler, one that fails, a cache that cannot be written: each its own class
        logger.warning("nothing can be compiled here (%s): quantising takes ten times as long", type(error).__name__)
        return None
    return compiled


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _bytes(floats: Tensor) -> Tensor:
    return floats.detach().float().contiguous().view(torch.uint8)


def _floats(raw: Tensor) -> Tensor:
    raw = raw.detach()
    if raw.storage_offset() % 4 or raw.data_ptr() % 4:
        raw = raw.clone()  # a gathered partition need not be aligned to 4 bytes
    return raw.view(torch.float32)


@cache  # made of a Python list: on a GPU each making would wait for all work under way
def _codes(quant_type: QuantType, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit type."""
    table: Tensor = bnb.get_4bit_type(quant_type, device=device)
    return table


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 256 codes for the second level."""
    return bnb.create_dynamic_map().to(device)
