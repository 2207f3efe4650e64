"""The model of a config, ready to train: loaded or random, quantised, partitioned over the ranks, with LoRA.

Under ZeRO-3 no rank ever holds the whole model: each parameter is partitioned as soon as it is read.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from radllama.checkpoint import Partition, load_model
from radllama.config import Config
from radllama.lora import add_lora
from radllama.model import Llama, LlamaConfig

logger = logging.getLogger("radllama")


def build_model(
    config: Config,
    source: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    partition: Partition | None = None,
    progress: bool = False,
) -> Llama:
    """The model on its device in the compute dtype, with exactly the parameters of the method trainable.

    LoRA's A is drawn from torch's generator: the caller seeds it, alike on every rank. partition: see `partition_of`.
    """
    if config.model.from_scratch:
        return random_model(
            LlamaConfig.from_json(source), config.training.seed, device=device, dtype=dtype, partition=partition
        )
    in_4bit = stored_in_4bit(source)
    if in_4bit and config.method == "full":
        raise ValueError(f"{source}: 4-bit weights cannot be trained in full; use method qlora or the original weights")
    quantize = config.quantization.type if config.method == "qlora" and not in_4bit else None
    if config.method == "qlora" and in_4bit and "quantization" in config.model_fields_set:
        logger.info("%s is in 4 bits already and taken as it is; the quantization section is not used", source)
    model = load_model(
        source, quantize=quantize, dtype=dtype, device=device, double_quant=config.quantization.double_quant,
        progress=progress, partition=partition)  # fmt: skip
    if config.method != "full":
        lora = config.lora
        add_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=list(lora.targets),
            rslora=lora.rslora,
        )
    return model


@torch.no_grad()
def random_model(
    config: LlamaConfig,
    seed: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    partition: Partition | None = None,
    std: float = 0.02,
) -> Llama:
    """Random weights for training from scratch: N(0, std), residual outputs scaled by depth (GPT-2), norms one."""
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        layer, _, kind = name.rpartition(".")
        if parameter.dim() == 1:
            values = torch.ones(parameter.shape)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * config.num_hidden_layers) if residual else std
            values = torch.randn(parameter.shape, generator=generator) * scale
        drawn = nn.Parameter(values.to(device=device, dtype=dtype))
        if partition is not None:
            partition(drawn)
        setattr(model.get_submodule(layer), kind, drawn)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def stored_in_4bit(source: Path) -> bool:
    return "quantization_config" in json.loads((source / "config.json").read_text(encoding="utf-8"))


def partition_of(settings: dict[str, Any], device: torch.device) -> Partition | None:
    """How ZeRO-3 keeps a parameter, by DeepSpeed's settings: this rank's part, on its device, in memory or on disk.

    None below stage 3. zero.Init's own way in broadcasts rank 0's parameter whole; here every rank has the same file
    (or the same random numbers) and takes its part from that.
    """
    if settings.get("zero_optimization", {}).get("stage") != 3:
        return None
    zero = deepspeed.zero.Init(config_dict_or_path=settings)

    def partition(parameter: nn.Parameter) -> None:
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(device)  # empty now; its device is where it will be gathered

    return partition
