"""Write a trained model in bf16, without the run's prompt.json: what assets/tiny-llama3 holds.

python assets/export_base.py --run runs/tiny-full/last --output assets/tiny-llama3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from radllama.checkpoint import load_model, save_model
from radllama.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="a full model folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    save_model(load_model(options.run, dtype=torch.bfloat16), options.output)
    Tokenizer.from_dir(options.run).save(options.output)


if __name__ == "__main__":
    main()
