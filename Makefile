# Every target works in a fresh clone: it needs make and Python 3.11 or later, and installs the
# rest into virtual environments in this folder.
#
#   make demo                                   train a classifier, draw what it gets wrong
#   make test                                   tests and doctests, without the slow ones
#   make test-with PYTHON=python3.12 JAX=0.11.2 the same on another Python and JAX
#   make smoke-with PYTHON=python3.13 JAX=0.12.0
#                                               the self-check and a few tests, on another pair
#   make matrix                                 what takes too long for make test: every kind of
#                                               state under every pair of transformations, more
#                                               solvers, programs and indices
#   make fuzz MINUTES=60 SEED=1                 new random programs for so long, from that seed;
#                                               PROGRAMS=numpy, state, sequences or libraries: only
#                                               those of that kind
#   make mutants N=100 SEED=1                   put so many faults into copies of the package, one
#                                               at a time, and list those that no test notices
#   make suites ONLY=quax                       the tests of other libraries, with and without open
#                                               state; without ONLY those of all; SOURCES=FOLDER
#                                               has checkouts of those that publish no tests
#   make bench                                  timings against hand-written JAX and other libraries
#   make lint format types docs notebooks
#   make clean

PYTHON ?= python3
JAX ?=

DEMO := .venv-demo
TEST := .venv-test
LINT := .venv-lint
DOCS := .venv-docs
BENCH := .venv-bench
SUITES := .venv-suites
SMOKE := .venv-smoke

.PHONY: demo test test-with smoke smoke-with matrix fuzz mutants suites lint format types docs notebooks bench clean
.DEFAULT_GOAL := test
.SECONDARY:

# What .venv-NAME and .venv-NAME-anything install; the extras are those of pyproject.toml. The
# documentation runs what it shows, so it needs what the examples need.
EXTRAS_demo := demo
EXTRAS_test := test
EXTRAS_lint := lint
EXTRAS_docs := docs,demo,test
EXTRAS_bench := bench
EXTRAS_suites := test,suites
EXTRAS_smoke := smoke

# The stamp is written last, so that an installation that was interrupted is taken up again.
.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --editable '.[$(EXTRAS_$(firstword $(subst -, ,$*)))]' $(if $(JAX),'jax==$(JAX)')
	touch $@

demo: $(DEMO)/installed
	$(DEMO)/bin/python examples/digits.py

test: $(TEST)/installed
	$(TEST)/bin/python -m pytest -n auto -m 'not slow' --doctest-modules \
	    --ignore=jaxstate_tests/bench --ignore=jaxstate_tests/rules/eight_devices \
	    --ignore=jaxstate_tests/typed_programs \
	    jaxstate jaxstate_tests

# An environment of its own for each pair, or the next pair would find the wrong versions in it.
test-with:
	@test -n '$(JAX)' || { echo 'usage: make test-with PYTHON=python3.12 JAX=0.11.2'; exit 2; }
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	    $(MAKE) test TEST=.venv-test-python$$version-jax$(JAX)

smoke: $(SMOKE)/installed
	$(SMOKE)/bin/python -W error -m jaxstate.selfcheck
	$(SMOKE)/bin/python -m pytest -n auto -m 'not slow' \
	    jaxstate_tests/test_guard.py jaxstate_tests/core/test_jitted.py

smoke-with:
	@test -n '$(JAX)' || { echo 'usage: make smoke-with PYTHON=python3.13 JAX=0.12.0'; exit 2; }
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	    $(MAKE) smoke SMOKE=.venv-smoke-python$$version-jax$(JAX)

matrix: $(TEST)/installed
	$(TEST)/bin/python -m pytest -n auto -m slow -k 'not test_fuzz' \
	    --ignore=jaxstate_tests/rules/eight_devices jaxstate_tests

lint: $(LINT)/installed
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .

format: $(LINT)/installed
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .

# The package, and programs as users write them.
types: $(LINT)/installed
	$(LINT)/bin/pyright --pythonpath $(LINT)/bin/python
	$(LINT)/bin/pyright --pythonpath $(LINT)/bin/python --project jaxstate_tests/typed_programs
	$(LINT)/bin/mypy

PROGRAMS ?= state numpy sequences libraries objects
FUZZ_state := jaxstate_tests/fuzz/test_random_programs.py
FUZZ_numpy := jaxstate_tests/fuzz/test_inplace_programs.py
FUZZ_sequences := jaxstate_tests/fuzz/test_call_sequences.py
FUZZ_libraries := jaxstate_tests/fuzz/test_libraries.py
FUZZ_objects := jaxstate_tests/fuzz/test_object_programs.py

fuzz: $(TEST)/installed
	FUZZ_MINUTES=$(or $(MINUTES),10) FUZZ_SEED=$(SEED) $(TEST)/bin/python -m pytest -s \
	    -m slow $(foreach programs,$(PROGRAMS),$(FUZZ_$(programs)))

mutants: $(TEST)/installed
	$(TEST)/bin/python -m jaxstate_tests.mutants --number $(or $(N),100) --seed $(or $(SEED),1)

suites: $(SUITES)/installed
	$(SUITES)/bin/python -m jaxstate_tests.suites $(if $(SOURCES),--sources $(SOURCES)) $(ONLY)

docs: $(DOCS)/installed
	$(DOCS)/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

notebooks: $(DOCS)/installed
	mkdir -p build/notebooks
	set -e; for notebook in notebooks/*.md; do \
	    $(DOCS)/bin/python -m jupytext --execute --to ipynb \
	        --output build/$${notebook%.md}.ipynb $$notebook; \
	done
	sed 's/^```sh$$/```text/' docs/quickstart.md > build/notebooks/quickstart.md
	$(DOCS)/bin/python -m jupytext --set-kernel python3 --execute --to ipynb \
	    build/notebooks/quickstart.md

bench: $(BENCH)/installed
	$(BENCH)/bin/python -m jaxstate_tests.bench $(if $(QUICK),--quick)

clean:
	rm -rf .venv-* build dist docs/_build examples/output \
	    .pytest_cache .ruff_cache .hypothesis
	find jaxstate jaxstate_tests examples -name __pycache__ -prune -exec rm -rf {} +
