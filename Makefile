# make serve ARGS="--port 9000"   the server, after installing what it needs into .venv (others than this host reach it
#                                 with keys, or --host 0.0.0.0)
# make test                       ruff, mypy, pytest in two processes (ARGS go to pytest)
# make lock                       requirements.lock anew, after requirements.txt has changed
# make proof                      what is too long for every run: half an hour of schemathesis (does the server answer
#                                 what its description promises?), and the tests marked `proof`
# make doctor                     can this machine serve, and what to do if not

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := uv==0.13.9
RUN    := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
WORKERS ?= 2
BENCHES = codecs scheduler diffusion hub lora denoiser overhead liveness image inpaint hot_path recovery idle memory report

.PHONY: serve test lint proof bench doctor lock clean
.DELETE_ON_ERROR:

serve: $(RUN)
	exec $(BIN)/python server.py $(ARGS)

doctor: $(RUN)
	$(BIN)/python server.py doctor $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not proof and not alone" $(ARGS)
	$(BIN)/python -m pytest -m "alone and not proof" $(ARGS) || test $$? = 5  # 5: there are none among ARGS

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

proof: $(DEV)
	$(BIN)/python -m bench.conformance $(ARGS)
	$(BIN)/python -m pytest -m proof

bench: $(DEV)
	set -e; for name in $(BENCHES); do $(BIN)/python -m bench.$$name $(ARGS); done

# Without torch, which is installed first: its build depends on the host.
lock: $(RUN)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	grep -v '^torch==' requirements.txt | UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile - --quiet \
		--universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
		--output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps hold when the requirements were last installed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(RUN): requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(DEV): requirements-dev.txt requirements-bare.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-bare.txt
	touch $@ $(RUN)
