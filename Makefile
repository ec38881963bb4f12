# Needs Python 3.11 or newer. `make quickstart` and `make test` start from nothing: they create .venv and install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLD_VENV ?= .venv-old-libraries

.PHONY: quickstart quickstart-low-level quickstart-control evaluate-low-level tiny-base flan demo test test-fast test-long test-old-libraries soak long-run many-rows lint bench clean

# The stamps hold the installed state: a changed requirements file installs again.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-demo.txt requirements-ray.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed requirements-demo.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-demo.txt
	@touch $@

$(OLD_VENV)/.installed: requirements-old-libraries.txt
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --quiet --requirement requirements-old-libraries.txt
	@touch $@

quickstart: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

quickstart-low-level: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" TASK=low_level bash recipes/quickstart.sh

# As many updates on (photo, photo) pairs: how much of the quickstart's gain is nothing but better copying.
quickstart-control: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" OUTPUT_DIR=outputs/quickstart-control bash recipes/quickstart.sh \
		--edited_image_column=original_image

# The table of what quickstart-low-level trained, its rows and protocol.
evaluate-low-level: outputs/quickstart-low-level/pipeline/model_index.json $(VENV)/.installed
	$(BIN)/python evaluation/evaluate.py --model outputs/quickstart-low-level/pipeline \
		--dataset outputs/quickstart-low-level/dataset --batch_size 12 --recommended_settings \
		--output_dir outputs/quickstart-low-level/evaluation

outputs/quickstart-low-level/pipeline/model_index.json:
	@echo "$@ is missing: run make quickstart-low-level first" >&2; exit 2

# A page to edit photos on, at http://127.0.0.1:7860. DEMO="--model_id OWNER/MODEL" shows another model than the tiny one.
demo: $(VENV)/.installed-demo
	$(BIN)/python inference/app.py $(or $(DEMO),--model_id assets/tiny-instruct-pix2pix --resolution 128 \
		--guidance_scale 1 --image_guidance_scale 1 --examples "make it sepia" "make it black and white" "light up the dark photo")

# Trains models like those in assets/, into outputs/tiny_models: an hour on one CPU core.
tiny-base: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/tiny_base.sh

# Does instruction tuning generalise? Hours; FLAN="--held_out tint --seeds 0" makes some of the runs, later calls others.
flan: $(VENV)/.installed
	OMP_NUM_THREADS=$(or $(THREADS),1) $(BIN)/python tools/flan.py --output_dir outputs/flan $(FLAN)

# Two workers on two cores; each loads its own libraries, a gigabyte, so no more than eight.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 -m "not slow and not long"

# Compilers, recipes and launchers as they are, a minute each.
test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 -m long

# That our pipelines edit alike with the libraries that most people have, in an environment of their own.
test-old-libraries: $(VENV)/.installed-dev $(OLD_VENV)/.installed
	OLD_LIBRARIES_PYTHON="$(OLD_VENV)/bin/python" $(BIN)/python -m pytest tests/test_old_libraries.py

# 50 kills at random moments, some ten minutes on two cores; KILLS and SEED override. docs/soak.md has the last table.
soak: $(VENV)/.installed
	rm -rf outputs/soak
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills "$(or $(KILLS),50)" $(if $(SEED),--seed "$(SEED)") --work_dir outputs/soak

# 2,000 updates, some five minutes: does a training grow?
long-run: $(VENV)/.installed
	rm -rf outputs/long-run
	OMP_NUM_THREADS=1 $(BIN)/python tests/long_run.py --work_dir outputs/long-run

# An update on 1,000 and on 100,000 rows, from disk and from a stream, some five minutes: does it take longer?
many-rows: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.many_rows

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.equivalence
	$(BIN)/python -m benchmarks.train_step --size small
	$(BIN)/python -m benchmarks.inference --size small
	@if [ -n "$(REFERENCE)" ]; then $(BIN)/python -m benchmarks.compare_with_reference --reference "$(REFERENCE)"; \
	else echo "make bench REFERENCE=path/to/train_instruct_pix2pix.py also compares with diffusers' example"; fi

clean:
	rm -rf outputs/benchmarks outputs/soak outputs/long-run .pytest_cache .ruff_cache
