# `make demo`, `make test` and `make check` each make .venv on first use and do not reinstall afterwards.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

.PHONY: help demo demo-moe test test-frameworks torture studies check bench clean

help:
	@echo "make demo    the whole story: pre-train, merge, anneal, evaluate, report (about two minutes on two cores)"
	@echo "make test    all tests (under five minutes on two cores)"
	@echo "make test-frameworks  tests with DeepSpeed, Lightning, Megatron-core and OLMo-core, in an environment of its own"
	@echo "make torture a thousand kills, power lost at every moment, a day of pma watch, torchrun and Ray"
	@echo "make studies every study at a size too small to show anything: that their code runs"
	@echo "make check   lint, format, types, import contract, README commands"
	@echo "make bench   merge speed beside plain reads and writes, a torch loop, and mergekit (15 GB of disk)"

# constraints.txt pins torch to a version that has a CPU build, or a CPU machine would fetch gigabytes of CUDA
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PMA needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,eval,report,dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/pma demo -o $(DEMO)

demo-moe: .venv/.installed
	$(BIN)/pma demo --moe -o $(DEMO)-moe

# one torch thread: tiny models gain nothing from more, and spinning threads on a busy machine cost minutes
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --ignore tests/torture --ignore tests/heavy

# trainers whose checkpoints are read: an environment on top of the other, which stays without them
.venv-frameworks/.installed: .venv/.installed tests/heavy/frameworks.txt
	$(PYTHON) -m venv --clear .venv-frameworks
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$(.venv-frameworks/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth
	.venv-frameworks/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/heavy/frameworks.txt
	touch $@

test-frameworks: .venv-frameworks/.installed
	OMP_NUM_THREADS=1 .venv-frameworks/bin/python -m pytest tests/heavy

# kills, lost power and failing storage; TIMES=1 is what CI runs
TIMES ?= 10
torture: .venv/.installed
	PMA_TORTURE=$(TIMES) OMP_NUM_THREADS=1 $(BIN)/pytest tests/torture -s

STUDIES ?= studies-toy
studies: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pma study all --preset toy --seeds 2 --jobs 2 --home $(STUDIES)/home -o $(STUDIES)/results

check: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/readme_commands.py

bench: .venv/.installed
	$(BIN)/python benchmarks/merge_speed.py
	$(BIN)/python benchmarks/format_speed.py

clean:
	rm -rf .venv .venv-frameworks demo demo-moe studies-toy benchmarks/.mergekit-venv
