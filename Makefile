# Everything here needs Python 3.10 to 3.13 and make, and sets up the rest by itself. `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# The embedding model of the demo and the examples runs on PyTorch. Any build will do; TORCH= names another one.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Test processes beside each other, each with a Milvus of its own: tests wait more than they work. 0: none but pytest's.
TEST_PROCESSES ?= 3
BENCH_ARGS ?=
MUTANTS ?=
VERSIONS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The demo's arguments reach its command line through the environment: they may hold any character.
export DOCS QUESTION URI TOKEN MODEL

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test docs bench soak mutants clean

help: ## list these targets
	@echo "make TARGET, where TARGET is:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## real documents into Milvus and questions to them [DOCS=path QUESTION="..." URI=... TOKEN=... MODEL=...]
	@set --; \
	if [ -n "$$DOCS" ]; then set -- "$$@" "$$DOCS"; fi; \
	if [ -n "$$QUESTION" ]; then set -- "$$@" --question "$$QUESTION"; fi; \
	if [ -n "$$URI" ]; then set -- "$$@" --uri "$$URI"; fi; \
	if [ -n "$$MODEL" ]; then set -- "$$@" --model "$$MODEL"; fi; \
	MILVUS_TOKEN="$$TOKEN" exec $(BIN)/python examples/demo.py "$$@"

test: $(VENV)/.test milvus-server ## lint, types and all tests, against Milvus Lite and a Milvus server [PYTEST_ARGS=... TEST_PROCESSES=3]
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs: $(VENV)/.docs ## the documentation as a site, in build/site; fails at a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html"

bench: $(VENV)/.bench milvus-server ## measure against the plain store and against the server's ceiling [BENCH_ARGS=...]
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

soak: $(VENV)/.bench milvus-server ## ten minutes of mixed writes, deletes and searches with faults
	$(BIN)/python -m tests.soak

mutants: $(VENV)/.mutants ## put mistakes into the pure parts, one at a time: which does no test notice? [MUTANTS="..."]
	$(BIN)/python -m mutmut run $(MUTANTS)
	$(BIN)/python -m mutmut results

.PHONY: test-versions package
test-versions: $(VENV)/.versions package ## the tests on Milvus Lite with other Pythons, the lowest and newest dependencies [VERSIONS="lowest ..."]
	$(BIN)/python -m tests.versions --processes $(TEST_PROCESSES) $(VERSIONS)

package: $(VENV)/.versions ## build the package as for an index, look through it, install it into an empty environment, use it
	$(BIN)/python -m tests.package

clean: ## remove the environments, caches and the demo's database
	rm -rf $(VENV) .venv-milvus build dist mutants .mypy_cache .pytest_cache .ruff_cache .hypothesis demo.db
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.10 to 3.13 is needed; name one, such as: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml
	@echo "Installing the package and an embedding model on PyTorch into $(VENV): some minutes, once."
	$(PIP) "$(TORCH)" || echo "$(TORCH) is not to be had here: taking the build that pip chooses."
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo pyproject.toml
	$(PIP) --editable ".[demo,test,benchmarks]"
	@touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml
	$(PIP) --editable ".[docs]"
	@touch $@

$(VENV)/.bench: $(VENV)/.created pyproject.toml
	$(PIP) --editable ".[test,benchmarks]"
	@touch $@

$(VENV)/.versions: $(VENV)/.created
	$(PIP) "build>=1.2" "twine>=6.1" "uv>=0.5"
	@touch $@

$(VENV)/.mutants: $(VENV)/.created pyproject.toml
	$(PIP) --editable ".[test,mutants]"
	@touch $@

# A real Milvus server, for tests and benchmarks. Its own environment, as its package pins old dependencies.
.PHONY: milvus-server
milvus-server:
	@if [ "$$(uname -sm)" != "Linux x86_64" ]; then \
		echo "No Milvus server to start on $$(uname -sm): what needs one is skipped."; \
	elif [ ! -e .venv-milvus/.created ]; then \
		echo "Installing a Milvus server into .venv-milvus, once."; \
		{ $(PYTHON) -m venv .venv-milvus \
			&& .venv-milvus/bin/python -m pip install --quiet --disable-pip-version-check --no-deps milvus==2.3.5 \
			&& touch .venv-milvus/.created; \
		} || echo "No Milvus server could be installed: what needs one is skipped."; \
	fi
