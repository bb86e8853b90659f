# make demo    render receipts, train the shipped weights on them, evaluate, predict (2 minutes on two cores)
# make test    the checks and tests
# make test-long    what takes minutes: the tests marked long, and more than 20,000 cases of hostile input
# make lint    the checks alone: ruff and mypy
# make bench   the benchmarks that need no GPU (5 minutes on two cores)
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-long lint bench clean-demo

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed clean-demo
	$(RUN) -m dbnet.synth --out demo/data --train 80 --val 12 --test 6 --size 640 --seed 1 --lines
	$(RUN) train.py --preset demo --init weights/lite.pt --run demo
	$(RUN) evaluate.py runs/demo/best.pt --json demo/scores.json --report demo/report.html
	$(RUN) predict.py runs/demo/best.pt --out demo/submission.csv --overlays demo/overlays
	$(RUN) evaluate.py --submission demo/submission.csv --split test --data demo/data
	@echo
	@echo "Look at demo/report.html (each image and each mistake), demo/overlays/, demo/submission.csv and runs/demo/log.jsonl"

clean-demo:
	rm -rf demo runs/demo

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-long: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m hostile --hypothesis-profile long
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m long

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed-dev
	for name in data postprocess metric inference train_step; do $(RUN) benchmarks/$$name.py || exit 1; done
