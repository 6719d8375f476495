# Everything that there is to do here. `make help` lists it.

PACKAGES := etcd-server etcd-client iproute2 iptables nftables iputils-ping iperf3 curl procps gcc libc6-dev openssl util-linux

COMMANDS := etcd etcdctl ip bridge iptables-nft iptables-legacy nft ping iperf3 curl setsid sysctl gcc openssl setpriv unshare

HOST     := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
LIMIT    := 4300000

.PHONY: help demo test test-kubernetes bench lint fmt doc release clean deps root

help: ## list the goals
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: root deps ## three hosts join an overlay, drawn in the terminal
	cargo build --release --locked
	cargo build --example demo --locked
	FLANNELD_UNDER_TEST=target/release/flanneld target/debug/examples/demo

test: root deps ## all tests; installs what it needs; runs as root
	cargo test --locked
	cargo test --locked --doc
	@if tests/tools/kube-apiserver.sh find >/dev/null; then $(MAKE) test-kubernetes; else \
	    echo "SKIPPED: the Kubernetes scenarios, for want of a kube-apiserver; 'make test-kubernetes' builds one and runs them"; fi

test-kubernetes: root deps ## the Kubernetes scenarios; builds a kube-apiserver once, which takes minutes
	tests/tools/kube-apiserver.sh build
	tests/tools/helm.sh build
	cargo test --locked --test kubernetes

bench: root deps ## starts, costs at scale, throughput of the tunnel
	tests/tools/kube-apiserver.sh build || echo "SKIPPED: the bench 'kubernetes', for want of a kube-apiserver"
	cargo bench --locked

lint: ## format, clippy and documentation, as CI checks them
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps --document-private-items

fmt: ## format the sources
	cargo fmt

doc: ## the documentation of the code
	cargo doc --locked --no-deps --document-private-items

release: ## the static binaries for hosts and images; prints where they are
	RUSTFLAGS="-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs" cargo build --release --locked --target $(HOST)
	@size=$$(stat -c %s target/$(HOST)/release/flanneld); echo "target/$(HOST)/release/flanneld: $$size bytes"; \
		echo "target/$(HOST)/release/install-conf, for images"; \
	test $$size -lt $(LIMIT) || { echo "larger than $(LIMIT) bytes"; exit 1; }

clean: ## remove what was built
	cargo clean

# Debian's packages, only if something is missing. An etcd that comes with them must not go on as a service of this host.
deps:
	@missing=; for command in $(COMMANDS); do command -v $$command >/dev/null || missing="$$missing $$command"; done; \
	if [ -n "$$missing" ]; then \
	    echo "installing Debian packages, for want of:$$missing"; \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(PACKAGES) && \
	    case "$$missing" in *" etcd "*|*" etcd") systemctl disable --now etcd >/dev/null 2>&1 || true;; esac; \
	fi

root:
	@test "$$(id -u)" = 0 || { echo "network namespaces need root: run this as root"; exit 1; }
