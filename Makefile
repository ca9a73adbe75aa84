# costandby's commands. Each installs what it lacks, then runs; see `make help`.

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-fresh test-rdma vm bench bench-rdma fuzz sim soak planted-bugs fmt clean

# Where rustup puts cargo, for shells that have not read its profile.
export PATH := $(PATH):$(HOME)/.cargo/bin
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
FUZZ_SECONDS ?= 60

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: ## two nodes on loopback, one killed in mid-write, every write accounted for (ARGS="--seconds 5 --json")
	@tests/tools/need.sh build
	@cargo build --quiet --locked --release --package costandby-control --bin costandby
	@$(TARGET_DIR)/release/costandby demo $(ARGS)

test: ## everything a change must pass: format, lints, licences, fuzzing, docs, all tests (INSTALL_ONLY=1: only install what that takes)
	@tests/tools/need.sh test $(if $(filter 1,$(COSTANDBY_SKIP_VM)),,vm) $(if $(filter 1,$(COSTANDBY_SKIP_FRESH)),,fresh)
	@$(if $(filter 1,$(INSTALL_ONLY)),:,tests/tools/test.sh)

test-fresh: ## the README's two commands on bare Debian 12 and 13 roots, with nothing but Rust, gcc and make (SUITES=trixie)
	@tests/tools/need.sh fresh
	@tests/tools/test-fresh.sh $(SUITES)

test-long: ## what takes too long for each change: new seeds, longer fuzzing, more power cuts; two hours
	@tests/tools/need.sh test vm
	@tests/tools/test-long.sh

test-rdma: ## RDMA in virtual machines: tests, clients, demo, a plug pulled (ARGS="--only two-guests")
	@tests/tools/need.sh vm
	@tests/tools/test-rdma.sh $(ARGS)

vm: ## a shell in a virtual machine with an RDMA device
	@tests/tools/need.sh vm
	@cargo build --quiet --locked --workspace --bins
	@$(TARGET_DIR)/debug/costandby-vm shell $(ARGS)

bench: ## measure this machine's link, disk and mirror, and the same on qemu (ARGS="--seconds 10")
	@tests/tools/need.sh test
	@cargo build --quiet --locked --release --workspace --bins
	@$(TARGET_DIR)/release/costandby-bench run $(ARGS)

bench-rdma: ## measure the RDMA link in a virtual machine, beside bare verbs, perftest and TCP (ARGS="--seconds 10")
	@tests/tools/need.sh vm
	@cargo build --quiet --locked --release --package costandby-bench --package costandby-tests --bins
	@$(TARGET_DIR)/release/costandby-vm run --memory 4096 --limit 900 -- \
		$(TARGET_DIR)/release/costandby-bench rdma --device rxe0 --address 10.9.0.1 --disk-mib 64 $(ARGS)

fuzz: ## fuzz each decoder for FUZZ_SECONDS (60), or only TARGET=wire_frame
	@tests/tools/need.sh test
	@tests/fuzz/run.sh $(FUZZ_SECONDS) $(TARGET)

sim: ## replay one run of the simulator and tell its story: SEED=7 (ARGS="--lines 1000")
	@tests/tools/need.sh build
	@cargo run --quiet --locked --package costandby-tests --bin sim -- $(SEED) $(ARGS)

soak: ## run the simulator, one seed after the other, until stopped or until a rule is broken (ARGS="--from 1000")
	@tests/tools/need.sh build
	@cargo run --quiet --locked --package costandby-tests --bin sim -- --soak $(ARGS)

planted-bugs: ## put each deliberate bug into a copy of the sources and see the simulator catch it (ONLY=name)
	@tests/tools/need.sh build
	@tests/tools/planted-bugs.sh "$(ONLY)"

fmt: ## format the code
	@tests/tools/need.sh rust
	@cargo fmt --all
	@cargo fmt --all --manifest-path tests/fuzz/Cargo.toml
	@cargo fmt --all --manifest-path tests/rdma-oracle/Cargo.toml

clean: ## remove what was built
	@tests/tools/need.sh rust
	@cargo clean --quiet
	@rm -rf tests/fuzz/corpus tests/fuzz/artifacts
