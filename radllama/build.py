"""The model of a config, ready to train: loaded or random, quantised, partitioned over the ranks, with LoRA.

Under ZeRO-3 no rank ever holds the whole model: each parameter is partitioned as soon as it is read.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from torch import Tensor, nn

from radllama.checkpoint import Partition, WeightFiles, load_model
from radllama.config import Config
from radllama.lora import add_lora
from radllama.model import Llama, LlamaConfig

logger = logging.getLogger("radllama")

BUFFERS = 10  # of swapped parameters, in use at once: a layer's seven, the embedding, the head, one that arrives


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
    """By the tensors that are there: a quantization_config outlives, with some tools, what it speaks of."""
    return bool(WeightFiles(source).layers_4bit())


def partition_of(settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Partition | None:
    """How ZeRO-3 keeps a parameter, by DeepSpeed's settings: this rank's part, on its device, in memory or on disk.

    None below stage 3. zero.Init's own way in broadcasts rank 0's parameter whole; here every rank has the same file
    (or the same random numbers) and takes its part from that.
    """
    section = settings.get("zero_optimization", {})
    if section.get("stage") != 3:
        return None
    if on_disk(section, "offload_optimizer"):  # checkpoints take all that is there; DeepSpeed clears parameters only
        left = Path(section["offload_optimizer"]["nvme_path"]) / f"zero_stage_3/optimizer/rank{dist.get_rank()}"
        shutil.rmtree(left, ignore_errors=True)
    swapper = Swapper(deepspeed.DeepSpeedConfig(settings), dtype) if on_disk(section, "offload_param") else None
    zero = deepspeed.zero.Init(config_dict_or_path=settings, param_swapper=swapper)

    def partition(parameter: nn.Parameter) -> None:
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(device)  # empty now; its device is where it will be gathered

    return partition


class Swapper(AsyncPartitionedParameterSwapper):  # type: ignore[misc]
    """DeepSpeed's, whose buffers are of the engine's dtype, for the bytes of 4-bit layers as well."""

    def words(self, parameter: nn.Parameter, numel: int) -> int:
        return -(-numel // self.swap_element_size) if parameter.dtype == torch.uint8 else numel

    def get_buffer(self, param: nn.Parameter, numel: int) -> Tensor:
        buffer: Tensor = super().get_buffer(param, self.words(param, numel))
        return buffer.view(torch.uint8)[:numel] if param.dtype == torch.uint8 else buffer

    def _track_numel(self, params: list[Any]) -> None:
        self.param_id_to_numel |= {param.ds_id: self.words(param, param.ds_tensor.ds_numel) for param in params}

    def synchronize_reads(self) -> None:
        arriving = [param for param in self.inflight_params if param.dtype == torch.uint8]
        super().synchronize_reads()
        for param in arriving:
            param.ds_tensor.data = param.ds_tensor.data.view(torch.uint8)[: param.ds_tensor.ds_numel]


def on_disk(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device") == "nvme"


def swapping(config: Config, zero: dict[str, Any], shape: LlamaConfig, ranks: int) -> dict[str, Any]:
    """The zero_optimization section, completed by what DeepSpeed 0.19.8 needs to swap to a disk, sized for the model.

    Each run swaps in a folder of its own: the files of all have the same names. Parameters are fetched when they are
    used, and let go at once: those fetched ahead, or kept, would take all buffers. Raises ValueError for a buffer that
    is too small, or too few.
    """
    zero = dict(zero)
    run = hashlib.blake2b(str(Path(config.training.output).resolve()).encode(), digest_size=6).hexdigest()
    for key in ("offload_param", "offload_optimizer"):
        if on_disk(zero, key):
            zero[key] = zero[key] | {"nvme_path": str(Path(zero[key]["nvme_path"]) / f"radllama-{run}")}
    if not on_disk(zero, "offload_param"):
        return zero
    widest = max(shape.vocab_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    for key, least in (("buffer_size", math.ceil(widest * shape.hidden_size / ranks)), ("buffer_count", BUFFERS)):
        found = zero["offload_param"].setdefault(key, least)
        if found < least:
            raise ValueError(
                f"deepspeed.zero_optimization.offload_param.{key}: {found} is too little for this model on {ranks} "
                f"ranks; use {least}, or remove it"
            )
    if config.method != "full":
        zero["offload_param"]["max_in_cpu"] = 10**15  # adapters: all of them are gathered at once where they are saved
    return zero | {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


def remove_swapped(zero: dict[str, Any]) -> None:
    """What a run that has ended well swapped: its checkpoints hold copies. One that failed leaves it to the next."""
    for key in ("offload_param", "offload_optimizer"):
        if on_disk(zero, key):
            shutil.rmtree(zero[key]["nvme_path"], ignore_errors=True)


def check_disk(zero: dict[str, Any]) -> None:
    """ValueError where nothing can be swapped: no libaio, or no folder for files that pass by the page cache."""
    for key in ("offload_param", "offload_optimizer"):
        if not on_disk(zero, key):
            continue
        folder, name = Path(zero[key]["nvme_path"]), f"deepspeed.zero_optimization.{key}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as probe:
                os.close(os.open(Path(probe) / "file", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        except OSError as error:
            raise ValueError(
                f"{name}.nvme_path: nothing can be swapped to {folder} ({error.strerror}); choose a local disk"
            ) from None
        if not AsyncIOBuilder().is_compatible():
            raise ValueError(
                f"{name}: nvme needs libaio with its headers (apt install libaio-dev); install it, or use device cpu"
            )
