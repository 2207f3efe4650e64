"""A checkpoint that another number of ranks has written: ZeRO's partitions, cut anew.

ZeRO lays values end to end and gives every rank an equal part, padded with zeros at the end; so it does with the fp32
weights and with Adam's moments. Stages 1 and 2 cut whole parameter groups, stage 3 every parameter by itself. Each rank
reads its new part out of the old ranks' files (runtime/zero/stage_1_and_2.py and stage3.py of DeepSpeed 0.19.8), bit
for bit, and never holds the whole; DeepSpeed then loads it as if this rank had written it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radllama.config import Config

OTHER_CUTS = ("elastic_checkpoint", "mics_shard_size", "parameter_alignment", "round_robin_gradients", "zenflow")


def obstacle(config: Config) -> str | None:
    """Why this job's checkpoints continue on as many ranks as wrote them, and no other number; None: they need not."""
    zero = config.deepspeed.get("zero_optimization", {})
    if config.training.optimizer.endswith("8bit"):
        return f"training.optimizer {config.training.optimizer}, whose moments are quantised in blocks of each rank"
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            return f"deepspeed.zero_optimization.{key} to nvme, which keeps a file a rank"
    if config.deepspeed.get("data_types"):
        return "deepspeed.data_types, with which DeepSpeed may use another optimizer"
    return next((f"deepspeed.zero_optimization.{key}" for key in OTHER_CUTS if zero.get(key)), None)


def load_resharded(engine: Any, folder: Path, *, then: int, rank: int, world: int) -> None:
    """Put a checkpoint that `then` ranks wrote into the engine of one of `world` ranks. All of them call it.

    Raises ValueError where the files do not hold what this model needs.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage < 3:  # the weights and counters; below stage 1, where nothing is cut, the moments as well
        loaded, _ = engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=False, load_optimizer_states=stage == 0
        )
        if loaded is None:
            raise ValueError(f"--resume: DeepSpeed cannot load {folder}; remove it to continue from the one before")
    if stage == 0:
        return
    try:
        files = [next(folder.glob(f"*zero_pp_rank_{number}_mp_rank_00_optim_states.pt")) for number in range(then)]
        old = [read(file)["optimizer_state_dict"] for file in files]
        mine = parameter_parts(old, optimizer, rank) if stage == 3 else group_parts(old, optimizer, rank)
    except (StopIteration, LookupError, RuntimeError) as error:
        raise ValueError(
            f"--resume: {folder} was written by {then} ranks and cannot be cut for {world}; start {then}"
        ) from error
    if stage < 3:
        optimizer.load_state_dict([mine] * world, load_from_fp32_weights=True)
        return
    load_counters(engine, folder)
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([mine] * world)
    optimizer.checkpoint_event_epilogue()


def load_counters(engine: Any, folder: Path) -> None:
    counters = read(next(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")))
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, counters[key])


def swaps(engine: Any) -> bool:
    """Whether parameters or moments are on a disk."""
    return any(getattr(engine.optimizer, key, False) for key in ("swap_optimizer", "params_in_nvme_and_cpu"))


def load_swapped(engine: Any, folder: Path, *, rank: int) -> None:
    """ZeRO-3 with states on a disk. DeepSpeed itself restores neither Adam's step nor what is too small to be swapped.

    The files carry the numbers of a sub-group's first and last parameter, which count on within a process.
    """
    optimizer = engine.optimizer
    file = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    saved = torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"]
    load_counters(engine, folder)
    optimizer.checkpoint_event_prologue()
    optimizer.loss_scaler = saved["loss_scaler"]
    optimizer._set_fp32_optimizer_param_groups()
    optimizer.optimizer.load_state_dict(saved["optimizer_state_dict"])
    optimizer._clear_fp32_optimizer_param_groups()
    masters, swapped = optimizer.fp32_partitioned_groups_flat, []
    for number, (master, values) in enumerate(zip(masters, saved["fp32_flat_groups"], strict=True)):
        if not optimizer._swappable_optimizer_subgroup(number):
            master.data.copy_(values)
            continue
        swapped.append(master)
        state, numel = optimizer.optimizer.state[master], int(optimizer.fp16_partitioned_groups_flat_numel[number])
        for key in [key for key, value in state.items() if torch.is_tensor(value) and value.dim()]:
            state[key] = torch.empty(numel)  # never filled: the swapper takes note of it, and reads the file
    if not optimizer.swap_optimizer:
        for number in range(len(masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    else:
        source, target = folder / "offloaded_tensors" / f"rank{rank:02}", Path(optimizer.optimizer_swapper.swap_folder)
        names = sorted((path.name.split(".")[0] for path in source.glob("[0-9]*.tensor.swp")), key=numbers)
        for name, now in zip(names, sorted((master.ds_id for master in swapped), key=numbers), strict=True):
            for kind in ("", "exp_avg-", "exp_avg_sq-"):
                shutil.copyfile(source / f"{kind}{name}.tensor.swp", target / f"{kind}{now}.tensor.swp")
        optimizer.reset_swap_buffers()
    optimizer.checkpoint_event_epilogue()


def numbers(name: str) -> list[int]:
    return [int(part) for part in name.split("_")]


def read(file: Path) -> Any:
    """A file of the run's own folder, mapped: only what is used is read. DeepSpeed's files hold classes of its own."""
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def group_parts(old: list[dict[str, Any]], optimizer: Any, rank: int) -> dict[str, Any]:
    """ZeRO-1 and -2: this rank's part of every parameter group, as its state dict."""
    base = old[0]["base_optimizer_state"]
    weights: list[Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    for group, partition in enumerate(optimizer.single_partition_of_fp32_groups):
        masters = [part["single_partition_of_fp32_groups"][group].flatten() for part in old]  # without padding
        numel, size = sum(map(len, masters)), len(partition)
        if numel != sum(parameter.numel() for parameter in optimizer.bit16_groups[group]):
            raise LookupError(f"{numel} elements in group {group}")
        weights.append(cut(masters, numel, rank * size, size))
        name = base["param_groups"][group]["params"][0]
        states = [unwrapped(part["base_optimizer_state"]["state"][name]) for part in old]
        state[name] = dict(states[0])
        for key in moments(states[0], len(masters[0]) + old[0]["group_paddings"][group]):
            state[name][key] = cut([part[key] for part in states], numel, rank * size, size)
    base = {"state": state, "param_groups": base["param_groups"]}
    return old[0] | {"base_optimizer_state": base, "single_partition_of_fp32_groups": weights}


def parameter_parts(old: list[dict[str, Any]], optimizer: Any, rank: int) -> dict[str, Any]:
    """ZeRO-3: this rank's part of every parameter, in sub-groups of as many as its share fills, as its state dict."""
    base = old[0]["optimizer_state_dict"]
    ranks = [
        [
            unwrapped(part["optimizer_state_dict"]["state"][group]) | {"weights": flat}
            for group, flat in enumerate(part["fp32_flat_groups"])
        ]
        for part in old
    ]
    lengths = [len(group["weights"]) for group in ranks[0]]
    weights: list[Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    before, offset = 0, 0  # where the next parameter lies in the old ranks' sub-groups
    for number, parameters in enumerate(optimizer.fp16_groups):
        state[number] = dict(ranks[0][before])
        pieces: dict[str, list[Tensor]] = {key: [] for key in moments(state[number], lengths[before])}
        for parameter in parameters:
            size, share = parameter.partition_numel(), -(-parameter.ds_numel // len(old))
            for key in pieces:
                shares = [groups[before][key].narrow(0, offset, share) for groups in ranks]
                pieces[key].append(cut(shares, parameter.ds_numel, rank * size, size))
            offset += share
            if offset == lengths[before]:
                before, offset = before + 1, 0
        state[number] |= {key: torch.cat(values) for key, values in pieces.items()}
        weights.append(state[number].pop("weights"))
    if before != len(lengths):
        raise LookupError(f"{len(lengths)} sub-groups")
    groups = [
        group | {"params": [j for j in state if optimizer.sub_group_to_group_id[j] == number]}
        for number, group in enumerate(base["param_groups"])
    ]
    return old[0] | {"optimizer_state_dict": {"state": state, "param_groups": groups}, "fp32_flat_groups": weights}


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """A state without the dictionary into which bitsandbytes puts some of it."""
    inner = [value for value in state.values() if isinstance(value, dict)]
    return {key: value for part in (state, *inner) for key, value in part.items() if not isinstance(value, dict)}


def moments(state: dict[str, Any], numel: int) -> list[str]:
    """The keys of what has a value for each of `numel` elements. LookupError where other tensors are there."""
    keys = [key for key, value in state.items() if torch.is_tensor(value) and value.dim()]
    if wrong := [key for key in keys if state[key].shape != (numel,)]:
        raise LookupError(f"{wrong} of {[tuple(state[key].shape) for key in wrong]}, in place of {numel}")
    return keys


def cut(parts: list[Tensor], numel: int, start: int, size: int) -> Tensor:
    """Elements start to start + size of the first `numel` of flat tensors laid end to end; zeros beyond. A copy."""
    stop, begin = min(start + size, numel), 0
    pieces = []
    for part in parts:
        low, high = max(start, begin), min(stop, begin + len(part))
        if low < high:
            pieces.append(part[low - begin : high - begin])
        begin += len(part)
    return torch.cat([*pieces, parts[0].new_zeros(size - sum(map(len, pieces)))])
