# Targets: demo, test, test-ray, check, bench, docs, test-vllm. Each sets up what it needs first if it is missing or older than what it
# was made from. The plain commands behind the first are in README.md.

# A Python 3.11 or newer that can make virtual environments; `make PYTHON=... test` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := $(CURDIR)/.venv-vllm

.PHONY: demo test test-ray check bench docs test-vllm vllm-environment

demo: $(READY)
	$(BIN)/clampdown demo --out runs/demo

# Two processes of one thread each (tests/conftest.py): torch's own threads do not pay on models this small. loadgroup: the
# tests that compare with other packages run in one of them, so that the other need not import those.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Ray in an environment of its own on top of .venv (about 400 MB): the tests that need it skip elsewhere.
RAY := .venv-ray
test-ray: $(RAY)/.ready
	PYTHONPATH=src $(RAY)/bin/python -m pytest -rs tests/scale/test_ray.py

$(RAY)/.ready: $(READY)
	test -x $(RAY)/bin/pip || $(BIN)/python -m venv $(RAY)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	$(RAY)/bin/pip install "ray==2.60.0"
	@touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The plugin for vLLM. `make VLLM_TESTS="-m ci" test-vllm` runs the part that every change must pass.
test-vllm: $(VLLM_VENV)/.ready
	cd clampdown-vllm && OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS)

vllm-environment: $(VLLM_VENV)/.ready

bench: $(READY)
	@mkdir -p runs/bench
	@set -e; for script in benchmarks/[!_]*.py; do \
		echo "== $$script"; $(BIN)/python "$$script" --json "runs/bench/$$(basename "$$script" .py).json"; done

# The documentation site, into build/site; a warning (a broken link, a page outside the navigation) is an error. An environment
# of its own: its packages are small and know nothing of torch, because the pages about Python are made by reading the source.
docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

$(VENV)-docs/.ready: docs/requirements.txt
	test -x $(VENV)-docs/bin/pip || "$(PYTHON)" -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q -r docs/requirements.txt
	@touch $@

# torch alone and first, by its exact pin: an unpinned torch pulls gigabytes. A half-made .venv has no stamp and is
# finished by the next call; a changed pyproject.toml or constraints.txt is installed over the old.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "clampdown needs Python 3.11 or newer with the venv module" >&2; exit 1; }
	test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(VLLM_VENV)/.ready: clampdown-vllm/pyproject.toml clampdown-vllm/environment.sh clampdown-vllm/constraints.txt
	@test -n "$(PYTHON)" || { echo "clampdown needs Python 3.11 or newer with the venv module" >&2; exit 1; }
	clampdown-vllm/environment.sh $(VLLM_VENV) "$(PYTHON)"
	@touch $@
