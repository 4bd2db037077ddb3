# make demo            the whole walk with three hospitals on this machine
# make test            lint, types and tests
# make bench-gate DATA=DIR   what the copy gate catches and misses
# make bench-model DATA=DIR  how good the preset tiny's pictures are, three seeds (an hour on two cores)
# make bench-speed     steps and sampling against the published networks and MONAI's (pip install -e '.[bench]')
# make bench-large     time and peak memory of large volumes within a budget (ten minutes of one core)
# make bench-deid     planted identifiers, ten classes beside plain deid, slices a second (DATA=DIR: DICOM series)
# make bench-pixels DATA=DIR  burned-in text found and hidden, false alarms on clean series (docs/deid-pixels.md)
# make fuzz-deid      five thousand mutated real files through the de-identification (CASES=N, SEED=N)
# make bench-geometry  our volumes against dcm2niix's, series by series (docs/deid-geometry.md)
# make test-federation a federation of three hurt in each of 30 rounds, then the fault matrix (BUSY=6: beside six busy loops)
# make bench-federation   a round's overhead beside plain Flower's, and the coordinator's memory
# make test-peers      Debian's DICOM tools that some tests compare with (needs root)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
PLAN ?=
CASES ?= 5000
SEED ?= 1
BUSY ?= 0

.PHONY: demo test check lint types unit bench-deid bench-federation fuzz-deid bench-gate bench-geometry bench-large bench-model bench-pixels bench-speed test-federation test-peers clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip check
	touch $@

demo: $(VENV)/installed
	$(BIN)/medlsdm-node demo $(if $(DATA),--data '$(DATA)') $(if $(PLAN),--plan '$(PLAN)')

test: check unit

check: lint types

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright

unit: $(VENV)/installed
	$(BIN)/pytest -q -n 2 --dist loadfile --durations 8

bench-gate: $(VENV)/installed
	$(BIN)/python tests/benchmarks/copy_gate.py $(DATA)

bench-deid: $(VENV)/installed
	$(BIN)/python tests/benchmarks/score_deid.py $(if $(DATA),'$(DATA)') --json runs/bench-deid.json

fuzz-deid: $(VENV)/installed
	$(BIN)/python tests/benchmarks/fuzz_deid.py $(if $(DATA),'$(DATA)') --cases $(CASES) --seed $(SEED)

bench-geometry: $(VENV)/installed
	$(BIN)/python tests/benchmarks/geometry.py $(if $(DATA),'$(DATA)') --write docs/deid-geometry.md

bench-pixels: $(VENV)/installed
	$(BIN)/python tests/benchmarks/pixels.py '$(DATA)' $(if $(PIXEL_CASES),--cases $(PIXEL_CASES))

bench-speed: $(VENV)/installed
	$(BIN)/python tests/benchmarks/speed.py --json runs/bench-speed.json

bench-large: $(VENV)/installed
	$(BIN)/python tests/benchmarks/large.py

bench-model: $(VENV)/installed
	$(BIN)/python tests/benchmarks/model.py $(if $(DATA),'$(DATA)')

test-federation: $(VENV)/installed
	MEDLSDM_ROUNDS=30 MEDLSDM_BUSY=$(BUSY) $(BIN)/pytest -q -s tests/integration/test_endurance.py tests/integration/test_slow_line.py
	$(BIN)/python tests/benchmarks/federation_faults.py --busy $(BUSY) --json runs/federation-faults-$(BUSY).json

bench-federation: $(VENV)/installed
	$(BIN)/python tests/benchmarks/federation.py --busy $(BUSY) --json runs/bench-federation-$(BUSY).json
	for sites in 3 30; do $(BIN)/python tests/benchmarks/conductor_memory.py --sites $$sites --megabytes 800 || exit 1; done

test-peers:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends dcmtk dicom3tools orthanc orthanc-dicomweb tesseract-ocr

clean:
	rm -rf $(VENV) demo-out .pytest_cache .ruff_cache
