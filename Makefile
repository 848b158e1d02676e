# cotree from a fresh clone: needs Python >= 3.11 with pip and venv, and make. `make` lists the targets.
#
# All targets share one .venv. PYTHON=... picks the interpreter, TORCH_INDEX=URL the package index of torch's builds,
# ARGS="..." is passed on: make demo ARGS="search.rollouts=16", make test ARGS="-k wilson -x".

.DEFAULT_GOAL := help
.PHONY: help demo test check slow clean

PY := .venv/bin/python
# The stamp names what was installed: other dependencies, other pins or a moved folder install again.
HASH := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)
DEV := .venv/dev-$(HASH).ok
# What the demo needs is a part of what the tests need.
RUN := $(or $(wildcard $(DEV)),.venv/run-$(HASH).ok)

help:
	@echo "make demo    run recipes/laptop.yaml from end to end on this machine; run it again to resume"
	@echo "make test    the tests, without the slow ones"
	@echo "make check   ruff and mypy --strict"
	@echo "make slow    the slow tests"
	@echo "make clean   remove .venv and caches (runs/ stays)"

demo: $(RUN)
	@.venv/bin/cotree run recipes/laptop.yaml $(ARGS)

test: $(DEV)
	@$(PY) -m pytest -m "not slow" $(ARGS)

check: $(DEV)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy --strict

# pytest exits with 5 when no test matches.
slow: $(DEV)
	@$(PY) -m pytest -m slow $(ARGS) || { code=$$?; [ $$code = 5 ] && echo "make slow: no slow tests match" || exit $$code; }

clean:
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run-$(HASH).ok:
	@.ci/install local,train $@

$(DEV):
	@.ci/install local,train,dev $@
