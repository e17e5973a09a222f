#!/usr/bin/env bash
# Installs what the tests need on a Debian 12 machine that has Rust (rustup) and git.
# Run as root. Does nothing, in a fraction of a second, when everything is there.
#
#   install-test-tools.sh [--bench]    --bench adds the peers of the benchmark (Ceph, nbd-server)
set -euo pipefail

# Clients and tools of the tests, by what they are for.
packages=(
    fio jq procps util-linux                       # load, JSON, process and mount tools
    libnbd-bin nbdkit qemu-utils                   # NBD clients, and servers to prove them on
    fuse3 e2fsprogs xfsprogs                       # file systems through nbdfuse and a loop device
    postgresql-15 postgresql-client-15             # PostgreSQL and pgbench
    nftables iproute2                              # cut networks
    prometheus                                     # promtool, checks /metrics
    qemu-system-x86 busybox-static cpio kmod       # a stock kernel as a client
    xz-utils dash socat binutils
    nvme-cli nbd-client cryptsetup-bin dmsetup uuid-runtime
)
bench_packages=(ceph-mon ceph-mgr ceph-osd ceph-common nbd-server linux-perf python3)
# Checks licences, sources and bans of dependencies. Built without optimisation and without
# its advisory fetcher's defaults: one minute on two cores, and it still answers in a second.
cargo_deny=0.20.2

# The conformance tests of CSI drivers, built from the Go module proxy.
csi_sanity=v5.4.0

log() { printf 'install-test-tools: %s\n' "$*"; }

missing_packages() {
    local state
    for package in "$@"; do
        state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
        [[ $state == installed ]] || echo "$package"
    done
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    log "installing ${missing[*]}"
    if ((EUID != 0)); then
        log "this needs root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    # The tests run servers of their own: no package may start one here.
    mkdir -p /etc/postgresql-common
    [[ -e /etc/postgresql-common/createcluster.conf ]] ||
        echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends \
        -o Dpkg::Options::=--force-confold "${missing[@]}" </dev/null >/dev/null
}

install_cargo_deny() {
    [[ $(cargo deny --version 2>/dev/null) != "cargo-deny $cargo_deny" ]] || return 0
    log "building cargo-deny $cargo_deny"
    CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_INCREMENTAL=false \
        cargo install --quiet --locked --debug --no-default-features --force \
        --version "$cargo_deny" cargo-deny
}

# Reads the manifests by Kubernetes' own types (deploy/check), builds csi-sanity. Debian 12 has an
# older one.
find_go() {
    local minor
    go=$(command -v go || echo /usr/local/go/bin/go)
    minor=$("$go" env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p') || true
    ((${minor:-0} >= 25)) && return
    log "Go 1.25 or newer is missing: install it from https://go.dev/dl to /usr/local/go" >&2
    exit 1
}

install_csi_sanity() {
    local module=github.com/kubernetes-csi/csi-test/v5 there=/usr/local/bin/csi-sanity
    # The line of the module itself: mod, path, version, sum.
    [[ ! -x $there ]] || [[ $("$go" version -m "$there" 2>/dev/null |
        awk -v m="$module" '$1 == "mod" && $2 == m { print $3 }') != "$csi_sanity" ]] || return 0
    log "building csi-sanity $csi_sanity"
    GOBIN=${there%/*} GOFLAGS=-mod=mod "$go" install "$module/cmd/csi-sanity@$csi_sanity"
}

[[ ${1:-} != --bench ]] || packages+=("${bench_packages[@]}")
cd / # away from the project's toolchain file
install_packages "${packages[@]}"
install_cargo_deny
find_go
install_csi_sanity
