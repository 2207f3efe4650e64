"""Llama 2, 3, 3.1, 3.2 and 3.3 in one file: configuration, RMSNorm, RoPE, grouped-query attention, SwiGLU.

Module and parameter names are Hugging Face's, so that a checkpoint loads without a key map. Tensors carry their
dimensions as suffix:

    B batch   T tokens in the row   S keys   C hidden_size   H query heads   K key/value heads   D head_dim
    V vocabulary   N supervised positions

Sources: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Llama team 2024 (arXiv 2407.21783).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radllama.fused import Linear, rms_norm, swiglu
from radllama.loss import chunked_cross_entropy

# (q_BHTD, k_BKTD, v_BKTD) -> out_BHTD
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (arXiv 2407.21783, section 3.4.2 and the released code)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; field names are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, path: str | Path) -> LlamaConfig:
        """Read a config.json (or the folder that holds it), as transformers 4 or 5 writes it.

        Raises ValueError, naming the file and every key at fault, for anything but a Llama of sizes that can be built.
        """
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            if file.stat().st_size > 2**20:
                raise ValueError("more than a megabyte")
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{file}: not found; a model folder holds a config.json beside its weights") from None
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters; older files have them at the top.
        rope: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        problems = [f"{k}: expected {v!r}, found {raw[k]!r:.80}" for k, v in fixed.items() if raw.get(k, v) != v]
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        optional = ["num_key_value_heads", "head_dim", "max_position_embeddings"]
        given: dict[str, Any] = {k: raw.get(k) for k in sizes} | {k: raw[k] for k in optional if raw.get(k) is not None}
        most = {key: 2**12 if "head" in key else 2**10 if "layers" in key else 2**24 for key in given}
        wrong = {key: value for key, value in given.items() if type(value) is not int or not 0 < value <= most[key]}
        problems += [f"{k}: expected a positive integer up to {most[k]}, found {v!r:.80}" for k, v in wrong.items()]
        try:
            epsilon = float(raw.get("rms_norm_eps", 1e-6))  # these defaults are transformers' LlamaConfig's
            theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in ("default", "llama3"):
                problems.append(f"rope_scaling.rope_type: expected 'default' or 'llama3', found {kind!r:.80}")
            scaled = {field.name: rope[field.name] + 0 for field in fields(RopeScaling)} if kind == "llama3" else {}
            numbers = (epsilon, theta, *scaled.values())
            if min(numbers) <= 0 or not sum(numbers) < 1e12 or len({*numbers[3:5]}) == 1:
                raise ValueError("expected positive numbers below 1e12, low_freq_factor other than high_freq_factor")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            problems.append(f"rms_norm_eps, rope_theta or rope_scaling: missing or not a number: {error!s:.100}")
        if not problems:
            heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
            head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
            if heads % kv_heads:
                problems.append(f"num_attention_heads: {heads} is no multiple of num_key_value_heads, {kv_heads}")
            if head_dim % 2 or not head_dim:
                problems.append(f"head_dim: {head_dim} must be even: RoPE turns pairs of dimensions")
        if problems:
            raise ValueError(f"{file}: not a Llama this code can run:\n  " + "\n  ".join(problems))
        return cls(
            **{"max_position_embeddings": 2048} | given | {"num_key_value_heads": kv_heads, "head_dim": head_dim},
            rms_norm_eps=epsilon,
            rope_theta=theta,
            rope_scaling=RopeScaling(**scaled) if scaled else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json under their older names, which transformers 4 and 5 both read."""
        fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        scaling = {"rope_type": "llama3"} | asdict(self.rope_scaling) if self.rope_scaling else None
        return fixed | asdict(self) | {"rope_scaling": scaling, "attention_bias": False, "mlp_bias": False}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the input's dtype (Zhang & Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_BTC: Tensor) -> Tensor:
        return rms_norm(x_BTC, self.weight, self.eps)


@lru_cache
def inverse_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """RoPE's angular frequencies (D / 2,), fp32. No buffer of the model: a cast to bf16 would ruin them."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Llama 3.1: keep the fast dimensions, slow the slow ones by `factor`, blend in between.
    wavelength = 2 * math.pi / frequency
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rotary_angles(positions_BT: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (B, 1, T, D) each."""
    angles = positions_BT[:, None, :, None].float() * inverse_frequencies(config, positions_BT.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i against i + D/2 (Hugging Face's split halves; Meta's own files interleave them)."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos + torch.cat((-second, first), dim=-1) * sin


def causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Every token sees itself and what stands before it in its row."""
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)


def packed_attention(segments: Tensor, queries: Tensor | None = None) -> Attend:
    """Attention for one packed row: a segment's tokens see the segment's prefix and, causally, the segment itself.

    segments (n, 2) int64 on the CPU: length, and which earlier segment is the prefix (-1: none); the segments tile the
    row. queries (N,) int64, ascending: the tokens whose queries are given; None: all. One call of the kernel a segment:
    no work is spent on pairs of tokens that must not meet.
    """
    lengths, prefixes = segments[:, 0].tolist(), segments[:, 1].tolist()
    counts, places = lengths, torch.cat([torch.arange(length) for length in lengths])
    if queries is not None:
        owners = torch.arange(len(lengths)).repeat_interleave(segments[:, 0])
        counts, places = owners[queries.cpu()].bincount(minlength=len(lengths)).tolist(), places[queries.cpu()]

    def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        ks, vs = (x.split(lengths, dim=2) for x in (k_BKTD, v_BKTD))
        outputs = []
        for segment, (q, rows) in enumerate(zip(q_BHTD.split(counts, dim=2), places.split(counts), strict=True)):
            k, v, length, prefix = ks[segment], vs[segment], lengths[segment], prefixes[segment]
            if prefix < 0 and len(rows) == length:
                outputs.append(causal_attention(q, k, v))
            elif len(rows):
                if prefix >= 0:
                    k, v = torch.cat((ks[prefix], k), dim=2), torch.cat((vs[prefix], v), dim=2)
                sees = lower_right_mask(length, k.shape[2], q.device)
                sees = sees if len(rows) == length else sees[rows]
                outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True))
        return torch.cat(outputs, dim=2)

    return attend


@lru_cache(maxsize=1024)
def lower_right_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last query sees every key, each one before it sees one key less."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Every layer's output for one input; layers that know how to compute them `together` do (lora.py)."""
    together = getattr(layers[0], "together", None)
    return together(x, layers) if together else tuple(layer(x) for layer in layers)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, heads)
        self.k_proj = Linear(config.hidden_size, kv_heads)
        self.v_proj = Linear(config.hidden_size, kv_heads)
        self.o_proj = Linear(heads, config.hidden_size)

    def qkv(self, x_BTC: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
        if queries is None:
            return project(x_BTC, self.q_proj, self.k_proj, self.v_proj)
        return self.q_proj(x_BTC[:, queries]), *project(x_BTC, self.k_proj, self.v_proj)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, attend: Attend, queries: Tensor | None = None) -> Tensor:
        """queries (N,): the tokens whose output is wanted, which `attend` must know; None: all."""
        heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.qkv(x_BTC, queries))
        q_BHTD, k_BKTD, v_BKTD = heads
        angles = (cos, sin) if queries is None else (cos[:, :, queries], sin[:, :, queries])
        out_BHTD = attend(rotate(q_BHTD, *angles), rotate(k_BKTD, cos, sin), v_BKTD)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def gate_up(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        return project(x_BTC, self.gate_proj, self.up_proj)

    def forward(self, x_BTC: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTC)
        return self.down_proj(swiglu(gate, up))


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, attend: Attend, queries: Tensor | None = None) -> Tensor:
        """All tokens give keys and values; with `queries` (N,) only theirs are computed further, (B, N, C)."""
        attended = self.self_attn(self.input_layernorm(x_BTC), cos, sin, attend, queries)
        x_BTC = attended + (x_BTC if queries is None else x_BTC[:, queries])
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Decoder(nn.Module):
    """Embedding, layers and the last norm: everything below the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, attends: list[Attend], queries: Tensor | None = None
    ) -> Tensor:
        """(B, T, C); with `queries` (N,), which the last `attend` must know, the last layer gives theirs: (B, N, C)."""
        x_BTC: Tensor = self.embed_tokens(tokens_BT)
        cos, sin = rotary_angles(positions_BT, self.config, x_BTC.dtype)
        for number, (layer, attend) in enumerate(zip(self.layers, attends, strict=True), 1):
            wanted = queries if number == len(self.layers) else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, x_BTC, cos, sin, attend, wanted, use_reentrant=False)
            else:
                x_BTC = layer(x_BTC, cos, sin, attend, wanted)
        return self.norm(x_BTC)


class Llama(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.packed_attention = packed_attention  # attention.py has one for GPUs
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        attends: list[Attend] | None = None,
        label_positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V); with `label_positions` only theirs (N, V); with `labels` their cross-entropies (N,), fp32.

        positions (B, T): RoPE's positions, 0 .. T-1 if not given.
        segments (n, 2): the row is packed; see `packed_attention`. label_positions must ascend then.
        attends: each layer's attention, in place of causal or packed (decode.py: over a KV cache).
        label_positions (N,): indices into the B * T tokens whose *next* token is supervised; labels (N,): that token.
        """
        if positions is None:
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        queries = None
        if attends is None:
            attend = causal_attention if segments is None else self.packed_attention(segments)
            attends = [attend] * self.config.num_hidden_layers
            if segments is not None and label_positions is not None:
                queries, attends[-1] = label_positions, self.packed_attention(segments, label_positions)
        x: Tensor = self.model(tokens_BT, positions, attends, queries).flatten(0, 1)
        if label_positions is None:
            x = x.unflatten(0, tokens_BT.shape)
        elif queries is None:
            x = x[label_positions]
        if labels is not None:
            return chunked_cross_entropy(self.lm_head, x, labels)
        return self.lm_head(x)
