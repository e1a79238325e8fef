# The one cargo profile is release: RocksDB's C++ takes minutes per profile, and our own crates keep their assertions in it.
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help demo test soak build lint figures clean prerequisites prerequisites-test

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## build, then watch a key survive the death of the leader; ends by itself
	@deploy/demo.sh

test: prerequisites-test lint ## everything CI checks: formatting, clippy, build, all tests
	$(CARGO) build --release --workspace
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --release --workspace && $(CARGO) test --release --workspace --doc; \
	else \
		set -x; $(CARGO) test --release --workspace; \
	fi

soak: build ## the tests that take minutes
	$(CARGO) nextest run --release --workspace --run-ignored ignored-only -E 'test(power_fails)'

build: prerequisites ## the three binaries, in target/release
	$(CARGO) build --release --workspace

lint: prerequisites ## rustfmt and clippy, no warnings allowed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

figures: build ## connects per second and failover time of three controllers, measured here
	target/release/figures

clean: ## remove target/
	$(CARGO) clean

prerequisites:
	@deploy/prerequisites.sh

prerequisites-test:
	@deploy/prerequisites.sh test
