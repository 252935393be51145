# `make demo` and `make test` need CPython 3.11 to 3.13, git and make; they set up all the rest in .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
ARGS   ?=

.PHONY: demo test test-lerobot test-openpi test-ray lint setup check clean-venv

demo: check
	$(BIN)/python -m jobs.pipeline experiment=demo $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# our datasets in the lerobot package and its in ours; it has an environment of its own, for its pins are not ours
test-lerobot: $(STAMP)
	@$(BIN)/python tests/lerobot/environment.py .venv-lerobot || exit 0; \
	  LEROBOT_PYTHON=.venv-lerobot/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/lerobot -rs $(ARGS)

# the published openpi client against our server; it wants an older numpy, and imports typing_extensions unasked
test-openpi: $(STAMP)
	@.venv-openpi/bin/python -c 'import openpi_client.websocket_client_policy' 2>/dev/null || { \
	  $(BIN)/python -m venv --clear .venv-openpi && \
	  .venv-openpi/bin/python -m pip install -qq openpi-client==0.1.2 typing_extensions; } || { \
	  echo "test-openpi is skipped, openpi-client does not install here" >&2; exit 0; }; \
	  OPENPI_CLIENT_PYTHON=.venv-openpi/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serve/test_openpi.py \
	  -rs $(ARGS)

# launcher=ray on clusters of this machine; Ray is large, so that it lies beside our packages and not among them
test-ray: $(STAMP)
	@.venv-ray/bin/python -c 'import ray' 2>/dev/null || { \
	  $(BIN)/python -m venv --clear .venv-ray && \
	  $(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > `.venv-ray/bin/python -c \
	    'import site; print(site.getsitepackages()[0])'`/ours.pth && \
	  .venv-ray/bin/python -m pip install -qq -c constraints.txt ray; } || { \
	  echo "test-ray is skipped, ray does not install here" >&2; exit 0; }; \
	  OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest tests/jobs/test_launchers.py tests/jobs/test_ray.py -rs $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/ty check

setup: $(STAMP)

# what pip cannot bring: Python itself and a library that draws without a screen
check: $(STAMP)
	@$(BIN)/python -m jobs.check

# a setup that failed or was stopped may have left a python without pip
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: dreamgen needs Python 3.11 to 3.13, as its simulator does; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Install one and call make PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq $(TORCH)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[sim,serve,latent,dev]'
	@touch $@

clean-venv:
	rm -rf $(VENV)
