# Two commands: `make up` and `make test`. Everything is built once, with the profile `ci`.
CARGO ?= cargo
PROFILE := ci
KVBM := target/$(PROFILE)/kvbm
VENV := .venv

.PHONY: up build test check test-rust test-python drill drill-disk bench clean

up: build
	$(KVBM) up $(ARGS)

build:
	$(CARGO) build --locked --profile $(PROFILE) -p kvbm-cli

test: check test-rust test-python

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --profile $(PROFILE) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --profile $(PROFILE) --workspace --no-deps --quiet

test-rust: build
	$(CARGO) test --locked --profile $(PROFILE) --workspace

# Real clients against a running kvbm, and the golden vectors from outside Rust.
test-python: build $(VENV)/installed
	$(VENV)/bin/python tests/python/golden.py docs/golden.json
	$(VENV)/bin/python tests/python/clients.py $(KVBM)

$(VENV)/installed: tests/python/requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
	touch $@

# The drills at full length: 100 seeds each, and 200 crashes of the disk tier, four at a time.
DRILL := $(CARGO) test --locked --profile $(PROFILE) -p kvbm-tests --test it -- --nocapture

drill: build drill-disk
	KVBM_DRILL_SEEDS=100 $(DRILL) drill --skip drill_disk_

drill-disk: build
	KVBM_DRILL_SEEDS=200 $(DRILL) drill_disk_crash
	KVBM_DRILL_SEEDS=100 $(DRILL) drill_disk_ --skip drill_disk_crash

bench: build
	for what in hash match grpc host-copy disk serve; do $(KVBM) bench $$what || exit 1; done

clean:
	$(CARGO) clean
	rm -rf $(VENV)
