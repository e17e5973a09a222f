"""Runs the benchmark: starts the targets, runs fio on them in turn, writes one CSV row a run.

Interleaved, so that a slow minute of the machine hits all targets alike: for each round, for each
work, each target once. CPU is that of whole processes, read from /proc before and after a run.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import report
import targets

HERE = Path(__file__).resolve().parent

# name: (fio options, whether a flush follows each write)
WORKS = {
    "w4k-qd32": (["--rw=randwrite", "--bs=4k", "--iodepth=32"], False),
    "w4k-qd1": (["--rw=randwrite", "--bs=4k", "--iodepth=1"], False),
    "w4k-qd1-flush": (["--rw=randwrite", "--bs=4k", "--iodepth=1"], True),
    "r4k-qd32": (["--rw=randread", "--bs=4k", "--iodepth=32"], False),
    "r4k-qd1": (["--rw=randread", "--bs=4k", "--iodepth=1"], False),
    "r128k-scattered": (["--rw=read", "--bs=128k", "--iodepth=8"], False),
    "w128k-seq": (["--rw=write", "--bs=128k", "--iodepth=8"], False),
    "r128k-seq": (["--rw=read", "--bs=128k", "--iodepth=8"], False),
}

# Read in the order in which it was written: before it the whole region is written so.
REWRITTEN = {"r128k-seq"}

# The work whose time is told by step.
SPLIT_WORK = "w4k-qd1"

# After each fill, in seconds: what was overwritten is given back meanwhile.
FILL_PAUSE = 2

# Volumes without a client are asleep by then, in seconds.
ASLEEP_AFTER = 20

COLUMNS = [
    "target", "work", "round", "iops", "mb_s", "mean_us", "p50_us", "p99_us", "flush_mean_us",
    "client_us_per_io", "server_us_per_io", "server_us_by_process", "server_rss_mib",
    "other_cpu_percent", "steal_percent",
]

TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


def log(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def process_us(pid):
    """CPU of a process so far, with its dead threads and the children it has reaped."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) * TICK_US


def resident_mib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def machine_us():
    """Busy and stolen time of all CPUs so far."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq) * TICK_US, steal * TICK_US


def children_us():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int((usage.ru_utime + usage.ru_stime) * 1e6)


def settle(limit):
    """Writes back what the last run left, then waits for a quiet machine, but not for ever."""
    os.sync()
    busy = 0
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before, _ = machine_us()
        time.sleep(0.5)
        busy = (machine_us()[0] - before) / 5000
        if busy < 30:
            return
    log(f"not quiet: {busy:.0f}% of one CPU is in use")


def fio(options):
    """Runs fio; its result, and the CPU it took with its start-up."""
    before = children_us()
    done = subprocess.run(
        ["fio", "--output-format=json", *options], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600, check=False,
    )
    used = children_us() - before
    start = done.stdout.find("{")
    if done.returncode != 0 or start < 0:
        raise RuntimeError(f"fio {options}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout[start:])["jobs"][0], used


def fio_base_us():
    """What fio costs apart from I/O."""
    _, used = fio(["--name=n", "--ioengine=null", "--rw=read", "--bs=4k", "--size=4k"])
    return used


def one_run(target, work, round_number, arguments, base_us):
    """One fio run on one target: a row."""
    options, flushed = WORKS[work]
    flush = []
    if flushed:
        flush = ["--fdatasync=1"] if target.engine_is_file else ["--fsync=1"]
    settle(arguments.quiet)
    pids = target.pids()
    cpu_before = {name: process_us(pid) for name, pid in pids.items()}
    busy_before, steal_before = machine_us()
    start = time.monotonic()
    job, client_us = fio([
        f"--name={work}", *target.fio_options(), *options, *flush, "--time_based=1",
        f"--runtime={arguments.seconds}", f"--size={arguments.size_mib}m", "--randrepeat=0",
        "--norandommap=1", "--percentile_list=50:99",
    ])
    wall_us = (time.monotonic() - start) * 1e6
    busy_after, steal_after = machine_us()
    rss = sum(resident_mib(pid) for pid in pids.values())
    by_process = {name: process_us(pid) - cpu_before[name] for name, pid in pids.items()}
    server_us = sum(by_process.values())
    side = job["write"] if job["write"]["total_ios"] else job["read"]
    ios = side["total_ios"]
    client_us = max(0, client_us - base_us)
    percentile = side["clat_ns"].get("percentile", {})
    other = busy_after - busy_before - server_us - client_us
    return {
        "target": target.name, "work": work, "round": round_number,
        "iops": round(side["iops"]), "mb_s": round(side["bw_bytes"] / 1e6, 1),
        "mean_us": round(side["lat_ns"]["mean"] / 1000, 1),
        "p50_us": round(percentile.get("50.000000", 0) / 1000, 1),
        "p99_us": round(percentile.get("99.000000", 0) / 1000, 1),
        "flush_mean_us": round(job.get("sync", {}).get("lat_ns", {}).get("mean", 0) / 1000, 1),
        "client_us_per_io": round(client_us / ios, 2),
        "server_us_per_io": round(server_us / ios, 2),
        "server_us_by_process": " ".join(f"{n}={us / ios:.1f}" for n, us in by_process.items()),
        "server_rss_mib": round(rss, 1),
        "other_cpu_percent": round(other / wall_us * 100, 1),
        "steal_percent": round((steal_after - steal_before) / wall_us * 100, 1),
    }


def fill(target, size_mib):
    """Every block is written, so that reads find data and writes allocate nothing new."""
    log(f"filling {target.name}")
    for _ in range(target.fills):
        fio(["--name=fill", *target.fio_options(), "--rw=write", "--bs=1m", "--iodepth=8",
             f"--size={size_mib}m"])
        time.sleep(FILL_PAUSE)


def rewrite(target, size_mib):
    """The region as a sequential writer leaves it: what lies in a log lies in order again."""
    options, _ = WORKS["w128k-seq"]
    fio(["--name=rewrite", *target.fio_options(), *options, f"--size={size_mib}m"])
    time.sleep(FILL_PAUSE)


def split_between(before, after):
    """Mean time of each step in us, and how often it was taken."""
    split = {}
    for step, (seconds, times) in after.items():
        old_seconds, old_times = before.get(step, (0.0, 0.0))
        if times > old_times:
            mean = (seconds - old_seconds) / (times - old_times) * 1e6
            split[step] = {"us": round(mean, 1), "times": int(times - old_times)}
    return split


def idle(target, seconds):
    """CPU of each node in percent of a core while nobody is connected."""
    before = {name: process_us(pid) for name, pid in target.pids().items()}
    time.sleep(seconds)
    return {
        name: round((process_us(pid) - before[name]) / seconds / 10_000, 2)
        for name, pid in target.pids().items()
    }


def arguments_from(words):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each fio run")
    parser.add_argument("--size-mib", type=int, default=1024, help="region used on each target")
    parser.add_argument("--targets", default="raw,nbdkit,qemu-nbd,ceph,ours")
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp/ballast-bench"))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="CSV, tables and plot")
    parser.add_argument("--quiet", type=int, default=2, help="longest wait for quiet, in seconds")
    parser.add_argument("--idle-seconds", type=int, default=20, help="0 leaves the idle row out")
    parser.add_argument("--idle-volumes", type=int, default=100)
    parser.add_argument("--binaries", type=Path, default=HERE.parent / "target" / "release")
    return parser.parse_args(words)


def measure(arguments, running, writer, flush, splits):
    base_us = fio_base_us()
    for round_number in range(1, arguments.rounds + 1):
        for work in arguments.works.split(","):
            for target in running:
                if work in REWRITTEN:
                    rewrite(target, arguments.size_mib)
                before = target.stage_totals()
                row = one_run(target, work, round_number, arguments, base_us)
                writer.writerow(row)
                flush()
                split = split_between(before, target.stage_totals())
                if split and work == SPLIT_WORK:
                    splits.append(split)
                log(f"{target.name:9} {work:14} round {round_number}: {row['iops']} IOPS, "
                    f"{row['mean_us']} us, server {row['server_us_per_io']} us per I/O")


def main():
    arguments = arguments_from(sys.argv[1:])
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    running = []
    facts = {"idle": {}, "split": [], "seconds": arguments.seconds, "rounds": arguments.rounds}
    try:
        for name in arguments.targets.split(","):
            log(f"starting {name}")
            target = targets.make(name, arguments)
            running.append(target)
            target.start()
            fill(target, arguments.size_mib)
        with (arguments.out / "speed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            measure(arguments, running, writer, file.flush, facts["split"])
        for target in running:
            if target.name == "ours" and arguments.idle_seconds:
                log(f"creating {arguments.idle_volumes} volumes")
                target.create_idle_volumes(arguments.idle_volumes)
                time.sleep(ASLEEP_AFTER)
                facts["idle"] = idle(target, arguments.idle_seconds)
    finally:
        for target in running:
            target.stop()
    (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    report.write(arguments.out)


if __name__ == "__main__":
    main()
