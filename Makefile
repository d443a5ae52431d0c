# CI calls these and nothing else.
.PHONY: setup demo test check ui pages bench
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := true
export TOKENIZERS_PARALLELISM := true
PYTHON ?= python3
DEMO_PAGE := data/sample/pages/eveninglantern/marlport-mayor-biscuit-tin.html

setup: $(VENV)/ready  ## install everything into .venv

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,train]' --group dev
	touch $@

demo: setup  ## train on the newsroom corpus and show a page of a site that it did not train on
	dvc repro evaluate@newsroom
	copydesk predict --model models/newsroom/release $(DEMO_PAGE)
	@echo "Compare runs in a browser: make ui"

# Threads that wait would else take the cores from the other processes.
test: export OMP_WAIT_POLICY := passive
test: setup  ## run the tests, a process for each core
	pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: setup  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

ui: setup  ## open the MLflow UI on the runs made here and those kept in git
	python -m train.tracking import
	@echo "The runs: http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
	mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} --port 5000

pages: setup  ## fetch the annotated pages, 41 MB
	python -m train.fetch

bench: setup  ## time training and reading beside others; on a machine that does nothing else
	python -m pip install --quiet --constraint constraints.txt --group bench
	python -m bench.speed --output bench/speed.json
