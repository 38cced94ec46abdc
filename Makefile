# Both commands do all their own set-up: Python 3.11 or later and a package registry are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: demo test test-consumers quality style benchmark cards

$(INSTALLED): pyproject.toml scripts/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[test,quality]'
	touch $@

# the main job on the bundled model: compress, write, reload, measure; the last line is the report's path
demo: $(INSTALLED)
	$(BIN)/hfcompress run w4a16 --output demo-output --overwrite --measure all

# one thread per worker: the models are tiny, and two workers fill two cores
test: quality
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not consumers" tests

# the written formats, loaded by others' loaders in environments of their own: one rule per environment
CONSUMERS = .consumers
# llama.cpp, compiled for any CPU of this kind: some minutes, and it needs cmake and a C++ compiler
$(CONSUMERS)/llamacpp/installed: scripts/constraints-llamacpp.txt
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF" $(@D)/bin/pip install --quiet --disable-pip-version-check -c $< llama-cpp-python gguf
	touch $@

$(CONSUMERS)/gptqmodel/installed: scripts/constraints-gptqmodel.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $< gptqmodel optimum
	touch $@

# ZeRO's stages; it compiles its own communication for a CPU when it is first imported
$(CONSUMERS)/deepspeed/installed: pyproject.toml scripts/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[test]' deepspeed==0.19.8
	touch $@

test-consumers: $(INSTALLED) $(addprefix $(CONSUMERS)/,$(addsuffix /installed,llamacpp gptqmodel deepspeed))
	HFCOMPRESS_CONSUMERS=$(CONSUMERS) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m consumers tests/consumers

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/ty check --python $(VENV) hfcompress

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(INSTALLED)
	$(BIN)/python scripts/benchmark.py quality
	$(BIN)/python scripts/benchmark.py recipes
	$(BIN)/python scripts/benchmark.py speed

# the cards of the bundled examples, as they would be pushed
cards: $(INSTALLED)
	$(BIN)/python scripts/make_cards.py
