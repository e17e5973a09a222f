#!/usr/bin/env bash
# Makes the tables, the CSV and the plot of benches/README.md: Ballast with three nodes and three
# replicas beside its peers, all on this machine, interleaved, medians over rounds.
#
#   benches/run.sh [--rounds 5] [--seconds 3] [--targets raw,nbdkit,qemu-nbd,ceph,ours] [...]
#
# `benches/run.sh --help` lists all options. Needs root for the peers' packages. Takes about
# 8 works x 5 targets x 5 rounds x (seconds + 2), and some minutes more to set up: a quarter of
# an hour on a quiet machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " != *" --help "* ]]; then
    scripts/install-test-tools.sh --bench
    cargo build --release --locked -p ballast-daemon -p ballast-tools
fi
exec python3 benches/bench.py "$@"
