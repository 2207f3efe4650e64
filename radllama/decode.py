"""Decoding: the KV cache.

Tensors carry their dimensions as suffix, as in model.py.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from radllama.model import Attend, LlamaConfig


class KVCache:
    """Keys and values of the tokens so far: (layers, B, K, S, D) each, rows of unequal length, filled from the left."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (finished ones leave)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def attends(self, positions_BT: Tensor) -> list[Attend]:
        """One a layer: store the new keys and values at `positions_BT`, attend to all up to each token."""
        row = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        longest = int(positions_BT.max()) + 1
        sees = torch.arange(longest, device=positions_BT.device) <= positions_BT[:, None, :, None]  # (B, 1, T, S)

        def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layer: int) -> Tensor:
            k, v = self.k[layer], self.v[layer]
            k[row, :, positions_BT] = k_BKTD.transpose(1, 2)
            v[row, :, positions_BT] = v_BKTD.transpose(1, 2)
            k, v = k[:, :, :longest], v[:, :, :longest]
            return F.scaled_dot_product_attention(q_BHTD, k, v, attn_mask=sees, enable_gqa=True)

        return [partial(attend, layer=layer) for layer in range(len(self.k))]
