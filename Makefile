# make demo    set up, train, generate, evaluate          make test         lint, types and the whole test suite
# make tiny-base   re-make assets/tiny-llama3 (a quarter of an hour on two cores)
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-system setup tiny-base reports clean

setup: .venv/ready
test: .venv/ready-test

# torch and the build tools come first: deepspeed's build looks for them.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "radllama needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel ninja
	$(PIP) torch
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e .
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) --no-build-isolation -e '.[test]'
	$(PIP) --no-deps llama-models
	touch $@

# One thread in the tests: their tensors are tiny, and threads that wait for each other cost more than they give.
test:
	ruff check . && ruff format --check . && mypy
	OMP_NUM_THREADS=1 python -m pytest -q -m "not gpu and not system and not slow"

test-system: .venv/ready-test
	OMP_NUM_THREADS=1 python -m pytest -q -m system

demo: .venv/ready
	rm -rf runs/demo
	deepspeed radllama/train.py --config qlora.json
	python -m radllama.generate --model assets/tiny-llama3 --input assets/reports/test.jsonl \
	  --output runs/demo/base.jsonl --name base --max-new-tokens 96
	python -m radllama.generate --model assets/tiny-llama3 --quantize nf4 --adapter runs/demo/best \
	  --input assets/reports/test.jsonl --output runs/demo/tuned.jsonl --name tuned --max-new-tokens 160
	python -m radllama.eval runs/demo/tuned.jsonl runs/demo/base.jsonl --brief \
	  --train assets/reports/train.jsonl --out runs/demo/eval
	@echo; echo "Written: runs/demo/best (the adapter), runs/demo/loss.png (the loss curve), runs/demo/metrics.jsonl,"
	@echo "runs/demo/tuned.jsonl and base.jsonl (the impressions), runs/demo/eval (the scores)."

reports: .venv/ready
	python assets/make_reports.py pairs --out assets/reports

tiny-base: .venv/ready
	mkdir -p runs && rm -rf runs/tiny-full
	python assets/make_reports.py text --count 40000 --seed 7 --output runs/tiny-text.jsonl
	python assets/make_base.py --texts runs/tiny-text.jsonl --output runs/tiny-init \
	  --vocab-size 3072 --hidden-size 192 --layers 5 --heads 6 --kv-heads 2 --intermediate-size 512
	deepspeed radllama/train.py --config configs/tiny-full.json
	rm -rf assets/tiny-llama3
	python assets/export_base.py --run runs/tiny-full/last --output assets/tiny-llama3

clean:
	rm -rf .venv runs
