# `make quickstart` shows everything on a real three-node cluster; `make test` runs all tests.
# Both install what they need on a fresh Debian 12 with Rust, Go, Python and Node, as root.

SHELL := /bin/bash
CLUSTER := e2e/cluster/cluster
TARGET := x86_64-unknown-linux-gnu
# Cargo's target folder; follows CARGO_TARGET_DIR like cargo itself does.
OUT := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help quickstart test build programs images cluster-up cluster-down \
        fmt lint tidy unit go-test store-test api-test e2e bench bench-app codegen

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | column -t -s'|'

quickstart: ## everything once, on a real cluster: install, back up, lose, restore
	@e2e/bin/quickstart

test: ## all tests; what .ci/run calls
	@e2e/bin/test-all

build: ## the three programs, static, in target/release
	@e2e/bin/build-programs

programs: ## Kubernetes and the other parts that tests run against
	@$(CLUSTER) build

images: build ## container images as files, without a registry
	@$(CLUSTER) images

cluster-up: ## a three-node Kubernetes with a CSI driver
	@$(CLUSTER) build
	@$(CLUSTER) up

cluster-down: ## remove it without a trace
	@$(CLUSTER) down

fmt: ## formatting, checked
	cargo fmt --all -- --check

lint: ## lints, as errors
	cargo clippy --workspace --all-targets --all-features -- -D warnings

tidy: ## generated files are current, crate edges and documents hold
	cargo xtask tidy

bench-app: images ## back up and restore a whole application, beside Velero's figures; SCALE=0.01 for a quick run
	@e2e/bench/app

bench: build programs ## the repository engine beside other programs on the same data; SIZE=small for a quick run
	@LIFEBOAT=$(OUT)/release/lifeboat e2e/bin/with-programs e2e/bench/engine.py

codegen: ## write what is generated
	cargo xtask codegen

unit: ## unit and property tests
	cargo test --workspace

store-test: programs ## the store conformance suite on two real S3 servers
	e2e/bin/with-programs cargo test -p lifeboat-repository --features s3-servers --test s3_servers

go-test: ## the test CSI driver: unit tests, csi-sanity, cuts
	e2e/csi-driver/test.sh all

api-test: programs ## against a real kube-apiserver
	e2e/bin/with-programs cargo test -p lifeboat-e2e --features api

e2e: ## scenarios on the three-node cluster
	@e2e/bin/run-scenarios
