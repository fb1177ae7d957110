# Two commands: `make up` and `make test`. Everything is built once, with the profile `ci`.
CARGO ?= cargo
PROFILE := ci
KVBM := target/$(PROFILE)/kvbm
VENV := .venv

.PHONY: up build wheel test check test-rust test-python test-fake-engine test-gpu drill drill-disk bench clean

up: build
	$(KVBM) up $(ARGS)

build:
	$(CARGO) build --locked --profile $(PROFILE) -p kvbm-cli

# The Python package for engines, for CPython 3.10 and later.
wheel: $(VENV)/installed
	$(VENV)/bin/maturin build --quiet --locked --profile $(PROFILE) -m connector/python/Cargo.toml --out target/wheels

test: check test-rust test-python test-fake-engine

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --profile $(PROFILE) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --profile $(PROFILE) --workspace --no-deps --quiet

test-rust: build
	$(CARGO) test --locked --profile $(PROFILE) --workspace

# Real clients against a running kvbm, and the golden vectors from outside Rust.
test-python: build wheel $(VENV)/installed
	$(VENV)/bin/python tests/python/golden.py docs/golden.json
	$(VENV)/bin/python tests/python/clients.py $(KVBM)
	$(VENV)/bin/python tests/python/wheel.py target/wheels
	$(VENV)/bin/python tests/python/launch.py $(KVBM)

# Tests that need a GPU, as one stripped program that runs without this repository and without Rust: copy it to a machine
# with a GPU and start it there. Without CUDA it says of each test that it is skipped.
GPU_TESTS := target/gpu/kvbm-gpu-tests

test-gpu:
	$(CARGO) test --locked --profile $(PROFILE) -p kvbm-cuda --test gpu -- --copy-to $(CURDIR)/$(GPU_TESTS)
	strip $(GPU_TESTS)
	$(GPU_TESTS)
	@echo "$(GPU_TESTS) can be copied to another machine with a GPU and run there"

# The stand-in for TensorRT-LLM's executor: its own proof, and one seed of each scenario with the reference connector.
FAKE_ENGINE := PYTHONPATH=tests $(VENV)/bin/python -m fake_engine

test-fake-engine: $(VENV)/installed
	$(VENV)/bin/ruff check tests/fake_engine
	cd tests && ../$(VENV)/bin/mypy fake_engine
	$(FAKE_ENGINE) golden
	$(FAKE_ENGINE) prove --seeds 1 --workers 4
	$(FAKE_ENGINE) run --seeds 1 --workers 4 --overlap
	$(FAKE_ENGINE) run --seeds 1 --workers 4 --api L2 --tp 2
	$(FAKE_ENGINE) drill --every 50 --workers 4 --waits 3 --slack-ms 200

$(VENV)/installed: tests/python/requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
	touch $@

# The drills at full length: 100 seeds each, and 200 crashes of the disk tier, four at a time.
DRILL := $(CARGO) test --locked --profile $(PROFILE) -p kvbm-tests --test it -- --nocapture

drill: build drill-disk
	KVBM_DRILL_SEEDS=100 KVBM_DRILL_STREAMS=200 $(DRILL) drill --skip drill_disk_

drill-disk: build
	KVBM_DRILL_SEEDS=200 $(DRILL) drill_disk_crash
	KVBM_DRILL_SEEDS=100 $(DRILL) drill_disk_ --skip drill_disk_crash

bench: build
	for what in hash match grpc router host-copy disk serve; do $(KVBM) bench $$what || exit 1; done

clean:
	$(CARGO) clean
	rm -rf $(VENV)
