"""Meta's original checkpoints (consolidated.*.pth, params.json) -> a model folder of safetensors.

    python -m radllama.meta --input Meta-Llama-3-8B/original --output Meta-Llama-3-8B

The one place where weights are unpickled, and a command of its own for that reason: torch's weights-only unpickler,
which builds tensors and containers and calls nothing else. The files are memory-mapped and go through tensor by tensor.

Meta cuts a model over N files for tensor parallelism: each file holds one N-th of a matrix's rows (wq, wk, wv, w1, w3,
output) or columns (wo, w2). Embeddings are cut by columns up to Llama 2, by rows in Llama 3: the shapes tell. Meta's
RoPE turns dimension 2i against 2i + 1, Hugging Face's i against i + D/2: the rows of wq and wk are put in that order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from radllama.checkpoint import write_model
from radllama.files import check_links, read_json
from radllama.model import Llama, LlamaConfig, RopeScaling

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def meta_name(name: str) -> str:
    """Meta's name of one of our parameters."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"layers.{layer}.{_NAMES[part]}.weight"


def split_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, in) from Meta's order, a head's dimensions in pairs, to all the first, then all the second."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_shards(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of every consolidated.*.pth, memory-mapped; ValueError names the file at fault."""
    check_links(folder)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"{folder}: expected consolidated.00.pth, params.json and tokenizer.model, as Meta gives them")
    shards: list[dict[str, Tensor]] = []
    for file in files:
        try:
            shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises a dozen classes for broken or hostile files
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{file}: cannot be read as a .pth of plain tensors ({type(error).__name__}: {reason:.300})"
            ) from None
        if not isinstance(shard, dict) or not all(
            isinstance(name, str)
            and isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and tensor.nbytes <= tensor.untyped_storage().nbytes()  # not a few bytes, expanded
            for name, tensor in shard.items()
        ):
            raise ValueError(f"{file}: expected a dict of names and dense tensors, each with its bytes in the file")
        if shards and shard.keys() != shards[0].keys():
            raise ValueError(f"{file}: holds other tensors than {files[0].name}; were all files downloaded?")
        shards.append(shard)
    return shards


def read_params(file: Path, shards: list[dict[str, Tensor]], *, rope_factor: float) -> LlamaConfig:
    """The shape of the model from params.json; vocabulary and MLP, which it leaves open, from the tensors."""
    try:
        params = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: not found; it belongs to consolidated.00.pth") from None

    def whole(name: str, least: int, most: int, default: Any = None) -> int:
        value = params.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{file}: {name}: expected a whole number from {least} to {most}, found {value!r:.80}")
        return value

    def positive(name: str, default: float) -> float:
        value = params.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise ValueError(f"{file}: {name}: expected a positive number, found {value!r:.80}")
        return float(value)

    def rows(name: str) -> int:
        tensors = [shard.get(name) for shard in shards]
        if any(tensor is None or tensor.dim() != 2 for tensor in tensors):
            raise ValueError(f"{file.parent}: {name}: expected a matrix in every consolidated.*.pth")
        return sum(tensor.shape[0] for tensor in tensors if tensor is not None)

    hidden, heads = whole("dim", 2, 2**24), whole("n_heads", 1, 2**12)
    kv_heads = whole("n_kv_heads", 1, heads, heads)
    if hidden % heads or hidden // heads % 2 or heads % kv_heads:
        raise ValueError(f"{file}: dim {hidden}, n_heads {heads}, n_kv_heads {kv_heads} do not divide into heads")
    scaled = params.get("use_scaled_rope", False) is True
    return LlamaConfig(
        vocab_size=rows("output.weight"),
        hidden_size=hidden,
        intermediate_size=rows("layers.0.feed_forward.w1.weight"),
        num_hidden_layers=whole("n_layers", 1, 2**10),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=positive("norm_eps", 1e-5),
        rope_theta=positive("rope_theta", 10_000.0),
        rope_scaling=RopeScaling(rope_factor, 1.0, 4.0, 8192) if scaled else None,
        max_position_embeddings=131_072 if scaled else 8192 if "rope_theta" in params else 4096,
    )


def cut_along(name: str, parts: list[Tensor], shape: tuple[int, ...], folder: Path) -> int | None:
    """The dimension along which N parts make a tensor of this shape; None where each part is the whole."""
    shapes = {tuple(part.shape) for part in parts}
    found, count = next(iter(shapes)), len(parts)
    cut = [d for d, size in enumerate(shape) if len(found) == len(shape) and found[d] != size]
    if len(shapes) > 1 or len(found) != len(shape) or len(cut) > 1 or any(found[d] * count != shape[d] for d in cut):
        raise ValueError(f"{folder}: {name}: params.json says {shape}, the {count} file(s) hold {sorted(shapes)}")
    if wrong := [part.dtype for part in parts if part.dtype not in DTYPES]:
        raise ValueError(f"{folder}: {name}: expected {', '.join(map(str, DTYPES))}, found {wrong[0]}")
    if not cut and any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise ValueError(f"{folder}: {name}: differs between the files, which should all hold the whole of it")
    return cut[0] if cut else None


def import_meta(source: Path, target: Path, *, rope_factor: float = 8.0, dtype: torch.dtype | None = None) -> None:
    """Write Meta's checkpoint in `source` as a model folder; in `dtype`, or as it is stored.

    Memory: one tensor, or two where it is turned (wq, wk) or cast; the input is mapped. Raises ValueError, naming
    file and tensor, before anything is written where tensors and params.json disagree.
    """
    shards = read_shards(source)
    config = read_params(source / "params.json", shards, rope_factor=rope_factor)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Llama(config).named_parameters()}
    wanted = {meta_name(name) for name in shapes}
    found = shards[0].keys() - {"rope.freqs"}
    if wanted != found:
        problems = [f"missing: {name}" for name in sorted(wanted - found)]
        problems += [f"unexpected: {name:.200}" for name in sorted(found - wanted)]
        raise ValueError(f"{source}: params.json and the tensors disagree:\n  " + "\n  ".join(problems[:40]))

    parts = {name: [shard[meta_name(name)] for shard in shards] for name in shapes}
    cuts = {name: cut_along(meta_name(name), parts[name], shape, source) for name, shape in shapes.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in tqdm(shapes.items(), desc="import", unit="tensor", leave=False):
            cut = cuts[name]
            tensor = parts[name][0].clone() if cut is None else torch.cat(parts[name], dim=cut)
            if "q_proj" in name or "k_proj" in name:
                tensor = split_halves(tensor, shape[0] // config.head_dim)
            yield name, tensor.to(dtype or tensor.dtype)
            del tensor  # before the next one is made

    write_model(tensors(), config, target, side_files=[source])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m radllama.meta", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", required=True, type=Path, help="folder with consolidated.*.pth and params.json")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as stored")
    parser.add_argument(
        "--rope-factor", type=float, default=8.0, help="where params.json says use_scaled_rope: 8 (3.1), 32 (3.2)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.output.exists():
            raise ValueError(f"{options.output}: exists; choose another folder or remove it")
        if not options.input.is_dir():
            raise ValueError(f"{options.input}: no such folder")
        if not 1 <= options.rope_factor <= 1e6:
            raise ValueError(f"--rope-factor: expected a number from 1 to 1e6, found {options.rope_factor}")
        dtype = getattr(torch, options.dtype) if options.dtype else None
        import_meta(options.input, options.output, rope_factor=options.rope_factor, dtype=dtype)
        print(f"wrote {options.output}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
