# Each command does its own set-up in .venv with nothing but Python (3.11 or newer) and pip.
PYTHON ?= python3
VENV ?= .venv
# Installed together and first: a torch and a torchvision that were not made for each other do not import.
TORCH ?= torch==2.14.1 torchvision==0.29.1
# What `make hosts` tries: by default the oldest versions that pyproject.toml allows.
HOSTS ?= torch==2.9.0 torchvision==0.24.0 timm==1.0.31 transformers==5.9.0 peft==0.18.0
BIN = $(VENV)/bin

.PHONY: demo test slow hosts shapes browser leaderboard tables docs notebooks lint release clean

demo: $(VENV)/.demo  ## train and evaluate a small model on scikit-learn's digits, with figures
	@echo "Training on the digits that come with scikit-learn, 60 epochs: about 45 s on two free CPU cores."
	$(BIN)/sape2 train digits --out runs/demo

test: $(VENV)/.test  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q

slow: $(VENV)/.test  ## the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q -m slow

shapes: $(VENV)/.test  ## all tests but the slow ones, with the annotated shape of every argument checked: twice the time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q --jaxtyping-packages=sape2,beartype.beartype

hosts:  ## attach on the oldest versions of its hosts, or on others: make hosts HOSTS="transformers==5.17.0"
	rm -rf build/hosts
	$(PYTHON) -m venv build/hosts
	build/hosts/bin/python -m pip install -q --upgrade pip
	build/hosts/bin/python -m pip install -q -e '.[train,data,viz]' --group test $(HOSTS)
	OMP_NUM_THREADS=1 build/hosts/bin/python -m pytest -n auto --dist worksteal -q tests/adapters tests/docs/test_docs.py -k "adapters or docs/hosts"

browser: $(VENV)/.browser  ## pages of explore and explain, and the site if built, in a Chromium of the system
	$(BIN)/python -m pytest -q -m browser tests/inspect tests/docs

leaderboard: $(VENV)/.demo  ## the table of docs/leaderboard.md, from the rows in benchmarks/results/leaderboard
	$(BIN)/python benchmarks/leaderboard.py

tables: $(VENV)/.demo  ## the tables of the docs and the figures of the sprint, from the rows in benchmarks/results
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/tables.py write
	$(BIN)/python benchmarks/sprint.py figure

docs: $(VENV)/.docs  ## the site, in build/site: no network, a warning is an error, every link and every source of a page checked
	rm -rf build/site
	$(BIN)/python -m sphinx -q -W --keep-going -a -b html -d build/doctrees docs build/site
	$(BIN)/python docs/site_checks.py build/site

notebooks: $(VENV)/.docs  ## executes docs/notebooks/*.py into notebooks with outputs
	$(BIN)/python docs/notebooks/build.py

lint: $(VENV)/.lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

release: $(VENV)/.demo  ## the wheel, checked in a fresh environment outside the checkout (docs/releasing.md)
	rm -rf build/dist build/fresh build/lib
	$(BIN)/python -m pip install -q build twine
	$(BIN)/python -m build -o build/dist .
	$(BIN)/python -m twine check --strict build/dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install -q $(TORCH)
	build/fresh/bin/python -m pip install -q build/dist/*.whl
	cd build/fresh && bin/python -I $(CURDIR)/tests/cases/installed_wheel.py base
	build/fresh/bin/python -m pip install -q "$$(echo build/dist/*.whl)[train,data,viz,explore]"
	cd build/fresh && bin/python -I $(CURDIR)/tests/cases/installed_wheel.py extras

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("sape2 needs Python 3.11 or newer; %s is %s. Try make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 11) else 0)'
	@echo "Making an environment in $(VENV), once. pip fetches $(TORCH) and what they need."
	@echo "With PyTorch for CUDA, the default, these are 6 GB; for a machine without a GPU docs/tutorial.md has a TORCH=... of much less."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "pip fetches what training, data and pictures need: accelerate, datasets, tensorboard, scikit-learn, matplotlib."
	$(BIN)/python -m pip install -e '.[train,data,viz]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q --group test
	@touch $@

$(VENV)/.browser: $(VENV)/.test
	$(BIN)/python -m pip install -q --group browser
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install -q --group docs
	@touch $@

$(VENV)/.lint: $(VENV)/.demo
	$(BIN)/python -m pip install -q --group lint
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info
