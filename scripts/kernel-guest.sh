#!/usr/bin/env bash
# A guest for tests with a real kernel's NBD client (e2e/src/vm.rs): a stock Debian kernel, and a small
# file system in memory with what the CSI driver calls. Kernel and tools are made once, until this
# file changes; the kernel's package is downloaded with apt and not installed.
#
#   kernel-guest.sh FOLDER INITRD [PROGRAM...]
#
# Leaves FOLDER/vmlinuz, FOLDER/release, and INITRD with these PROGRAMs in /usr/bin.
set -euo pipefail
shopt -s inherit_errexit
export PATH=$PATH:/usr/sbin:/sbin

mkdir -p "${1:?a folder}"
folder=$(realpath "$1")
initrd=$(realpath "${2:?an initrd}")
shift 2
self=$(realpath "${BASH_SOURCE[0]}")

# What the CSI driver calls on a host, and what lets the test in; busybox has the rest.
programs=(dash mount umount setpriv blkid blockdev mkfs.ext4 e2fsck resize2fs mkfs.xfs xfs_growfs ss socat)
# Each with what it needs. tcp_diag is what `ss --kill` asks.
modules=(virtio_pci virtio_net nbd tcp_diag ext4 xfs crc32c_generic)

log() { printf 'kernel-guest: %s\n' "$*" >&2; }

# The newest that apt knows, unsigned ones and those for clouds or real time left out.
newest_kernel() {
    apt-cache search --names-only '^linux-image-[0-9][^-]*(-[0-9]+)?-amd64$' | cut -d ' ' -f 1 |
        grep -E '^linux-image-[0-9]+\.[0-9]+\.[0-9]+' | sort -V | tail -n 1
}

# download_kernel INTO
download_kernel() {
    local try package
    # What apt remembers may be older than what its servers still have.
    for try in remembered updated; do
        [[ $try == remembered ]] || apt-get -qq update >&2
        package=$(newest_kernel) || continue
        log "downloading $package"
        if (cd "$1" && apt-get -qq -o APT::Sandbox::User=root download "$package") >&2; then
            return 0
        fi
    done
    log "apt has no kernel for amd64"
    return 1
}

# copy_libraries_of PROGRAM ROOT
copy_libraries_of() { ldd "$1" | grep -oE '/[^ ]+' | xargs cp -uL --parents -t "$2"; }

# copy_programs ROOT
copy_programs() {
    local program path
    mkdir -p "$1"/{bin,sbin,usr/bin,usr/sbin,dev,proc,sys,run,tmp,etc,var/lib}
    cp "$(command -v busybox)" "$1/bin/busybox"
    for program in $(busybox --list); do
        [[ $program == busybox ]] || ln -s busybox "$1/bin/$program"
    done
    for program in "${programs[@]}"; do
        path=$(command -v "$program") || { log "$program is missing"; return 1; }
        cp -L --parents -t "$1" "$path"
        copy_libraries_of "$path" "$1"
    done
    cp --parents -t "$1" /etc/mke2fs.conf
    ln -sf /usr/bin/dash "$1/bin/sh"
    ln -sf /bin/modprobe "$1/sbin/modprobe"
}

# copy_modules KERNEL RELEASE ROOT
copy_modules() {
    local module path target
    depmod -b "$1" "$2"
    for module in "${modules[@]}"; do
        modprobe -d "$1" -S "$2" --show-depends "$module"
    done | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r path; do
        target=$3/${path#"$1/"}
        mkdir -p "${target%/*}"
        case $path in *.xz) xz -dc "$path" >"${target%.xz}" ;; *) cp "$path" "$target" ;; esac
    done
    cp "$1/lib/modules/$2"/modules.{builtin,builtin.modinfo,order} "$3/lib/modules/$2/"
    depmod -b "$3" "$2"
}

# The first process. A connection to port 9001 is a shell, one to 9000 is the CSI driver's socket. It
# says on the console when they can be used.
write_init() {
    cat >"$1" <<'INIT'
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ln -s /proc/self/fd /dev/fd
modprobe -a virtio_pci virtio_net ext4 xfs tcp_diag
modprobe nbd max_part=0 nbds_max=4
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
socat TCP-LISTEN:9000,fork,reuseaddr UNIX-CONNECT:/run/csi.sock 2>/dev/null &
socat TCP-LISTEN:9001,fork,reuseaddr EXEC:/bin/sh,stderr &
until ss -ltn | grep -q :9000 && ss -ltn | grep -q :9001; do usleep 20000; done
echo "guest is ready after $(cut -d ' ' -f 1 /proc/uptime) s"
while :; do sleep 2; done
INIT
    chmod +x "$1"
}

make_guest() {
    local work=$1 release
    mkdir -p "$work/kernel" "$work/root"
    download_kernel "$work"
    dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel"
    release=$(ls "$work/kernel/lib/modules")
    copy_programs "$work/root"
    copy_modules "$work/kernel" "$release" "$work/root"
    write_init "$work/root/init"
    cp "$work/kernel/boot/vmlinuz-$release" "$folder/vmlinuz"
    echo "$release" >"$folder/release"
    pack "$work/root" >"$folder/base.cpio.new"
    # Last: its age says whether all is there.
    mv "$folder/base.cpio.new" "$folder/base.cpio"
}

pack() { (cd "$1" && find . | cpio --quiet -o -H newc --owner=0:0); }

# write_initrd WORK PROGRAM...: archives behind one another are one to the kernel.
write_initrd() {
    local root=$1/added program
    shift
    mkdir -p "$root/usr/bin"
    for program in "$@"; do
        # Without what only debuggers read.
        strip -g -o "$root/usr/bin/${program##*/}" "$program"
        copy_libraries_of "$program" "$root"
    done
    { cat "$folder/base.cpio"; pack "$root"; } >"$initrd"
}

exec {lock}>"$folder/lock"
flock "$lock"
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
if [[ ! $folder/base.cpio -nt $self ]]; then
    make_guest "$work/made"
    log "made of $(cat "$folder/release"), $(du -h "$folder/base.cpio" | cut -f 1)"
fi
write_initrd "$work" "$@"
