"""Logits and gradients against transformers' LlamaForCausalLM, and proof that the comparison would notice.

`check_parity` is the oracle: it raises AssertionError where a logit or a gradient is off. The mutation test breaks
the model in one place at a time and expects it to raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import random_llama, tiny_config
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from radllama import model as model_module
from radllama.model import (
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    inverse_frequencies,
    packed_attention,
    rotary_angles,
)

CPU = torch.device("cpu")
LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA32 = replace(LLAMA31, factor=32.0)

CASES: dict[str, LlamaConfig] = {
    "llama 3": tiny_config(),
    "llama 3.1 and 3.3": tiny_config(rope_scaling=LLAMA31, max_position_embeddings=131_072, head_dim=16),
    "llama 3.2": tiny_config(
        rope_scaling=LLAMA32, max_position_embeddings=131_072, head_dim=16, tie_word_embeddings=True
    ),
    "llama 2": tiny_config(rope_theta=10_000.0, num_key_value_heads=4, rms_norm_eps=1e-6),
    "8 heads of queries to 8 of keys": tiny_config(num_attention_heads=8, num_key_value_heads=8),
    "8 heads of queries to 4 of keys": tiny_config(num_attention_heads=8, num_key_value_heads=4),
    "8 heads of queries to 2 of keys": tiny_config(num_attention_heads=8, num_key_value_heads=2),
    "8 heads of queries to 1 of keys": tiny_config(num_attention_heads=8, num_key_value_heads=1),
    "explicit head_dim": tiny_config(head_dim=14),
    # All at once, with an epsilon that shows: the mutation test needs each part to matter.
    "everything": tiny_config(
        num_attention_heads=8,
        head_dim=6,
        rope_scaling=LLAMA31,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        rms_norm_eps=0.05,
    ),
}


def as_transformers(model: Llama, **changes: Any) -> transformers.LlamaForCausalLM:
    """The same weights in transformers' model; its config is read from our `to_dict`."""
    config = transformers.LlamaConfig(**(model.config.to_dict() | changes), attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval()


def inputs(config: LlamaConfig, batch: int = 2, length: int = 14) -> tuple[Tensor, Tensor]:
    """Tokens and positions (B, T). With RoPE scaling the positions are far apart, since it slows far turns alone."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
    steps = torch.randint(1, 4000 if config.rope_scaling else 2, (batch, length), generator=generator)
    return tokens, steps.cumsum(1) - steps[:, :1]


def their_logits(theirs: transformers.LlamaForCausalLM, tokens: Tensor, positions: Tensor) -> Tensor:
    # Without a mask, transformers takes positions with gaps for a packed row.
    return theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def assert_equal_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Every gradient elementwise, 1e-4 at gradient scale 1."""
    for name, parameter in theirs.named_parameters():
        gradient, expected = ours.get_parameter(name).grad, parameter.grad
        assert gradient is not None, name
        assert expected is not None, name
        scale = expected.pow(2).mean().sqrt()
        assert scale > 0, f"{name}: nothing to compare"
        torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-4, rtol=0, msg=f"the gradient of {name}")


def check_parity(config: LlamaConfig) -> None:
    """AssertionError unless logits and the gradients of all parameters equal transformers' elementwise."""
    ours = random_llama(config)
    theirs = as_transformers(ours)
    tokens, positions = inputs(config)
    logits, expected = ours(tokens, positions=positions), their_logits(theirs, tokens, positions)
    assert expected.std() >= 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8))
    (logits * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_transformers(config: LlamaConfig) -> None:
    check_parity(config)


@pytest.mark.parametrize("case", ["llama 3.1 and 3.3", "llama 3.2", "everything"])
def test_rope_scaling_shows_at_the_positions_compared(case: str) -> None:
    config = CASES[case]
    ours = random_llama(config)
    scaled, unscaled = as_transformers(ours), as_transformers(ours, rope_scaling=None)
    tokens, positions = inputs(config)
    difference = their_logits(scaled, tokens, positions) - their_logits(unscaled, tokens, positions)
    assert difference.abs().max() > 0.1


def test_positions_count_from_zero_by_default() -> None:
    ours = random_llama(CASES["llama 3"])
    tokens, positions = inputs(ours.config)
    assert positions[0].tolist() == list(range(14))
    assert torch.equal(ours(tokens), ours(tokens, positions=positions))


@pytest.mark.parametrize("scaling", [None, LLAMA31, LLAMA32])
def test_frequencies_of_the_real_shapes_equal_transformers(scaling: RopeScaling | None) -> None:
    config = tiny_config(hidden_size=4096, num_attention_heads=32, head_dim=128, rope_scaling=scaling)
    expected = LlamaRotaryEmbedding(transformers.LlamaConfig(**config.to_dict())).inv_freq
    assert torch.equal(inverse_frequencies(config, CPU), expected)


def without_scaling(config: LlamaConfig, device: torch.device) -> Tensor:
    return inverse_frequencies(replace(config, rope_scaling=None), device)


def scaling_without_bounds(config: LlamaConfig, device: torch.device) -> Tensor:
    """Llama 3.1's scaling with no blend: all dimensions slowed (position interpolation)."""
    return without_scaling(config, device) / 8.0


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Meta's order of dimensions: 2i against 2i + 1."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = cos.shape[-1] // 2
    return x * cos[..., :half].repeat_interleave(2, -1) + turned * sin[..., :half].repeat_interleave(2, -1)


def norm_of_centred(self: RMSNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)


def norm_without_weight(self: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=self.eps) + 0 * self.weight


def norm_of_other_epsilon(self: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


def attend_with(**changes: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **({"is_causal": True, "enable_gqa": True} | changes))

    return attend


def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GQA with the key heads in turn (0 1 0 1) where Llama has them in runs (0 0 1 1)."""
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_to_previous_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The causal mask one too strict: no token but the first sees itself."""
    sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-1)
    sees[0, 0] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)


def values_of_self(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def gelu_mlp(self: model_module.MLP, x: Tensor) -> Tensor:
    gate, up = self.gate_up(x)
    return self.down_proj(F.gelu(gate) * up)


def parallel_layer(
    self: model_module.DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, attend: model_module.Attend, queries: None
) -> Tensor:
    """The MLP beside the attention, not after it."""
    attended = self.self_attn(self.input_layernorm(x), cos, sin, attend)
    return x + attended + self.mlp(self.post_attention_layernorm(x))


def no_residual(
    self: model_module.DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, attend: model_module.Attend, queries: None
) -> Tensor:
    x = self.self_attn(self.input_layernorm(x), cos, sin, attend)
    return x + self.mlp(self.post_attention_layernorm(x))


def rotated_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


build, gate_up = Llama.__init__, model_module.MLP.gate_up


def untied(self: Llama, config: LlamaConfig) -> None:
    build(self, replace(config, tie_word_embeddings=False))
    self.config = config


MUTATIONS: dict[str, tuple[str, Any]] = {
    "RoPE gone": ("rotate", lambda x, cos, sin: x),
    "RoPE turns the other way": ("rotate", lambda x, cos, sin: x * cos - rotated_half(x) * sin),
    "RoPE interleaved": ("rotate", rotate_interleaved),
    "RoPE of another theta": (
        "inverse_frequencies",
        lambda config, device: inverse_frequencies(replace(config, rope_theta=10_000.0), device),
    ),
    "RoPE by the place in the row": (
        "rotary_angles",
        lambda positions, config, dtype: rotary_angles(
            torch.arange(positions.shape[1]).expand_as(positions), config, dtype
        ),
    ),
    "RoPE scaling gone": ("inverse_frequencies", without_scaling),
    "RoPE scaling of all dimensions": ("inverse_frequencies", scaling_without_bounds),
    "causal mask gone": ("causal_attention", attend_with(is_causal=False)),
    "causal mask too strict": ("causal_attention", attend_to_previous_tokens),
    "GQA in tiles": ("causal_attention", attend_in_tiles),
    "attention gone": ("causal_attention", lambda q, k, v: torch.zeros_like(q)),
    "attention to oneself alone": ("causal_attention", values_of_self),
    "attention not scaled": ("causal_attention", attend_with(scale=1.0)),
    "RMSNorm's epsilon": ("RMSNorm.forward", norm_of_other_epsilon),
    "RMSNorm's weight": ("RMSNorm.forward", norm_without_weight),
    "RMSNorm centres": ("RMSNorm.forward", norm_of_centred),
    "gate and up swapped": ("MLP.gate_up", lambda self, x: gate_up(self, x)[::-1]),
    "GELU for SiLU": ("MLP.forward", gelu_mlp),
    "parallel layer": ("DecoderLayer.forward", parallel_layer),
    "no residual": ("DecoderLayer.forward", no_residual),
    "head not tied": ("Llama.__init__", untied),
}


@pytest.mark.parametrize(("target", "mutant"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_parity_notices_a_broken_model(monkeypatch: pytest.MonkeyPatch, target: str, mutant: Any) -> None:
    monkeypatch.setattr(f"radllama.model.{target}", mutant)
    with pytest.raises(AssertionError):
        check_parity(CASES["everything"])


def test_gradients_notice_what_logits_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits, but no gradient through the queries: the comparison of gradients must fail."""
    attend = attend_with()
    monkeypatch.setattr("radllama.model.causal_attention", lambda q, k, v: attend(q.detach() + 0 * q, k, v))
    with pytest.raises(AssertionError, match="the gradient of"):
        check_parity(CASES["llama 3"])


# Packed attention (tests/test_data.py has whole packs)


@pytest.mark.parametrize("seed", range(8))
def test_packed_attention_equals_one_mask_over_the_row(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (7,), generator=generator).tolist()
    prefixes = [-1, -1, 0, 1, -1, 0, 4]
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    sees = torch.tensor(
        [
            [owner[key] in (owner[query], prefixes[owner[query]]) and key <= query for key in range(len(owner))]
            for query in range(len(owner))
        ]
    )
    q = torch.randn(1, 4, len(owner), 8, generator=generator)
    k, v = torch.randn(2, 1, 2, len(owner), 8, generator=generator)
    outputs = packed_attention(torch.tensor([lengths, prefixes]).T)(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
    torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=0)


def test_queries_of_a_packed_row_get_what_they_get_among_all() -> None:
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[4, -1], [3, 0], [5, -1], [2, 0], [6, 2], [1, 2]])
    q = torch.randn(1, 4, 21, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 21, 8, generator=generator)
    every = packed_attention(segments)(q, k, v)
    for wanted in ([0], [20], [1, 3], [7, 9, 10, 11], [5, 6, 12, 16, 18, 20], range(21)):
        queries = torch.tensor(list(wanted))
        some = packed_attention(segments, queries)(q[:, :, queries], k, v)
        torch.testing.assert_close(some, every[:, :, queries], atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_at_label_positions_alone_changes_nothing(checkpointing: bool) -> None:
    """Losses and every gradient of a packed row are those of the whole row's logits; only its labels' rows are run."""
    model = random_llama(tiny_config())
    model.model.gradient_checkpointing = checkpointing
    tokens = torch.randint(97, (1, 23), generator=torch.Generator().manual_seed(3))
    segments, where = torch.tensor([[5, -1], [11, 0], [7, 0]]), torch.tensor([9, 12, 13, 14, 21, 22])
    labels, results, rows = torch.tensor([4, 96, 0, 8, 8, 1]), [], list[int]()
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    for whole in (True, False):
        model.zero_grad()
        if whole:
            losses = F.cross_entropy(model(tokens, segments=segments)[0, where], labels, reduction="none")
        else:
            losses = model(tokens, segments=segments, label_positions=where, labels=labels)
        (losses * torch.arange(1, 7)).sum().backward()
        results.append([losses.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert rows == ([23, 23, 6, 6] if checkpointing else [23, 6])
    assert len(results[0]) == 1 + len(list(model.parameters()))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_masks_made_in_inference_mode_serve_training() -> None:
    model = random_llama(tiny_config())
    tokens, segments = torch.arange(23)[None], torch.tensor([[5, -1], [11, 0], [7, 0]])
    with torch.inference_mode():
        expected = model(tokens, segments=segments)
    logits = model(tokens, segments=segments)
    logits.sum().backward()
    assert torch.equal(logits.detach(), expected)


# What forward returns, memory


def test_label_positions_and_labels() -> None:
    model = random_llama(tiny_config())
    tokens, _ = inputs(model.config)
    where, labels = torch.tensor([3, 0, 13, 14, 27]), torch.tensor([5, 96, 0, 41, 5])
    every = model(tokens).flatten(0, 1)
    at_labels = model(tokens, label_positions=where)
    torch.testing.assert_close(at_labels, every[where], atol=1e-5, rtol=0)
    losses = model(tokens, label_positions=where, labels=labels)
    torch.testing.assert_close(losses, F.cross_entropy(every[where], labels, reduction="none"), atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    forward = model_module.DecoderLayer.forward

    def count(self: model_module.DecoderLayer, *arguments: Any) -> Tensor:
        calls.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(model_module.DecoderLayer, "forward", count)
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = random_llama(tiny_config())
        model.model.gradient_checkpointing = checkpointing
        tokens, _ = inputs(model.config)
        calls.clear()
        loss = model(tokens, label_positions=torch.arange(20), labels=tokens.flatten()[1:21]).sum()
        assert len(calls) == 2
        loss.backward()
        assert len(calls) == (4 if checkpointing else 2)  # each layer runs again in the backward pass
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(gradients[-1]) == len(list(model.parameters()))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, gradients[1][name]), name


# config.json

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "vocab_size": 32000,
}


def write(folder: Path, config: Any) -> Path:
    file = folder / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_reads_what_transformers_4_wrote_of_llama_3_1(tmp_path: Path, kind: str) -> None:
    scaling = dict(LLAMA_31_8B["rope_scaling"])  # type: ignore[call-overload]
    scaling[kind] = scaling.pop("rope_type")
    config = LlamaConfig.from_json(write(tmp_path, LLAMA_31_8B | {"rope_scaling": scaling}))
    assert config == LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=LLAMA31,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )
    assert LlamaConfig.from_json(tmp_path) == config  # the folder will do


def test_reads_the_first_llama_2_without_theta_and_key_heads(tmp_path: Path) -> None:
    config = LlamaConfig.from_json(write(tmp_path, LLAMA_2_7B))
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (32, 128, 10_000.0)
    assert config.rope_scaling is None
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_reads_what_transformers_5_writes(tmp_path: Path, config: LlamaConfig) -> None:
    transformers.LlamaConfig(**config.to_dict(), dtype="bfloat16").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["rope_parameters"]["rope_theta"] == config.rope_theta
    assert "rope_theta" not in written
    assert LlamaConfig.from_json(tmp_path) == config


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_to_dict_round_trips_and_is_read_by_transformers(tmp_path: Path, config: LlamaConfig) -> None:
    assert LlamaConfig.from_json(write(tmp_path, config.to_dict())) == config
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
    for key in ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(theirs, key) == getattr(config, key), key
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")


def test_an_error_lists_all_problems_at_once(tmp_path: Path) -> None:
    wrong = {
        "model_type": "mistral",
        "hidden_act": "gelu",
        "attention_bias": True,
        "hidden_size": "4096",
        "num_hidden_layers": 0,
        "head_dim": -8,
        "num_key_value_heads": True,
        "max_position_embeddings": 1.5,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
    }
    raw = LLAMA_31_8B | wrong
    del raw["vocab_size"]
    file = write(tmp_path, raw)
    with pytest.raises(ValueError, match="not a Llama") as caught:
        LlamaConfig.from_json(file)
    message = str(caught.value)
    for part in (str(file), *wrong, "vocab_size", "'yarn'", "'4096'", "'mistral'"):
        assert part in message, part
    assert len(message.splitlines()) == 1 + len(wrong) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads: 32 is no multiple of num_key_value_heads, 5"),
        ({"head_dim": 65}, "head_dim: 65 must be even"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: expected .* found 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: expected .* found 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing or not a number: 'low_freq_factor'"),
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": "8"}}, "missing or not a number"),  # type: ignore[operator]
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": None}}, "missing or not a number"),  # type: ignore[operator]
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": [8]}}, "missing or not a number"),  # type: ignore[operator]
        ({"rope_scaling": "llama3"}, "missing or not a number"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_errors_of_single_keys(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_json(write(tmp_path, LLAMA_31_8B | changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"vocab_size": 5', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
    ],
)
def test_errors_of_the_file(tmp_path: Path, content: str, message: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        LlamaConfig.from_json(file)
    assert str(file) in str(caught.value)


def test_a_missing_or_binary_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: not found"):
        LlamaConfig.from_json(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not valid JSON"):
        LlamaConfig.from_json(tmp_path)
