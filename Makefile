# Two commands for a newcomer: `make demo` runs the main job, `make test` passes the tests. Each sets itself up.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Relative, for the checkout's path may hold a space, at which make divides names.
VENV := .venv
BIN := $(VENV)/bin
UV := $(or $(shell command -v uv),.uv/bin/uv)
# Where uv is not installed; what is may have a space in its path too, and is nothing to be made.
INSTALLER := $(filter .uv/bin/uv,$(UV))
EXPERIMENT ?= demo
# One thread a process, as the configuration says; test workers and jobs run side by side.
export OMP_NUM_THREADS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
# make env PYTHON=/path/to/python3.12: another interpreter than the first fitting one.
export PYTHON TORCH

.PHONY: help axe screenshots env demo docs docs-run gpu rehearse meter-demo study schemas dvc-yaml dvc-commit dvc-import test lint types unit test-browser test-root \
  test-slurm image reward-env reward-locks sif test-image test-fresh lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.complete  ## .venv from the hash-locked requirements (about 7 GB with PyTorch's CUDA build)

# Looks first at all that is needed, and says in one message what is missing. Bytecode, or every start of a command compiles
# what it imports anew where PYTHONDONTWRITEBYTECODE is set, as in many containers (CHANGELOG.md has what that took).
$(VENV)/.complete: requirements.lock pyproject.toml
	@if [ -x "$(UV)" ]; then UV="$(UV)" workflow/preflight.sh; else $(MAKE) --no-print-directory "$(UV)"; fi
	[ -x $(BIN)/python ] || "$(UV)" venv --clear --python "$$(workflow/preflight.sh --python)" $(VENV)
	"$(UV)" pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	"$(UV)" pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

.uv/bin/uv:
	@UV="$(UV)" workflow/preflight.sh
	"$$(workflow/preflight.sh --python)" -m venv .uv
	.uv/bin/python -m pip install --disable-pip-version-check --require-hashes --requirement containers/installer.lock

# What a stopped workflow says how to go on with: outside of make, nobody has its PATH.
demo study dvc-import: export VIPO_AGAIN = $(strip make $@ $(MAKEOVERRIDES))

# make demo SET_ASIDE=true: finished results that would be replaced are set aside; without it, nothing starts.
CONSENT = $(if $(SET_ASIDE),set_aside=$(SET_ASIDE))

demo: env  ## the whole experiment on CPU: base, GRPO, product, ViPO, control, evaluation, report
	snakemake --profile local --config experiment=$(EXPERIMENT) $(CONSENT)
	@echo "report: file://$(abspath results/$(EXPERIMENT)/report/index.html)"
	@if [ -n "$${DISPLAY:-}" ]; then python -m webbrowser "file://$(abspath results/$(EXPERIMENT)/report/index.html)" || true; fi

STUDY := credit credit_clip credit_global credit_scene

study: env  ## the study behind docs/method.md: does the map direct credit? (a few hours on two cores; resumable)
	for experiment in $(STUDY); do snakemake --profile local --config experiment=$$experiment $(CONSENT); done
	vipo study $(STUDY) -o docs/study

meter-demo: env  ## the registered measurement of when a map helps: 20 cells (about 2 h 40 min of one core; resumable)
	python workflow/meter_demo.py results/meter_demo docs/registered

gpu:  ## prove and measure everything on one NVIDIA GPU, in at most 8 minutes: benchmarks/gpu/README.md
	benchmarks/gpu/run.sh

rehearse: env  ## all that `make gpu` does, in miniature and without a GPU: benchmarks/gpu/README.md (needs g++)
	benchmarks/gpu/rehearsal/rehearse.sh benchmarks/gpu/run.sh results/rehearsal --tiny --device cuda --budget 4650
	REHEARSAL_GPUS=2 benchmarks/gpu/rehearsal/rehearse.sh \
	  benchmarks/gpu/run.sh results/rehearsal/two_devices --tiny --device cuda --budget 4650 --only processes

docs: env  ## the documentation site, results/site/index.html; broken links stop it
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "documentation: file://$(abspath results/site/index.html) (its search needs a server: python -m http.server --directory results/site)"

docs-run: env  ## follow the tutorial as it stands, in a folder of its own under results/ (5 to 8 minutes)
	python workflow/tutorial.py results/tutorial

schemas: env  ## configs/schema again, after a change of a configuration section
	vipo config --schemas configs/schema

dvc-yaml: env  ## dvc.yaml again, after a change of the rules or of what configs/experiment/demo.yaml is composed of
	python workflow/dvc_yaml.py

dvc-commit: env  ## after Snakemake: results into DVC's cache and dvc.lock, so that `dvc repro` has nothing to do
	dvc commit --force

dvc-import: env  ## after `dvc pull` or `dvc repro`: Snakemake sees the results as done; page and crate are made here
	@dvc status --quiet || { dvc status; echo "error: results/ is not what dvc.lock says; run 'dvc pull' or 'dvc repro' first" >&2; exit 1; }
	snakemake --profile local --touch --forceall summarize compare $(wildcard results/$(EXPERIMENT)/credit/*/credit.json)
	snakemake --profile local

test: lint  ## lint, types and the suite that needs no privileges
	@$(MAKE) --no-print-directory --jobs 2 types unit

lint: env
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint --quiet

types: env
	mypy

unit: env
	pytest -n 3 --dist loadscope -m 'not browser and not root and not slurm' --durations 15

test-browser: env  ## the report in a real browser (needs Debian's chromium and chromium-driver; with axe-core if `make axe` got it)
	pytest -m browser tests/system

screenshots: env  ## docs/images/report*.png from results/demo (needs Debian's chromium and chromium-driver)
	python benchmarks/screenshots.py results/demo/report/index.html -o docs/images

axe:  ## axe-core for test-browser, from npm
	npm install --prefix .axe --no-save --no-audit --no-fund axe-core@4.11.0

test-root: env  ## full disk and read-only folders on small tmpfs mounts (needs root)
	pytest -m root tests/system

test-slurm: env  ## the workflow on a private Slurm cluster (needs root and Debian's slurm-wlm and munge)
	pytest -m slurm tests/system

image:  ## the container image `vipo` from the newest commit (docker, podman or buildah; 7.6 GB)
	containers/build.sh vipo

sif:  ## the same image for Apptainer, containers/vipo.sif, which `snakemake --sdm apptainer` runs every stage in
	containers/build.sh vipo containers/vipo.tar
	apptainer build --force containers/vipo.sif containers/vipo.def
	rm containers/vipo.tar

test-image: env  ## build twice on a Debian base made here, run an experiment and the tests inside (root, buildah, debootstrap)
	containers/test.sh

test-fresh:  ## make env and a tiny experiment on a Debian that holds the README's packages alone (root, debootstrap, network)
	containers/test-fresh.sh

# Two of these packages import what they do not ask for, and one's wheel is not whole: seen at once, not by the first run.
IMPORTED_hpsv2 := hpsv2.img_score
IMPORTED_imagereward := ImageReward
IMPORTED_hpsv3 := hpsv3
IMPORTED_vbench := vbench.human_action, vbench.aesthetic_quality, vbench.imaging_quality, vbench.scene

reward-env: | $(INSTALLER)  ## envs/NAME, another package's own reward: make reward-env NAME=hpsv2
	[ -f containers/rewards/$(NAME).lock ] || { echo "error: NAME=$(NAME): one of $$(cd containers/rewards; echo *.lock)" >&2; exit 1; }
	"$(UV)" venv --clear --python 3.10 envs/$(NAME)
	"$(UV)" pip sync --python envs/$(NAME)/bin/python --require-hashes containers/rewards/$(NAME).lock
	envs/$(NAME)/bin/python -c "import $(IMPORTED_$(NAME))"

reward-locks: | $(INSTALLER)  ## resolve the locks of those again
	for name in hpsv2 imagereward hpsv3 vbench; do \
	  "$(UV)" pip compile containers/rewards/$$name.in --generate-hashes --python-version 3.10 \
	    --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --quiet --output-file containers/rewards/$$name.lock; \
	done

# Not adamw_8bit: where bitsandbytes is installed, peft imports it at each start (.8 s), whoever needs it or not.
LOCKED := workflow cloud wandb mlflow dev

lock: | $(INSTALLER)  ## resolve requirements.lock again
	"$(UV)" pip compile pyproject.toml $(LOCKED:%=--extra %) --generate-hashes --universal --python-version 3.11 \
	  --no-annotate --no-header --quiet --output-file requirements.lock
	echo uv | "$(UV)" pip compile - --generate-hashes --universal --python-version 3.11 \
	  --no-annotate --no-header --quiet --output-file containers/installer.lock

clean:  ## results and caches, not the environment
	rm -rf results .rehearsal .snakemake .pytest_cache .mypy_cache .ruff_cache
