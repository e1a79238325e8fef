# The one cargo profile is release: RocksDB's C++ takes minutes per profile, and our own crates keep their assertions in it.
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help demo test build lint figures figures-drone rolling model bench bench-million soak soak-elections clean
.PHONY: prerequisites prerequisites-test prerequisites-bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## build, then watch a key survive the death of the leader; ends by itself
	@deploy/demo.sh

# With all targets, so that what the tests start is built with the same features as the tests, and once.
test: prerequisites-test lint ## everything CI checks: formatting, clippy, build, all tests
	$(CARGO) build --release --workspace --all-targets
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --release --workspace && $(CARGO) test --release --workspace --doc; \
	else \
		set -x; $(CARGO) test --release --workspace; \
	fi

build: prerequisites ## the three binaries, in target/release
	$(CARGO) build --release --workspace

lint: prerequisites ## rustfmt and clippy, no warnings allowed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

soak: build ## the long tests: a million keys, minutes of writes, thousands of power losses
	$(CARGO) nextest run --release --workspace --profile soak --run-ignored only --no-capture

figures: build ## connects per second and failover time of three controllers, measured here
	target/release/figures

bench: build prerequisites-bench ## beside etcd and PostgreSQL, into target/bench.json; QUICK=1: 64 clients only
	target/release/bench compare $(if $(QUICK),--quick) $(BENCH_FLAGS)

bench-million: build ## a million held keys on 1,000 drones for ten minutes, into docs/; half an hour
	target/release/bench million $(BENCH_FLAGS)

soak-elections: build ## full load for an hour: elections and pauses that nobody asked for
	target/release/bench elections $(BENCH_FLAGS)

figures-drone: build ## connect to ready and its parts, memory of guards, CPU of a drone with 1,000 backends, measured here
	target/release/drone-figures

rolling: build ## how long clients pause while each controller is restarted under load, measured here
	target/release/rolling

model: ## explore the model of the membership protocol within large bounds; ten minutes on two idle cores, 4 GiB
	$(CARGO) run --release -p holdfast-model -- $(MODEL_FLAGS)

clean: ## remove target/
	$(CARGO) clean

prerequisites:
	@deploy/prerequisites.sh

prerequisites-bench:
	@deploy/prerequisites.sh bench

prerequisites-test:
	@deploy/prerequisites.sh test
