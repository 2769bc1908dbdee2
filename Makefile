# Everything runs in a virtual environment inside the checkout; nothing else on the machine is touched.
PYTHON ?= python3
VENV   ?= .venv
CONF   ?= 124m
ARGS   ?=
# Taken as they are, by make and by the shell: a prompt may hold anything. `override` is for what stands on make's
# command line; the recipes have them from the environment.
override PROMPT := $(value PROMPT)
override OUT    := $(value OUT)
override MODEL  := $(value MODEL)
export PROMPT OUT MODEL
# What the project is installed with beside itself: on a machine with an NVIDIA driver, what its kernels use there.
EXTRAS ?= $(shell command -v nvidia-smi >/dev/null && echo '[gpu]')
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Other extras are another stamp, so that they are installed when they are first asked for: .installed-gpu-fa4
COMMA  := ,
STAMP  := $(BIN)/.installed$(subst $(COMMA),-,$(subst ],,$(subst [,-,$(EXTRAS))))

.DEFAULT_GOAL := help
.PHONY: help install demo reproduce baseline plan up down test test-fast lint format sample export bench-train bench-tokenize clean

help: ## this list
	@echo "make TARGET [CONF=124m] [ARGS='train.optim.max_lr=3e-4 runtime.gpus=4']"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20

# torch first and alone: with its version settled, nothing else pulls in another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.platform == "linux" else "error: Linux is needed (also in a container or WSL 2), this is " + sys.platform)'
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "error: Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.$(EXTRAS)'
	touch $@

$(BIN)/.installed-test: $(STAMP)
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@

install: $(STAMP) ## set up the virtual environment

demo: $(STAMP) ## the whole pipeline on a small model, on any machine
	$(BIN)/python -m flows.reproduce demo $(ARGS)

reproduce: $(STAMP) ## the real thing: make reproduce CONF=124m
	$(BIN)/python -m flows.reproduce $(CONF) $(ARGS)

baseline: $(STAMP) ## OpenAI's GPT-2 of CONF's size, measured as the recipe's own model is
	$(BIN)/python -m flows.baseline $(CONF) $(ARGS)

plan: $(STAMP) ## what CONF would run, and what of it is finished
	$(BIN)/python -m gpt2.plan $(CONF) $(ARGS)

up: $(STAMP) ## Prefect server, MLflow and a worker in the background, all recipes deployed
	$(BIN)/python -m flows.services up $(ARGS)

down: $(STAMP) ## stop what `make up` started
	$(BIN)/python -m flows.services down $(ARGS)

test: lint ## everything that needs no GPU
	$(BIN)/python -m pytest -m "not slow and not gpu" -q -n 2
	$(BIN)/python -m pytest -m "slow and not gpu" -q -n 2 --dist loadfile

test-fast: $(BIN)/.installed-test ## the tests to run at every change
	$(BIN)/python -m pytest -m "not slow and not gpu" -q -x -n 2

lint: $(BIN)/.installed-test ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.installed-test ## let ruff lay out the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-tokenize: $(STAMP) ## tokens/s beside the plain method
	$(BIN)/python -m bench.tokenize $(ARGS)

bench-train: $(STAMP) ## tokens/s and MFU; ARGS='--size 350m --check'
	$(BIN)/python -m bench.train $(ARGS)

# what stands for the model: MODEL if given, else CONF's, with the overrides in ARGS
NAMED  = $${MODEL:+"$$MODEL"}
RECIPE = $(if $(MODEL),,--recipe $(CONF))

sample: $(STAMP) ## text from a trained model: make sample PROMPT='...' [CONF=124m ARGS='field=value ...' | MODEL=folder]
	$(BIN)/python -m gpt2.generate $(NAMED) --prompt "$$PROMPT" $(RECIPE) $(ARGS)

export: $(STAMP) ## a trained model as a Hugging Face folder: make export OUT=folder [CONF=124m ARGS='...' | MODEL=folder]
	@test -n "$$OUT" || { echo "error: OUT is not given: make export OUT=folder" >&2; exit 2; }
	$(BIN)/python -m gpt2.export $(NAMED) "$$OUT" $(RECIPE) $(ARGS)

clean: ## remove the environment and caches; the store stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
