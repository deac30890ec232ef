# Everything a newcomer needs: `make demo`, `make test`. Each makes its own environment in $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
PROMPT ?= I am
QUESTION ?= What is the capital of France?
# uv does not read pip's own setting for extra wheel folders.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Where Python may not keep what it has compiled, each process compiles torch and MindSpore anew: 20 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
UV := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python

.PHONY: demo test test-e2e test-slow test-consumers lint bench docs docs-serve locks clean

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'uv>=0.9,<1'

$(VENV)/.demo: pyproject.toml | $(BIN)/uv
	$(UV) --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/uv
	$(UV) --editable '.[test]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/msquant quantize smollm2-135m --algo osl --overwrite
	$(BIN)/msquant run --prompt "$(PROMPT)"
	$(BIN)/msquant run --chat --prompt "$(QUESTION)" --max-tokens 32
	$(BIN)/msquant report smollm2-135m-osl --overwrite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core; a file's tests stay together, because they share what they have made.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: lint
	$(PYTEST) -m 'not slow and not e2e and not consumers'

# Each of these starts processes that import MindSpore anew, which is most of their time.
test-e2e: $(VENV)/.test
	$(PYTEST) -m 'e2e and not slow and not consumers'

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# The servers' own code on folders of ours, in environments that are made first, in .consumers.
test-consumers: $(VENV)/.test
	$(BIN)/python -m tests.consumers.environments
	$(BIN)/python -m pytest -m consumers tests/consumers

$(VENV)/.bench: $(VENV)/.test
	$(UV) --editable '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

$(VENV)/.docs: pyproject.toml | $(BIN)/uv
	$(UV) --editable '.[docs]'
	touch $@ $(VENV)/.demo

# The site in site/: English first, because its build empties the folder, then Chinese in site/zh-CN.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m mkdocs build --strict --config-file mkdocs.zh-CN.yml

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8080

# What `msquant engine install` verifies packages with; asks PyPI for the hashes of the versions in *.txt.
locks: $(VENV)/.test
	$(BIN)/python tools/lock_engines.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
