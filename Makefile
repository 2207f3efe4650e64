# make demo    set up, train, generate, evaluate          make test         lint, types and the whole test suite
# make bench   training, generating and loading against transformers + PEFT + bitsandbytes, an hour (PAIRS=data/indiana/train.jsonl: your reports)
# make indiana CSV=...   train and score on real chest X-ray reports
# make tiny-base   re-make assets/tiny-llama3 (a quarter of an hour on two cores)
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow test-system test-fuzz test-kill setup indiana bench tiny-base reports clean

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

.venv/ready-reports: .venv/ready
	$(PIP) --no-build-isolation -e '.[reports]'
	touch $@

.venv/ready-bench: .venv/ready
	$(PIP) --no-build-isolation -e '.[bench]'
	$(PIP) --no-deps llama-models
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

# All that takes long: four ranks, the fuzz, the kills. Half an hour.
test-slow: .venv/ready-test
	OMP_NUM_THREADS=1 python -m pytest -q -m slow

# 200 cases of each kind of error; another seed: python tests/fuzz.py --seed 1
test-fuzz: .venv/ready-test
	OMP_NUM_THREADS=1 python -m pytest -q -m slow -s tests/test_fuzz.py

# Processes that are really killed, dozens of times: a quarter of an hour.
test-kill: .venv/ready-test
	OMP_NUM_THREADS=1 python -m pytest -q -s tests/test_survival.py

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

# Real reports: CSV is the Indiana collection's indiana_reports.csv. About an hour on two cores; SEEDS="0" does one of three.
SEEDS ?= 0 1 2
indiana: .venv/ready-reports
	@test -f "$(CSV)" || { echo "usage: make indiana CSV=path/to/indiana_reports.csv"; exit 2; }
	mkdir -p runs && rm -rf runs/indiana-full runs/indiana-qlora-*
	python -m radllama.reports "$(CSV)" --id uid --findings findings --impression impression \
	  --indication indication --comparison comparison --shares 70/10/20 --out data/indiana
	for part in train validation test; do \
	  python -m radllama.similar --count 6 --train data/indiana/train.jsonl \
	    --input data/indiana/$$part.jsonl --output data/indiana/$$part-similar.jsonl || exit 1; \
	done
	python assets/make_reports.py text --count 12000 --seed 7 --output runs/synthetic-text.jsonl
	python assets/make_mixture.py --pairs data/indiana/train-similar.jsonl \
	  --others assets/reports/train.jsonl runs/synthetic-text.jsonl --output runs/indiana-mixture.jsonl
	python assets/make_base.py --texts data/indiana/train.jsonl data/indiana/train.jsonl data/indiana/train.jsonl \
	  runs/synthetic-text.jsonl --output runs/indiana-init \
	  --vocab-size 3072 --hidden-size 256 --layers 6 --heads 8 --kv-heads 4 --intermediate-size 704
	deepspeed radllama/train.py --config configs/indiana-full.json
	for seed in $(SEEDS); do \
	  deepspeed radllama/train.py --config configs/indiana-qlora.json \
	    --set training.seed=$$seed --set training.output=runs/indiana-qlora-$$seed && \
	  for samples in 1 16; do \
	    python -m radllama.generate --model runs/indiana-full/best --quantize nf4 --adapter runs/indiana-qlora-$$seed/best \
	      --input data/indiana/test-similar.jsonl --output runs/indiana-qlora-$$seed/predictions-$$samples.jsonl \
	      --name tuned-$$seed-$$samples --max-new-tokens 128 --seed $$seed \
	      --consensus $$samples --temperature $$([ $$samples = 1 ] && echo 0 || echo 0.6) || exit 1; \
	  done || exit 1; \
	done
	python -m radllama.eval runs/indiana-qlora-*/predictions-16.jsonl runs/indiana-qlora-*/predictions-1.jsonl \
	  --train data/indiana/train.jsonl --out runs/indiana-eval

PAIRS ?= assets/reports/train.jsonl
bench: .venv/ready-bench
	python bench/step.py --pairs $(PAIRS)
	python bench/step.py --pairs $(PAIRS) --wordings 20
	python bench/step.py --pairs $(PAIRS) --method full
	python bench/sweep.py --pairs $(PAIRS)
	python bench/generate.py --pairs $(PAIRS) --learn 30
	python bench/load.py

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
