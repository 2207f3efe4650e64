"""4-bit layers against bitsandbytes' own quantiser, a decoder written out by hand, and a plain linear layer.

`check_layer` and `check_bytes` are the oracles; the mutation tests break the layer and expect them to raise.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radllama import quant
from radllama.fused import can_pack, linear, pack
from radllama.quant import BLOCK, NESTED_BLOCK, STATE_KEY, Linear4bit, QuantType, kept

# QLoRA's table (arXiv 2305.14314, appendix E), and the 4-bit floats (sign, two exponent bits, one mantissa bit).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
CODES: dict[str, Tensor] = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4 + [-code for code in FP4])}

VARIANTS = list(itertools.product(("nf4", "fp4"), (True, False)))
# (out, in): whole blocks; not whole; more than one second-level block, not whole; many; rows shorter than a block; rows
# that end in half a block
SHAPES = [(16, 64), (3, 22), (130, 130), (300, 200), (500, 34), (66, 96), (5, 32)]


def random_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of unlike magnitude and one outlier: blocks' absmax values differ widely, as in real weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(out_features, in_features, generator=generator)
    weight *= torch.rand(out_features, 1, generator=generator) * 2
    weight[out_features // 2, in_features // 3] = 0.7
    return weight.to(dtype)


def by_hand(layer: Linear4bit) -> Tensor:
    """The weight in fp32 from the layer's raw bytes, sharing no code with bitsandbytes but the table of 256 codes."""
    values = layer.out_features * layer.in_features
    blocks = -(-values // BLOCK)
    codes = layer.weight.flatten().long()
    halves = CODES[layer.quant_type][torch.stack((codes >> 4, codes & 15), dim=1).flatten()]
    raw = layer.statistics.detach().clone()
    if layer.double_quant:
        nested = -(-blocks // NESTED_BLOCK)
        floats, table = raw[: 4 * (nested + 1)].clone().view(torch.float32), bnb.create_dynamic_map()
        absmax = table[raw[4 * (nested + 1) :].long()] * floats[:-1].repeat_interleave(NESTED_BLOCK)[:blocks]
        absmax = absmax + floats[-1]
    else:
        absmax = raw.view(torch.float32)
    return (halves * absmax.repeat_interleave(BLOCK)[:values]).view(layer.out_features, layer.in_features)


def check_layer(layer: Linear4bit, dtype: torch.dtype = torch.float32) -> None:
    """Forward and backward pass equal those of a linear layer over the de-quantised weight; the weight gets none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, layer.in_features, generator=generator).to(dtype).requires_grad_()
    cotangent = torch.randn(2, 5, layer.out_features, generator=generator).to(dtype)
    weight = by_hand(layer).to(dtype)
    torch.testing.assert_close(layer.dequantize(dtype), weight, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)
    weight = layer.dequantize(dtype).requires_grad_()
    expected = F.linear(x, weight)
    (grad,) = torch.autograd.grad(expected, x, cotangent)
    exact = linear(x.detach(), weight.detach())
    y = layer(x)
    y.backward(cotangent)
    assert y.dtype == dtype
    assert torch.equal(y, exact)
    torch.testing.assert_close(y, expected)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad)
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None
    assert layer.statistics.grad is None


def check_bytes(weight: Tensor, quant_type: QuantType, double_quant: bool) -> None:
    """Every tensor of the checkpoint format is bitsandbytes', bit for bit."""
    layer = Linear4bit.from_weight(weight, quant_type=quant_type, double_quant=double_quant)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=quant_type, compress_statistics=double_quant)
    expected = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    found = layer.tensors(weight.dtype)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_equals_a_linear_layer_over_the_dequantised_weight(
    quant_type: QuantType, double_quant: bool, shape: tuple[int, int]
) -> None:
    weight = random_weight(*shape)
    layer = Linear4bit.from_weight(weight, quant_type=quant_type, double_quant=double_quant)
    check_layer(layer)
    # No value is farther from its code than half the widest gap between codes, .304 for NF4 and 1/3 for FP4 (and, at
    # most, 2 % of the largest absmax that the second quantisation costs).
    gap, size = {"nf4": 0.304, "fp4": 1 / 3}[quant_type], weight.numel()
    absmax = F.pad(weight.flatten().abs(), (0, -size % BLOCK)).view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)[:size]
    error = (layer.dequantize(torch.float32) - weight).abs().flatten()
    assert (error <= gap / 2 * absmax * 1.001 + (0.02 * absmax.max() if double_quant else 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_half_precision_inputs(quant_type: QuantType, double_quant: bool, dtype: torch.dtype) -> None:
    weight = random_weight(130, 130, dtype)
    check_layer(Linear4bit.from_weight(weight, quant_type=quant_type, double_quant=double_quant), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_bytes_equal_bitsandbytes(
    quant_type: QuantType, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_bytes(random_weight(*shape, dtype), quant_type, double_quant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (300, 200), (130, 130)])
@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_slices_leave_no_mark(
    quant_type: QuantType,
    double_quant: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert quant._SLICE % (BLOCK * NESTED_BLOCK) == 0
    monkeypatch.setattr(quant, "compiled_quantizer", lambda quant_type, dtype: None)
    monkeypatch.setattr(quant, "_SLICE", BLOCK * NESTED_BLOCK)
    check_bytes(random_weight(*shape, dtype), quant_type, double_quant)


def adversarial(quant_type: QuantType, dtype: torch.dtype) -> Tensor:
    """One slice: midpoints and their neighbours in blocks of every magnitude, zeros of both signs, denormals, noise."""
    table = CODES[quant_type].sort().values
    middle = (table[1:] + table[:-1]) / 2
    up, down = torch.full_like(middle, 2.0), torch.full_like(middle, -2.0)
    ties = torch.cat((middle, torch.nextafter(middle, up), torch.nextafter(middle, down)))  # 45 of a block's 64 values
    generator = torch.Generator().manual_seed(5)
    blocks = 0.02 * torch.randn(quant._SLICE // BLOCK, BLOCK, generator=generator)
    largest = torch.logspace(-44, 38, 600, dtype=torch.float64).float().clamp(max=torch.finfo(dtype).max / 2)
    blocks[:600, 0], blocks[:600, 1:46] = largest, ties * largest[:, None]
    blocks[:600, 46:] = largest[:, None] * torch.rand(600, 18, generator=generator).mul(2).sub(1)
    blocks[600:700, 1:46], blocks[600:700, 0] = ties, 1.0
    blocks[700:800], blocks[800:900] = 0.0, -0.0
    blocks[900:1000, ::2] = -0.0
    blocks[1000:1100] = torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
    blocks[1100:1500] = blocks[1100:1500].sign() * 2.0 ** torch.randint(-149, 0, (400, 64), generator=generator)
    return blocks.to(dtype).flatten()


@pytest.mark.parametrize(
    ("quant_type", "dtype"),
    [("nf4", torch.float32), ("nf4", torch.bfloat16), ("nf4", torch.float16), ("fp4", torch.float32)],
)
def test_the_compiled_quantizer_is_bitsandbytes_bit_for_bit(quant_type: QuantType, dtype: torch.dtype) -> None:
    values = adversarial(quant_type, dtype)
    torch._dynamo.reset()
    quantizer = quant.compiled_quantizer.__wrapped__(quant_type, dtype)
    assert quantizer is not None, "the tests need a C++ compiler"
    for weight in (values, values.roll(32), values.flip(0)):
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=quant_type)
        codes, absmax = quantizer(weight)
        assert torch.equal(codes.view(-1, 1), packed)
        assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


def test_whole_slices_are_compiled_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    quantizer = quant.compiled_quantizer("nf4", torch.float32)

    def counted(values: Tensor) -> Any:
        sizes.append(len(values))
        assert quantizer is not None
        return quantizer(values)

    monkeypatch.setattr(quant, "compiled_quantizer", lambda quant_type, dtype: counted)
    check_bytes(random_weight(1030, 526), "nf4", True)
    assert sizes == [quant._SLICE] * 2


def test_without_a_compiler_bitsandbytes_quantises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: failing)
    quant.compiled_quantizer.cache_clear()
    try:
        check_bytes(random_weight(520, 1030), "nf4", True)
        check_bytes(random_weight(520, 1030), "nf4", True)
    finally:
        quant.compiled_quantizer.cache_clear()
    assert [record.message for record in caplog.records] == [
        "nothing can be compiled here (RuntimeError): quantising takes ten times as long"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(130, 130), (512, 512)])
def test_a_weight_that_is_not_finite_is_refused(value: float, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    weight[100, 70] = value
    with pytest.raises(ValueError, match="found NaN or infinity"):
        Linear4bit.from_weight(weight)


def test_the_weight_may_be_a_transposed_view() -> None:
    weight = random_weight(96, 130)
    for view in (weight.T, weight[::2]):
        layer, copy = (Linear4bit.from_weight(tensor) for tensor in (view, view.contiguous()))
        assert torch.equal(layer.weight, copy.weight)
        assert torch.equal(layer.statistics, copy.statistics)


@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_zero_blocks_stay_zero(quant_type: QuantType, double_quant: bool) -> None:
    weight = random_weight(8, 128)
    weight[2] = weight[5, :64] = 0
    found = Linear4bit.from_weight(weight, quant_type=quant_type, double_quant=double_quant).dequantize(torch.float32)
    assert (found[weight == 0] == 0).all()
    assert (found[2:6, 64:] != 0).any()
    nothing = Linear4bit.from_weight(torch.zeros(8, 128), quant_type=quant_type, double_quant=double_quant)
    assert (nothing.dequantize(torch.float32) == 0).all()


def _scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return 1.001 * grad @ ctx.layer.dequantize(grad.dtype), None


def _without_mean(original: Callable[..., Any]) -> Callable[..., Any]:
    def state(layer: Linear4bit, dtype: torch.dtype) -> Any:
        found = original(layer, dtype)
        found.offset = torch.zeros(())
        return found

    return state


def _nibbles_swapped(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dequantize(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
        return original(layer, dtype).unflatten(1, (-1, 2)).flip(2).flatten(1)

    return dequantize


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "gradient scaled": lambda patch: patch.setattr(quant._FrozenMatmul, "backward", _scaled_backward),
    "mean of the absmax values left out": lambda patch: patch.setattr(
        Linear4bit, "quant_state", _without_mean(Linear4bit.quant_state)
    ),
    "halves of a byte swapped": lambda patch: patch.setattr(
        Linear4bit, "dequantize", _nibbles_swapped(Linear4bit.dequantize)
    ),
    "output scaled": lambda patch: patch.setattr(
        Linear4bit, "forward", lambda self, x: F.linear(x, self.dequantize(x.dtype) * 1.001)
    ),
    "input detached": lambda patch: patch.setattr(
        Linear4bit, "forward", lambda self, x: F.linear(x.detach(), self.dequantize(x.dtype))
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_layer_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear4bit.from_weight(random_weight(130, 130))
    check_layer(layer)
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_layer(layer)


def test_a_slice_that_cuts_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "_SLICE", BLOCK * 10 + 32)
    with pytest.raises((AssertionError, RuntimeError)):
        check_bytes(random_weight(130, 130), "nf4", False)


@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_casts_of_the_model_leave_codes_and_statistics_alone(quant_type: QuantType, double_quant: bool) -> None:
    layer = Linear4bit.from_weight(random_weight(130, 130), quant_type=quant_type, double_quant=double_quant)
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 130), "layer": layer})
    weight, statistics, x = layer.weight.clone(), layer.statistics.clone(), torch.randn(3, 130)
    y = layer(x)
    for cast in (model.bfloat16, model.half, model.double, model.float):
        cast()
        assert layer.weight.dtype == layer.statistics.dtype == torch.uint8
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.statistics, statistics)
    assert torch.equal(layer(x), y)


def test_state_dict_round_trip() -> None:
    layer, other = (Linear4bit.from_weight(random_weight(130, 130, seed=seed)) for seed in (0, 1))
    assert not torch.equal(layer.weight, other.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.dequantize(torch.float32), other.dequantize(torch.float32))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    layers = nn.Sequential(*(Linear4bit.from_weight(random_weight(64, 64, seed=seed)) for seed in range(2)))
    x = torch.randn(3, 64, requires_grad=True)
    layers(x).square().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    checkpoint(layers, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer, x = Linear4bit.from_weight(random_weight(64, 64)), torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert not kept
    y.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear(x, layer.dequantize(torch.float32))
    assert kept  # what a plain linear layer would keep


def test_code_tables_are_made_once() -> None:
    """A table made anew at each use would stop a GPU's queue at each use."""
    layers = [Linear4bit.from_weight(random_weight(16, 64, seed=seed)) for seed in (0, 1)]
    first, second = (layer.quant_state(torch.bfloat16) for layer in layers)
    assert first.code is second.code
    assert first.state2.code is second.state2.code


def test_statistics_need_no_alignment() -> None:
    """A partition gathered by ZeRO-3 may start at any byte."""
    for double_quant in (True, False):
        layer = Linear4bit.from_weight(random_weight(130, 130), double_quant=double_quant)
        expected = layer.dequantize(torch.float32)
        buffer = torch.zeros(layer.statistics.numel() + 1, dtype=torch.uint8)
        buffer[1:] = layer.statistics
        layer.statistics.data = buffer[1:]
        assert torch.equal(layer.dequantize(torch.float32), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), VARIANTS)
def test_tensors_round_trip(quant_type: QuantType, double_quant: bool, shape: tuple[int, int]) -> None:
    layer = Linear4bit.from_weight(random_weight(*shape), quant_type=quant_type, double_quant=double_quant)
    tensors = layer.tensors(torch.bfloat16)
    again = Linear4bit.from_tensors(tensors)
    assert (again.out_features, again.in_features) == shape
    assert (again.quant_type, again.double_quant) == (quant_type, double_quant)
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again.statistics, layer.statistics)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_in_a_float_type_are_read(storage: torch.dtype) -> None:
    """transformers writes them so with bnb_4bit_quant_storage."""
    weight = random_weight(128, 64)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    expected = Linear4bit.from_weight(weight, double_quant=False)
    found = Linear4bit.from_tensors(tensors)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.statistics, expected.statistics)


def _record(tensors: dict[str, Tensor], **changes: Any) -> None:
    key = f"weight.{STATE_KEY}nf4"
    record = json.loads(tensors[key].numpy().tobytes()) | changes
    tensors[key] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)


SPOILERS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no record": (lambda t: t.pop(f"weight.{STATE_KEY}nf4"), r"quant_state\.bitsandbytes__nf4 or \.\.\.fp4"),
    "no codes": (lambda t: t.pop("weight"), "incomplete or malformed"),
    "no absmax": (lambda t: t.pop("weight.absmax"), "incomplete or malformed .*absmax"),
    "no code table": (lambda t: t.pop("weight.quant_map"), "incomplete or malformed .*quant_map"),
    "no nested code table": (lambda t: t.pop("weight.nested_quant_map"), "incomplete or malformed"),
    "unknown tensor": (lambda t: t.update({"weight.scale": torch.zeros(1)}), "incomplete or malformed"),
    "record is no JSON": (
        lambda t: t.update({f"weight.{STATE_KEY}nf4": torch.tensor([1, 2], dtype=torch.uint8)}),
        "incomplete or malformed",
    ),
    "unknown dtype": (lambda t: _record(t, dtype="float31"), "incomplete or malformed"),
    "shape of one dimension": (lambda t: _record(t, shape=[16900]), "2-D weight"),
    "another block size": (lambda t: _record(t, blocksize=128), "blocks of 64"),
    "another nested block size": (lambda t: _record(t, nested_blocksize=128), "nested block size of 256"),
    "another type": (lambda t: _record(t, quant_type="int4"), "nf4 or fp4"),
    "larger shape": (lambda t: _record(t, shape=[130, 132]), "weight: expected 8580 bytes .* found 8450"),
    "odd shape": (lambda t: _record(t, shape=[129, 129]), "odd number"),
    "codes cut short": (lambda t: t.update(weight=t["weight"][:-1]), "weight: expected 8450 bytes .* found 8449"),
    "absmax cut short": (lambda t: t.update({"weight.absmax": t["weight.absmax"][:-1]}), "absmax: expected"),
    "other codes": (lambda t: t["weight.quant_map"].neg_(), "code table"),
    "other nested codes": (lambda t: t["weight.nested_quant_map"].mul_(2), "code table"),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_malformed_tensors_are_refused(spoiler: str) -> None:
    tensors = {k: v.clone() for k, v in Linear4bit.from_weight(random_weight(130, 130)).tensors(torch.float32).items()}
    Linear4bit.from_tensors(tensors)
    spoil, message = SPOILERS[spoiler]
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        Linear4bit.from_tensors(tensors)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(3, 5), "odd number"),
        (torch.randn(64), "expected a floating"),
        (torch.ones(8, 8, dtype=torch.int64), "expected a floating"),
        (torch.randn(8, 8, dtype=torch.float64), "16/32-bit floats"),
    ],
)
def test_weights_it_cannot_hold(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Linear4bit.from_weight(weight)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_by_parts_are_the_whole_bit_for_bit(quant_type: QuantType, double_quant: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(330, 96, generator=torch.Generator().manual_seed(0))  # 64 rows are 96 blocks; 330 no multiple
    layer = Linear4bit.from_weight(weight, quant_type=quant_type, double_quant=double_quant)
    parts = list(layer.dequantized_rows(dtype, 128))
    assert [len(part) for part in parts] == [128, 128, 74]
    assert torch.equal(torch.cat(parts), layer.dequantize(dtype))
    with pytest.raises(ValueError, match="multiple of 64, found 100"):
        next(layer.dequantized_rows(dtype, 100))


@pytest.mark.parametrize("shape", [(0, 192), (1, 192), (2, 1, 192), (2, 3, 192), (40, 192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_gives_the_plain_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Linear4bit.from_weight(torch.randn(130, 192, generator=torch.Generator().manual_seed(0)) * 0.1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = layer(x)
    with kept(layer, dtype, packed=True):
        assert (layer._packed is None) != can_pack(torch.empty(0, dtype=dtype))
        found = layer(x)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)
        if dtype == torch.float32 and can_pack(x):
            layer._packed = pack(2 * layer.dequantize(dtype))
            torch.testing.assert_close(layer(x), 2 * expected)  # and it is the packed one that is used
            torch.testing.assert_close(layer(x.bfloat16()).float(), expected, atol=0.1, rtol=0.1)  # for its dtype alone
    assert layer._packed is None
    assert torch.equal(layer(x), expected)


def test_without_onednn_the_plain_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "can_pack", lambda weight: False)
    layer = Linear4bit.from_weight(torch.randn(64, 64))
    with kept(layer, torch.float32, packed=True):
        assert layer._packed is None
        assert layer._kept is not None
