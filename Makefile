# make demo    render receipts, train on them, evaluate, predict (8 minutes on two cores)
# make test    the checks and tests
# make test-long    what takes minutes: the tests marked long, and 12,000 cases of hostile input
# make lint    the checks alone: ruff and mypy
# make bench   the benchmarks that need no GPU (5 minutes on two cores)
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-long lint bench clean-demo

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed clean-demo
	$(RUN) -m dbnet.synth --out demo/data --train 300 --val 20 --test 8 --size 640 --seed 1
	$(RUN) train.py --preset demo --run demo
	$(RUN) evaluate.py runs/demo/best.pt --json demo/scores.json
	$(RUN) predict.py runs/demo/best.pt --out demo/submission.csv --overlays demo/overlays
	$(RUN) evaluate.py --submission demo/submission.csv --split test --data demo/data
	@echo
	@echo "Look at demo/overlays/ (detections), demo/submission.csv, demo/scores.json and runs/demo/log.jsonl"

clean-demo:
	rm -rf demo runs/demo

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-long: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "" --hypothesis-profile long tests/test_hostile.py
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m long

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed
	for name in data postprocess metric inference train_step; do $(RUN) benchmarks/$$name.py || exit 1; done
