#!/usr/bin/env bash
# Times 100 volumes through the CSI driver, one and eight at a time, and writes csi.csv and csi.md
# into benches/results.
#
#   benches/csi.sh [--volumes 100] [--parallel 1,8] [--mib 1024] [--fs ext4|xfs]
#
# Needs root (mounts), 7 GB of disk below target, and two minutes on a quiet machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cargo build --release --locked -p ballast-daemon -p ballast-csi-shim -p ballast-benches
exec target/release/csi benches/results "$@"
