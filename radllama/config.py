"""The one JSON config as a typed tree. Read, checked and completed before anything is loaded.

Every section lists its keys with their defaults; unknown keys are errors, and all problems are reported at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from radllama.files import read_json

Method = Literal["full", "lora", "qlora"]
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(min_length=1, description="model folder, or Hugging Face repository (owner/name)")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face repository")
    from_scratch: bool = Field(False, description="random weights in the shape of the folder's config.json")
    prompt_format: Literal["llama3", "llama2", "alpaca"] | None = Field(
        None, description="how a report is put to the model; by default the tokenizer decides between llama3 and llama2"
    )


class Quantization(Section):
    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = Field(True, description="store the block statistics in 8 bits, too")
    keep_dequantized: bool = Field(
        False, description="hold the weights de-quantised, too: faster steps for the memory of a model of the dtype"
    )


class Lora(Section):
    rank: int = Field(16, ge=1, le=2**16)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[Target] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")


class Data(Section):
    train: str = Field(description="JSON lines with id, findings, impression; or with id, text for plain-text training")
    validation: str | None = Field(None, description="the same form; scores the checkpoints")
    max_length: int = Field(
        1024, ge=8, le=2**24, description="tokens of one report with its instruction; cut at the right"
    )
    instructions: list[str] | None = Field(
        None, min_length=1, description="wordings of the instruction, drawn by report and epoch; default: 20 of ours"
    )
    similar: int = Field(0, ge=0, le=100, description="impressions of similar reports in a prompt (radllama.similar)")
    weights: dict[Literal["modality", "body_part"], dict[str, PositiveFloat]] | None = Field(
        None, description='how often to draw reports, such as {"modality": {"CT": 2.0}}; 1 where nothing is said'
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    output: str = Field(min_length=1, description="the run folder")
    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over data.train; give this or steps")
    steps: int | None = Field(None, ge=1, le=2**40, description="optimizer steps; give this or epochs")
    batch_size: int = Field(8, ge=1, le=2**24, description="reports a step, over all ranks")
    accumulation: int = Field(1, ge=1, le=2**24, description="packs a step on each rank, one after another")
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    min_learning_rate: float = Field(0.0, ge=0, description="where cosine and linear decay end")
    optimizer: Optimizer = "adamw"
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clipping: float = Field(1.0, ge=0, description="largest gradient norm; 0 is off")
    seed: int = Field(0, ge=0, lt=2**63)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: chosen by the device")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: Literal["auto", "on", "off"] = Field("auto", description="auto: on if memory asks for it")
    validate_every: int | None = Field(None, ge=1, description="steps; the end of training always validates")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints that --resume continues from")
    on_bad_loss: Literal["stop", "skip"] = Field(
        "stop", description="what a step with a loss that is not finite, or jumps (loss_spike), brings about"
    )
    loss_spike: float | None = Field(
        None, gt=1, description="a loss so many times the median of the last 32 is bad as well"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of them to keep")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is above learning_rate")
        return self


class Config(Section):
    comment: str | list[str] | None = Field(None, description="for the reader; ignored")
    model: Model
    method: Method
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own config, passed on untouched")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        given, problems = self.model_fields_set, []
        if self.method == "full" and "lora" in given:
            problems.append("lora: is not used by method full; remove it")
        if self.method != "qlora" and "quantization" in given:
            problems.append(f"quantization: is not used by method {self.method}; remove it")
        if self.method != "full" and self.model.from_scratch:
            problems.append("model.from_scratch: needs method full; random frozen weights learn nothing")
        problems += _contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def resolved(self) -> dict[str, Any]:
        """The config as plain values, without the sections that the method leaves unused; `parse_config` reads it."""
        unused = {"full": {"lora", "quantization"}, "lora": {"quantization"}, "qlora": set[str]()}[self.method]
        return self.model_dump(mode="json", exclude=unused)


# DeepSpeed's key -> the config's own, for what is derived from `training` and may not be set to something else.
_DERIVED = {
    "train_batch_size": "training.accumulation (one pack a micro-step) and the number of ranks",
    "train_micro_batch_size_per_gpu": "training.accumulation (one pack a micro-step)",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
}


def _contradictions(config: Config) -> list[str]:
    """What the deepspeed section says otherwise than the others."""
    section, problems = config.deepspeed, []
    zero = section.get("zero_optimization")
    if config.quantization.keep_dequantized and isinstance(zero, dict) and zero.get("stage") == 3:
        problems.append("quantization.keep_dequantized: would hold on every rank what ZeRO-3 divides; remove it")
    if isinstance(zero, dict):
        problems += [f"deepspeed.zero_optimization.{problem}" for problem in _offloading(config.method, zero)]
    same = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": config.training.gradient_clipping,
    }
    for key, source in _DERIVED.items():
        if key not in section:
            continue
        value = section[key]
        if key in same and value in (same[key], "auto"):
            continue
        if key in ("bf16", "fp16") and isinstance(value, dict):
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[key]
            if bool(value.get("enabled", True)) == (config.training.dtype == dtype):
                continue
        problems.append(f"deepspeed.{key}: {value!r} is set by {source}; remove it here")
    return problems


def _offloading(method: Method, zero: dict[str, Any]) -> list[str]:
    """What DeepSpeed would accept and not do, or give up on in the middle of a run."""
    parts = {key: zero.get(key) for key in ("offload_param", "offload_optimizer")}
    param, optimizer = (part if isinstance(part, dict) else {} for part in parts.values())
    problems = []
    for key, part, devices in (("offload_param", param, ("cpu", "nvme")), ("offload_optimizer", optimizer, ("nvme",))):
        if (device := part.get("device")) in devices and zero.get("stage", 1) != 3:
            problems.append(f"{key}: {device} needs stage 3; set zero_optimization.stage, or remove it")
        if device == "nvme" and not part.get("nvme_path"):
            problems.append(f"{key}.nvme_path: missing; name a folder on a local disk")
    if optimizer.get("device") == "nvme":
        at_once = 4 * (1 + bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write")))
        if optimizer.get("buffer_count", at_once) < at_once:
            problems.append(f"offload_optimizer.buffer_count: Adam needs {at_once} with these settings; set {at_once}")
    if param.get("device") == "nvme":
        ahead = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
        reason = "what is fetched ahead, or kept, would take all buffers of offload_param; remove it"
        problems += [f"{key}: {reason}" for key in ahead if zero.get(key, 0) != 0]
        if optimizer.get("fast_init"):
            problems.append("offload_optimizer.fast_init: is not for parameters on nvme; remove it")
        if method != "full" and "max_in_cpu" in param:
            problems.append("offload_param.max_in_cpu: adapters stay in memory; remove it")
    return problems


def read_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON config; overrides are "section.key=value", the value as JSON or, failing that, as text.

    Raises ValueError with every problem, each with its path and what was expected.
    """
    file = Path(path)
    try:
        raw = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such config file") from None
    for override in overrides or []:
        _override(raw, override)
    return parse_config(raw, source=str(file))


def parse_config(raw: dict[str, Any], *, source: str = "config") -> Config:
    """Check a config given as a dict; ValueError as in `read_config`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem)]
        raise ValueError(f"{source}: {len(lines)} problem(s):\n  " + "\n  ".join(lines)) from None


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override}: expected section.key=value, such as training.learning_rate=1e-4")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ValueError(f"--set {override}: {key} is not a section")
    raw[keys[-1]] = value


def _explain(problem: Any) -> list[str]:
    """One of pydantic's errors as "path: what was expected, what was found"."""
    path = ".".join(f"{part!s:.80}" for part in problem["loc"])
    found = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return [f"{path}: unknown key; {_known_keys(problem['loc'][:-1])}"]
    if problem["type"] == "missing":
        return [f"{path}: missing"]
    if problem["type"] == "value_error":
        return [f"{path}: {line}" if path else line for line in str(problem["ctx"]["error"]).split("\n")]
    shown = f"{found!r:.80}" if not isinstance(found, dict | list) else type(found).__name__
    return [f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {shown}"]


def _known_keys(section: tuple[int | str, ...]) -> str:
    model: Any = Config
    for part in section:
        model = model.model_fields[str(part)].annotation
    return "expected one of " + ", ".join(model.model_fields)
