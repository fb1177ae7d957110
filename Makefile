# Two commands: `make up` and `make test`. Everything is built once, with the profile `ci`.
CARGO ?= cargo
PROFILE := ci
KVBM := target/$(PROFILE)/kvbm
VENV := .venv

.PHONY: up build wheel test check check-aarch64 test-rust test-python test-fake-engine test-trtllm drill-trtllm \
	test-vllm drill-vllm test-gpu drill drill-router drill-disk bench clean

up: build
	$(KVBM) up $(ARGS)

build:
	$(CARGO) build --locked --profile $(PROFILE) -p kvbm-cli

# The Python package for engines, for CPython 3.10 and later.
wheel: $(VENV)/installed
	$(VENV)/bin/maturin build --quiet --locked --profile $(PROFILE) -m connector/python/Cargo.toml --out target/wheels

test: check test-rust test-python test-fake-engine test-trtllm

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --profile $(PROFILE) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --profile $(PROFILE) --workspace --no-deps --quiet

# The same code for aarch64; wants `rustup target add aarch64-unknown-linux-gnu` and its C compiler.
check-aarch64:
	CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc \
	$(CARGO) check --locked --profile $(PROFILE) --target aarch64-unknown-linux-gnu

test-rust: build
	$(CARGO) test --locked --profile $(PROFILE) --workspace

# Real clients against a running kvbm, and the golden vectors from outside Rust.
test-python: build wheel $(VENV)/installed
	$(VENV)/bin/python tests/python/golden.py docs/golden.json
	$(VENV)/bin/python tests/python/clients.py $(KVBM)
	$(VENV)/bin/python tests/python/conformance.py $(KVBM)
	$(VENV)/bin/python tests/python/wheel.py target/wheels
	$(VENV)/bin/python tests/python/launch.py $(KVBM)

# Tests that need a GPU, as one stripped program that runs without this repository and without Rust: copy it to a machine
# with a GPU and start it there. Without CUDA it says of each test that it is skipped.
GPU_TESTS := target/gpu/kvbm-gpu-tests
NODE_TESTS := target/gpu/kvbm-node-tests

test-gpu: build
	$(CARGO) test --locked --profile $(PROFILE) -p kvbm-cuda --test gpu -- --copy-to $(CURDIR)/$(GPU_TESTS)
	strip $(GPU_TESTS)
	$(GPU_TESTS)
	cp "$$($(CARGO) test --locked --profile $(PROFILE) -p kvbm-tests --test it --no-run --message-format short 2>&1 \
	  | sed -n 's/.*(\(.*\)).*/\1/p' | tail -1)" $(NODE_TESTS)
	cp $(KVBM) target/gpu/kvbm
	strip $(NODE_TESTS) target/gpu/kvbm
	@echo "$(GPU_TESTS) can be copied to another machine with a GPU and run there, and tests/gpu.sh with the folder target/gpu"

# The stand-in for TensorRT-LLM's executor: its own proof, and one seed of each scenario with the reference connector.
FAKE_ENGINE := PYTHONPATH=tests $(VENV)/bin/python -m fake_engine

test-fake-engine: $(VENV)/installed
	$(VENV)/bin/ruff check tests/fake_engine tests/vllm_engine
	cd tests && ../$(VENV)/bin/mypy fake_engine
	$(FAKE_ENGINE) golden
	$(FAKE_ENGINE) prove --seeds 1 --workers 4
	$(FAKE_ENGINE) run --seeds 1 --workers 4 --overlap
	$(FAKE_ENGINE) run --seeds 1 --workers 4 --api L2 --tp 2
	$(FAKE_ENGINE) drill --every 50 --workers 4 --waits 3 --slack-ms 200

# The connector for TensorRT-LLM and its worker, over that stand-in and a daemon of ours: the package that is built, one
# seed in each kind of set-up, and workers behind the frontend.
PACKAGE := target/trtllm-package
HOST_GB := 0.25
CONNECTOR = --connector kvbm_connector.trtllm --scheduler-class KvbmConnectorScheduler --worker-class KvbmConnectorWorker
CONNECTOR += --daemon-command '$(KVBM) daemon --socket {socket} --state-dir {state} --cpu-cache-gb $(HOST_GB) --metrics-port 0'
CONNECTOR += --server-url 'unix:{socket}'
TRTLLM := PYTHONPATH=tests:$(PACKAGE) $(VENV)/bin/python

$(PACKAGE): build wheel
	rm -rf $(PACKAGE)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PACKAGE) \
		"$$(ls -t target/wheels/kvbm_connector-*.whl | head -1)"
.PHONY: $(PACKAGE)

test-trtllm: $(PACKAGE)
	$(TRTLLM) -m fake_engine golden $(CONNECTOR)
	$(TRTLLM) -m fake_engine run $(CONNECTOR) --seeds 1 --workers 4
	$(TRTLLM) -m fake_engine run $(CONNECTOR) --seeds 1 --workers 4 --api L2 --overlap --tp 2
	TLLM_KVBM_POOL=staged $(TRTLLM) -m fake_engine run $(CONNECTOR) --seeds 1 --workers 4 --overlap --tp 2
	TLLM_KVBM_LOAD=in-pass $(TRTLLM) -m fake_engine run $(CONNECTOR) --seeds 1 --workers 4
	$(TRTLLM) -m fake_engine drill $(CONNECTOR) --every 40 --workers 4 --waits 3 --slack-ms 200
	$(TRTLLM) tests/python/serve_trtllm.py $(KVBM)

# The same at full length: 20 seeds in every set-up, the daemon struck at every callback. Hours on a small machine. With
# room for all that the scenarios leave behind: when host memory is full, blocks of low priority are rightly not found.
drill-trtllm: HOST_GB := 1
drill-trtllm: $(PACKAGE)
	for pool in ipc staged; do for api in L1 L2; do for overlap in "" --overlap; do for ranks in 1 2; do \
		TLLM_KVBM_POOL=$$(if [ $$api = L2 ]; then echo auto; else echo $$pool; fi) \
		$(TRTLLM) -m fake_engine run $(CONNECTOR) --seeds 20 --api $$api --tp $$ranks $$overlap || exit 1; \
	done; done; done; done
	$(TRTLLM) -m fake_engine drill $(CONNECTOR)
	$(TRTLLM) -m fake_engine drill $(CONNECTOR) --tp 2 --overlap

# A real vLLM on the CPU: 6 GB of Python and some ten minutes, so it is not part of `make test`.
VLLM_VENV := .venv-vllm
VLLM_TEST = $(CURDIR)/$(VLLM_VENV)/bin/python tests/vllm_engine/$(1) --kvbm $(CURDIR)/$(KVBM) --model $(CURDIR)/models/tiny

test-vllm: build wheel $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/uv pip install -q --no-deps --reinstall --python $(VLLM_VENV)/bin/python $$(ls -t target/wheels/kvbm_connector-*.whl | head -1)
	$(call VLLM_TEST,check.py)
	$(call VLLM_TEST,features.py)

# The daemon killed, stopped and started again under that engine; wants a machine with little else to do.
drill-vllm: test-vllm
	$(call VLLM_TEST,drill.py)
	$(call VLLM_TEST,drill_bench.py)

$(VLLM_VENV)/installed: tests/vllm_engine/setup.sh tests/vllm_engine/requirements.txt
	tests/vllm_engine/setup.sh $(VLLM_VENV)
	touch $@

$(VENV)/installed: tests/python/requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
	touch $@

# The drills at full length: 100 seeds each, and 200 crashes of the disk tier, four at a time.
DRILL := $(CARGO) test --locked --profile $(PROFILE) -p kvbm-tests --test it -- --nocapture

drill: build drill-disk
	KVBM_DRILL_SEEDS=100 KVBM_DRILL_STREAMS=200 $(DRILL) drill --skip drill_disk_

# The whole conversation trace over real processes, by blocks and in turns. Wants a machine with nothing else to do.
drill-router: build
	KVBM_TRACE_REQUESTS=12031 $(DRILL) fleet::trace --include-ignored --test-threads 1

drill-disk: build
	KVBM_DRILL_SEEDS=200 $(DRILL) drill_disk_crash
	KVBM_DRILL_SEEDS=100 $(DRILL) drill_disk_ --skip drill_disk_crash

bench: build
	for what in hash match grpc router host-copy disk serve; do $(KVBM) bench $$what || exit 1; done

clean:
	$(CARGO) clean
	rm -rf $(VENV)
