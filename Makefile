# SPDX-License-Identifier: MIT
# `make help` lists the targets. PYTHON: the interpreter .venv is made with (3.11 or newer).
# SYSTEM_PYTHON and PREFIX: what `make install` uses.
SYSTEM_PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local

export PYTHON
# Debian keeps bpftool where an unprivileged user's PATH does not look.
export PATH := $(PATH):/usr/sbin:/sbin
BIN := .venv/bin
RUN := tools/as user $(BIN)/python -m
CAPTURE := tests/data/golden/lab-6.1-intel.kvmprobe

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test check lint types unit model fleet live browser docs packaging deb lab \
	soak shots coverage bench bench-full lock install uninstall clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: ## Install missing Debian packages (asks sudo), make .venv with everything in it
	@tools/setup

demo: setup ## Record this host's KVM with a tiny guest as the load, then analyze; then a real capture with the fault
	@tools/demo $(CAPTURE)

test: setup unit model fleet live browser docs packaging ## Run all tests (live ones as root: asks sudo)

check: lint types unit ## Lint, types and unit tests: what to run before a commit, within 3 minutes

lint: setup ## Run ruff: rules and format
	@tools/stage lint $(RUN) ruff check .
	@tools/stage format $(RUN) ruff format --check .

types: setup ## Run mypy --strict on the program and on its tests
	@tools/stage types $(RUN) mypy -p kvmprobe
	@tools/stage 'types of tests' $(RUN) mypy tests

unit: setup ## Run the tests that need neither root nor KVM
	@tools/stage unit $(RUN) pytest -rfEs tests/unit

model: setup ## Hold the detector against a reference model of KVM's MMIO cache
	@tools/stage model $(RUN) pytest -rfEs tests/model tests/lab/test_lab_parts.py

fleet: setup ## Analyze made-up fleets on real workers and schedulers; one is killed
	@tools/stage fleet $(RUN) pytest -rfEs tests/fleet

live: setup ## Run the tests that record this machine's KVM (as root: asks sudo)
	@tools/stage live tools/live

browser: setup ## Try the report in a real Chromium, and run the notebook
	@tools/packages browser
	@tools/stage browser $(RUN) pytest -rfEs tests/browser

docs: setup ## Build the manual (build/html, build/man) and test it
	@tools/stage 'manual, html' $(RUN) sphinx -q -W -b html docs build/html
	@tools/stage 'manual, man' $(RUN) sphinx -q -W -b man docs build/man
	@tools/stage docs $(RUN) pytest -rfEs tests/docs

packaging: setup ## Build sdist and wheel and try the wheel outside the checkout
	@tools/stage packaging $(RUN) pytest -rfEs tests/packaging

deb: setup ## Build the Debian package for SUITE (bookworm or trixie) into dist
	@tools/as user packaging/deb/build $(or $(SUITE),bookworm) dist

lab: setup ## Find the fault on real kernels in emulators; KERNEL= VENDOR= SCENARIO= BACKEND= JOBS=
	@tools/stage 'lab, parts' $(RUN) pytest -rfEs tests/lab/test_lab_parts.py
	@tools/stage lab tools/lab $(foreach kernel,$(KERNEL),--kernel $(kernel)) \
		$(foreach vendor,$(VENDOR),--vendor $(vendor)) \
		$(foreach scenario,$(SCENARIO),--scenario $(scenario)) \
		$(foreach backend,$(BACKEND),--backend $(backend)) $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(RESULTS),--results $(RESULTS))

soak: setup ## Watch VMs that come and go for MINUTES (10): memory, descriptors, probes (as root: asks sudo)
	@tools/stage soak tools/as root $(BIN)/python -m tests.soak $(or $(MINUTES),10)

shots: setup ## Make the screenshots of the report in docs/shots
	@tools/packages browser
	@$(RUN) tests.browser

coverage: setup ## Run the unit tests and show which lines they leave out
	@$(RUN) pytest --cov tests/unit

bench: setup ## Measure this machine and the peers, PART= or all, within 20 minutes (as root: asks sudo)
	@tools/as root $(BIN)/python -m tests.bench $(PART)

bench-full: setup ## Measure 10^9 events: 40 GB of disk, 20 minutes and more (as root: asks sudo)
	@tools/as root $(BIN)/python -m tests.bench full

lock: setup ## Write the locks anew; ARGS=--upgrade takes the newest versions
	@tools/as user tools/lock $(ARGS)

install: setup ## Install for everybody: PREFIX/lib/kvmprobe, PREFIX/bin/kvmprobe (asks sudo)
	@tools/as root true
	@rm -rf dist
	@$(RUN) build --quiet --no-isolation --outdir dist .
	@tools/as root tools/install $(PREFIX) $(SYSTEM_PYTHON) dist/kvmprobe-*.whl
	@echo "installed; next: sudo kvmprobe record -d 30"

uninstall: ## Remove what `make install` installed (asks sudo)
	@tools/as root rm -rf $(PREFIX)/lib/kvmprobe $(PREFIX)/bin/kvmprobe

clean: ## Remove what make and the tools put into the checkout
	@rm -rf .venv build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis demo.kvmprobe
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
