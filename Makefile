# make setup, make serve, make test, make bench: each installs what it needs first, into .venv, and may be repeated.
# Options travel as variables: `make serve MODEL_ID=/models/my-model MAX_INPUT_TOKENS=2048 HTTP_PORT=9000`.

PYTHON  ?= python3
COMPUTE ?= cpu
VENV    := .venv
CACHE   := .cache
WORKERS ?= 2
MINUTES ?= 20
STREAMS ?= 4
BIN     := $(VENV)/bin
STAMPS  := $(VENV)/.stamps
PIP     := $(BIN)/python -m pip --disable-pip-version-check install -qq

MODEL   := $(CACHE)/models/smollm2-135m-instruct
CLIENT  := $(wildcard client/pyproject.toml)
TOOLS   := $(CACHE)/tools
comma   := ,
SOURCES := model_repository scripts tests $(if $(CLIENT),client)
TYPED   := model_repository/textgen/1/textgen_engine model_repository/tokenizer/1/textgen_tokenizer scripts $(if $(CLIENT),client)

# Threads that spin while they wait for each other crawl on a machine that does something else as well.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup serve test test-models test-families test-faults soak audit lint bench bench-compare rivals
.PHONY: check-image gpu-check monitoring-tools proxy-tools test-ranks clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMPS)/packages $(STAMPS)/kernels $(MODEL)/manifest.json ## create .venv, install everything, prepare the demonstration model

serve: $(STAMPS)/packages ## start tritonserver and show a first answer; MODEL_ID=<folder> serves another model
	@exec $(BIN)/python scripts/serve.py

test: setup lint ## lint, type check and run every test this machine can run; ARGS="-k name" narrows
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-models: $(STAMPS)/packages $(STAMPS)/kernels ## try every causal model of transformers on the engine, tiny and random (minutes); the table of docs/models.md
	$(BIN)/python scripts/model_coverage.py $(ARGS)

test-families: setup ## serve random models of a few hundred MB, shaped like Mixtral, Falcon and StarCoder, end to end
	$(BIN)/python scripts/serve_families.py $(ARGS)

test-faults: setup ## kill, hang, fill, crash: every fault on a real server; the table of docs/operations.md
	$(BIN)/python -m pytest --faults --record-faults benchmarks/results/faults.json tests/server/test_faults_*.py tests/server/test_fuzz.py tests/gateway/test_fuzz.py tests/engine/test_clock.py $(ARGS)
	$(BIN)/python scripts/fault_table.py benchmarks/results/faults.json docs/operations.md

soak: setup ## MINUTES=20 of mixed traffic with STREAMS=4 clients: leaks, lost flags, wrong answers; writes docs/soak.md
	$(BIN)/python scripts/soak.py --minutes $(MINUTES) --streams $(STREAMS) --output benchmarks/results/soak.json --page docs/soak.md $(ARGS)

audit: setup ## known vulnerabilities of what is installed, by pip-audit (asks PyPI's advisory service)
	$(BIN)/python -m venv $(CACHE)/audit
	$(CACHE)/audit/bin/python -m pip --disable-pip-version-check install -qq pip-audit==2.10.1
	$(CACHE)/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') --skip-editable --strict $(ARGS)

lint: $(STAMPS)/packages ## ruff (style, imports, format) and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(TYPED)

bench: setup ## measure a running server with NVIDIA's perf_analyzer; writes benchmarks/results/
	$(BIN)/python scripts/benchmark/perf_analyzer.py $(ARGS)

RIVALS := $(CACHE)/rivals

bench-compare: setup ## our server beside every installed rival, taking turns; takes half an hour on an idle machine
	@$(PIP) ".[benchmark]"
	$(BIN)/python scripts/benchmark/compare.py $(ARGS)

rivals: setup ## install the engines that bench-compare knows, each in an environment of its own (10 GB, half an hour)
	scripts/benchmark/install_rivals.sh $(RIVALS) $(MODEL)

check-image: setup ## run the instructions of docker/Dockerfile.cpu in a fresh folder, up to a healthy server
	rm -rf $(CACHE)/image
	$(BIN)/python scripts/check_image.py --folder $(CACHE)/image --model $(MODEL)

# Not with what .venv has: by default that is PyTorch for CPUs.
gpu-check: ## check and measure the GPU path with PYTHON's torch and transformers, in less than 8 minutes; installs nothing
	$(PYTHON) scripts/gpu_check.py $(ARGS)

monitoring-tools: $(TOOLS)/usr/bin/promtool ## fetch Debian's Prometheus into .cache/tools (no root needed), for its tests

$(TOOLS)/usr/bin/promtool:
	@mkdir -p $(TOOLS)
	cd $(TOOLS) && apt-get download -qq prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb

proxy-tools: $(TOOLS)/usr/sbin/nginx ## fetch Debian's nginx into .cache/tools (no root needed), for the tests of replicas

$(TOOLS)/usr/sbin/nginx:
	@mkdir -p $(TOOLS)
	cd $(TOOLS) && apt-get download -qq nginx && dpkg -x nginx_*.deb . && rm nginx_*.deb

test-ranks: setup ## the real model on two and four ranks against one, which takes long
	$(BIN)/python -m pytest --faults -m faults tests/engine/parallel $(ARGS)

clean: ## remove the environment, the caches and the prepared model
	rm -rf $(VENV) $(CACHE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- installation, in steps that are repeated only when what they install has changed -----------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 13) else "triton-textgen needs Python 3.10, 3.11 or 3.12; $(PYTHON) is %d.%d (choose with PYTHON=...)" % v[:2])'
	@echo "[1/4] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv pyproject.toml
	@echo "[2/4] installing PyTorch ($(COMPUTE))"
	@$(PIP) ".[$(COMPUTE)]"
	@touch $@

$(STAMPS)/packages: $(STAMPS)/torch requirements/no-deps.txt requirements/dev-no-deps.txt pyproject.toml $(CLIENT)
	@echo "[3/4] installing tritonserver, transformers and the tools"
	@$(PIP) ".[server,dev$(if $(filter cpu,$(COMPUTE)),$(comma)dev-cpu)]" $(if $(CLIENT),-e './client[gateway]')
	@$(PIP) --no-deps -r requirements/no-deps.txt -r requirements/dev-no-deps.txt
	@touch $@

# Without a compiler the engine does without; with one it would otherwise compile at its first start.
KERNELS := model_repository/textgen/1/textgen_engine/kernels
$(STAMPS)/kernels: $(STAMPS)/packages $(wildcard $(KERNELS)/cpu*)
	@cd model_repository/textgen/1 && $(abspath $(BIN))/python -m textgen_engine.kernels.cpu_build >/dev/null 2>&1 || echo "the CPU kernels could not be compiled (is there a C++ compiler?): PyTorch's operations take their place"
	@touch $@

# The script looks at what is there and does nothing when it is complete.
$(MODEL)/manifest.json: $(STAMPS)/packages scripts/prepare_model.py
	@echo "[4/4] preparing SmolLM2-135M-Instruct (about half a minute)"
	@$(BIN)/python scripts/prepare_model.py --output $(MODEL)
	@touch $@
