# Every target runs in $(VENV); `install` makes it. On a machine that has an environment already: VENV=/path/to/it.
VENV ?= .venv
PYTHON ?= python3
# What pip is asked for before everything else; say TORCH=torch==2.13.0 to choose the release.
TORCH ?= torch

export PATH := $(abspath $(VENV))/bin:$(PATH)

# What `make bench` measures and where it is kept; FLAGS are further flags of benchmarks/bench.py, such as --again.
ROWS ?=
CSV ?= benchmarks/speed.csv
FLAGS ?=

# The stamp's name holds a checksum of the requirements, so that only a change of them installs again. A TORCH given
# with the command has a stamp of its own: another TORCH installs again, none at all takes what is there.
REQUIREMENTS := requirements.txt requirements-dev.txt
checksum = $(shell (cat $(REQUIREMENTS); echo '$(1)') | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(call checksum,)
TORCH_STAMP := $(if $(filter file,$(origin TORCH)),$(STAMP),$(VENV)/.installed-$(call checksum,$(TORCH)))

.PHONY: help install quickstart test test-all test-faults test-gpu real quality style bench doctor clean
.NOTPARALLEL:

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(TORCH_STAMP)  ## Install everything into VENV (default .venv); TORCH=torch==X.Y.Z chooses the torch

$(TORCH_STAMP):
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: name one, as in make install PYTHON=python3.12" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install "$(TORCH)"
	$(VENV)/bin/python -m pip install -r requirements.txt -r requirements-dev.txt
	@rm -f $(VENV)/.installed-*
	@touch $(STAMP) $(TORCH_STAMP)

quickstart: install  ## Teach a small model a colour that it has never seen, on the CPU: two minutes
	./quickstart.sh

test: install  ## Run the tests that guard every change: 6 minutes on two free cores
	OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal -m "not (slow or faults or gpu or multi_gpu)"

test-all: install  ## Run the rest that needs no GPU, after make test: 20 minutes on two free cores
	OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal -m "slow and not (faults or gpu or multi_gpu)"

test-faults: install  ## Kill, corrupt and starve real runs at random moments: 20 minutes
	OMP_NUM_THREADS=1 pytest -s -m "faults and not (gpu or multi_gpu)"

real: install  ## Check the scripts against real weights: MODEL=zai-org/CogVideoX-2b, on a GPU, 30 minutes by estimate
	@test -n "$(MODEL)" || { echo "MODEL is missing, as in make real MODEL=zai-org/CogVideoX-2b" >&2; exit 2; }
	python benchmarks/real_model.py --model "$(MODEL)" $(REAL_FLAGS)

test-gpu: install  ## Run the tests that need a CUDA device
	pytest -m "gpu or multi_gpu"

quality: install  ## Check style: ruff, the shell scripts' syntax, shellcheck where it is installed
	ruff check .
	ruff format --check .
	for script in *.sh training/*.sh tiny_model/*.sh .ci/run; do bash -n "$$script" || exit 1; done
	! command -v shellcheck >/dev/null || shellcheck *.sh training/*.sh tiny_model/*.sh .ci/run

style: install  ## Format the code
	ruff check --fix .
	ruff format .

bench: install  ## Measure training on a GPU, as in: make bench ROWS="5b-reference 5b-balanced 5b-speed"
	python benchmarks/bench.py $(ROWS) --csv $(CSV) $(FLAGS)

doctor:  ## Say what this machine lacks for training, with the fix; needs nothing installed
	@python3 training/doctor.py

clean:  ## Remove caches and the quickstart's output; keeps VENV and outputs/
	rm -rf quickstart-output .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
