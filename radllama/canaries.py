"""Memorisation: how many planted canaries a trained model gives back, and how exposed they are.

    python -m radllama.canaries --model DIR [--adapter DIR] --canaries data/canaries.jsonl --out DIR

Verbatim: greedy decoding after the canary's findings gives its impression to the letter. Exposure, in bits: log2 R less
log2 of the canary's rank by loss among R random impressions of the same format (Carlini et al. 2019, The Secret Sharer,
arXiv 1802.08232, section 4). A model that has learnt nothing about a canary gives any rank alike: log2(e) = 1.44 bits
on average. The largest that can be measured is log2 R.

Writes memorisation.json, and a section of the model card (README.md) in the adapter's or model's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from radllama.card import set_section
from radllama.checkpoint import find_model, load_model
from radllama.data import INSTRUCTIONS, Example, OnDemand, Prompt, check_vocabulary, pack, read_examples
from radllama.files import replace_text
from radllama.generate import check_similar, generate, render
from radllama.lora import load_adapter
from radllama.model import Llama
from radllama.planted import candidates
from radllama.tokenizer import Tokenizer

RESULT_FILE = "memorisation.json"


@torch.no_grad()
def impression_losses(
    model: Llama, tokenizer: Tokenizer, prompt: Prompt, findings: str, impressions: list[str], *, batch_size: int = 64
) -> list[float]:
    """The summed cross-entropy of each impression after the findings, in nats; the prompt is computed once a pack."""
    device = model.model.embed_tokens.weight.device
    rows = [OnDemand([Example("", findings, text)], tokenizer, prompt, "").row(0, 0) for text in impressions]
    losses: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = pack(rows[start : start + batch_size])
        each = model(
            batch.tokens.to(device),
            positions=batch.positions.to(device),
            segments=batch.segments,
            label_positions=batch.label_positions.to(device),
            labels=batch.labels.to(device),
        )
        sums = torch.zeros(len(batch.ids), dtype=torch.float64)
        losses += sums.index_add_(0, batch.owners, each.double().cpu()).tolist()
    return losses


def exposure(loss: float, others: list[float]) -> float:
    """log2 R - log2 rank of a loss among R, itself and the others; ties count as ranked before it."""
    return math.log2((1 + len(others)) / (1 + sum(other <= loss for other in others)))


def measure(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Prompt,
    planted: list[Example],
    *,
    others: int = 1023,
    progress: bool = False,
) -> dict[str, Any]:
    """What memorisation.json holds. `others`: random impressions that each canary is ranked among."""
    model.eval()
    prompts = render(tokenizer, prompt, planted)
    longest = max(len(tokenizer.encode(one.impression)) for one in planted) + 8
    outputs = generate(model, prompts, stop_ids=tokenizer.stop_ids, max_new_tokens=longest)
    rows = []
    for one, output in tqdm(list(zip(planted, outputs, strict=True)), desc="canaries", disable=not progress):
        drawn = [text for text in islice(candidates(one.id), others + 1) if text != one.impression][:others]
        loss, *rest = impression_losses(model, tokenizer, prompt, prompt.question(one), [one.impression, *drawn])
        verbatim = tokenizer.decode(output).strip() == one.impression
        rows.append({"id": one.id, "verbatim": verbatim, "exposure_bits": round(exposure(loss, rest), 3)})
    bits = [row["exposure_bits"] for row in rows]
    ranks = others + 1
    return {
        "canaries": len(rows),
        "verbatim": sum(row["verbatim"] for row in rows),
        "exposure_bits": {"mean": statistics.mean(bits), "median": statistics.median(bits), "max": max(bits)},
        "exposure_of_an_untrained_model": sum(math.log2(ranks / rank) for rank in range(1, ranks + 1)) / ranks,
        "largest_exposure_measurable": math.log2(ranks),
        "candidates": others,
        "each": rows,
    }


def describe(found: dict[str, Any]) -> str:
    bits = found["exposure_bits"]
    return (
        f"{found['verbatim']} of {found['canaries']} planted canaries are given back verbatim (greedy, from their "
        f"findings). Exposure: mean {bits['mean']:.2f}, median {bits['median']:.2f}, largest {bits['max']:.2f} bits; "
        f"a model that never saw them has {found['exposure_of_an_untrained_model']:.2f} on average, and "
        f"{found['largest_exposure_measurable']:.2f} is the most that can be measured (Carlini et al. 2019)."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m radllama.canaries", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder or Hugging Face repository")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter folder")
    parser.add_argument("--canaries", required=True, type=Path, help="canaries.jsonl, as radllama.reports wrote it")
    parser.add_argument("--out", required=True, type=Path, help=f"folder to write {RESULT_FILE} to")
    parser.add_argument("--quantize", choices=["nf4", "fp4"], help="store the weights in 4 bits, as QLoRA trained them")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--candidates", type=int, default=1023, help="impressions that each canary is ranked among")
    options = parser.parse_args(arguments)
    try:
        if options.candidates < 1:
            raise ValueError("--candidates: expected at least 1")
        planted = read_examples(options.canaries)
        if any(not one.findings for one in planted):
            raise ValueError(f"{options.canaries}: expected findings on every line, found plain texts")
        source = find_model(options.model)
        trained = Prompt.load(options.adapter if options.adapter else source)
        tokenizer = Tokenizer.from_dir(source, prompt_format=trained.format if trained else None)
        prompt = trained or Prompt(tokenizer.prompt_format, INSTRUCTIONS)
        check_similar(prompt.similar, planted, options.canaries)
        model = load_model(
            source, quantize=options.quantize, dtype=getattr(torch, options.dtype), device=options.device, progress=True
        )
        check_vocabulary(tokenizer, model.config.vocab_size, source=str(source))
        if options.adapter:
            load_adapter(model, options.adapter)
        found = measure(model, tokenizer, prompt, planted, others=options.candidates, progress=True)
        folder = options.adapter or Path(options.model)
        replace_text(options.out / RESULT_FILE, json.dumps(found, indent=2) + "\n")
        if folder.is_dir():
            set_section(folder, "Memorisation", describe(found))
        print(describe(found))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
