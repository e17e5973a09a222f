"""Makes tables and a plot of a run's CSV: medians over rounds, the gates, one panel a work.

    python3 benches/report.py [FOLDER]     FOLDER holds speed.csv and facts.json
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

NUMBERS = ["iops", "mb_s", "mean_us", "p50_us", "p99_us", "flush_mean_us", "client_us_per_io",
           "server_us_per_io", "server_rss_mib", "other_cpu_percent", "steal_percent"]
TITLES = {
    "w4k-qd32": "4k random write, QD32",
    "w4k-qd1": "4k random write, QD1",
    "w4k-qd1-flush": "4k random write + flush, QD1",
    "r4k-qd32": "4k random read, QD32",
    "r4k-qd1": "4k random read, QD1",
    "r128k-scattered": "128k sequential read of random writes, QD8",
    "w128k-seq": "128k sequential write, QD8",
    "r128k-seq": "128k sequential read, QD8",
}
LABELS = {"ours": "Ballast, 3 replicas", "ceph": "Ceph RBD, 3 replicas", "raw": "raw file",
          "nbdkit": "nbdkit, 1 copy", "qemu-nbd": "qemu-nbd, 1 copy"}
COLOURS = {"ours": "#0b6e4f", "ceph": "#b5541c", "raw": "#8a8f98", "nbdkit": "#4c78a8",
           "qemu-nbd": "#7aa6d1"}


def medians(rows):
    """(work, target) to the median of each number over the rounds."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["work"], row["target"]].append(row)
    return {
        key: {name: statistics.median(float(row[name]) for row in group) for name in NUMBERS}
        for key, group in groups.items()
    }


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def speed_table(table, works, targets):
    lines = ["| work | target | IOPS | MB/s | mean us | p99 us | flush us | server CPU us per I/O "
             "| client CPU us per I/O | server MiB |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for work in works:
        for target in targets:
            if (work, target) not in table:
                continue
            m = table[work, target]
            cells = [m["iops"], m["mb_s"], m["mean_us"], m["p99_us"], m["flush_mean_us"],
                     m["server_us_per_io"], m["client_us_per_io"], m["server_rss_mib"]]
            texts = [number(cell) if cell else "-" for cell in cells]
            lines.append(f"| {TITLES[work]} | {LABELS[target]} | " + " | ".join(texts) + " |")
    return lines


def process_table(rows, works, targets):
    """CPU per I/O of every server process, in us, medians over the rounds."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for part in row["server_us_by_process"].split():
            name, used = part.split("=")
            groups[row["work"], row["target"]][name].append(float(used))
    lines = ["| work | target | CPU us per I/O, by process |", "|---|---|---|"]
    for work in works:
        for target in targets:
            parts = [f"{name} {number(statistics.median(used))}"
                     for name, used in groups[work, target].items()]
            if len(parts) > 1:
                lines.append(f"| {TITLES[work]} | {LABELS[target]} | {', '.join(parts)} |")
    return lines


def split_table(facts):
    """Where the time of a write with nothing else in flight goes, medians over the rounds."""
    steps = defaultdict(list)
    for split in facts.get("split", []):
        for step, found in split.items():
            steps[step].append((found["us"], found["times"]))
    if not steps:
        return []
    lines = [f"Steps of {TITLES['w4k-qd1']}, Ballast:", "", "| node, step | mean us | times |",
             "|---|--:|--:|"]
    for step, found in sorted(steps.items()):
        us, times = (statistics.median(values) for values in zip(*found))
        lines.append(f"| {step} | {number(us)} | {times:,.0f} |")
    return [*lines, ""]


def gates(table, facts):
    """(work, gate, goal, measured, what was reached) where there is something to compare."""
    found = []

    def value(work, target, name):
        return table.get((work, target), {}).get(name)

    def add(work, gate, goal, measured, gate_met, goal_met):
        reached = "goal" if gate_met and goal_met else "gate" if gate_met else "missed"
        found.append((work, gate, goal or "-", measured, reached))

    def add_ratio(work, peer, name, gate, goal):
        ours, theirs = value(work, "ours", name), value(work, peer, name)
        if ours and theirs:
            ratio = ours / theirs
            wish = f">= {goal} x" if goal else ""
            add(TITLES[work], f">= {gate} x {peer}", wish, f"{ratio:.2f} x", ratio >= gate,
                bool(goal) and ratio >= goal)

    cpu, iops = (value("w4k-qd32", "ours", n) for n in ("server_us_per_io", "iops"))
    if cpu is not None:
        add(TITLES["w4k-qd32"], "<= 50 us server CPU per write", "<= 35 us, >= 30k IOPS",
            f"{cpu:.1f} us, {iops:,.0f} IOPS", cpu <= 50, cpu <= 35 and iops >= 30_000)
    add_ratio("w4k-qd32", "ceph", "iops", 12, None)
    mean = value("w4k-qd1", "ours", "mean_us")
    if mean is not None:
        add(TITLES["w4k-qd1"], "mean <= 350 us", "<= 250 us", f"{mean:.0f} us", mean <= 350,
            mean <= 250)
    flushed, plain = (value(work, "ours", "iops") for work in ("w4k-qd1-flush", "w4k-qd1"))
    if flushed and plain:
        more = (plain / flushed - 1) * 100
        add(TITLES["w4k-qd1-flush"], "the pair within 10% of the write", "", f"{more:+.1f}%",
            more <= 10, False)
    add_ratio("r4k-qd32", "nbdkit", "iops", 0.8, 1.1)
    add_ratio("w128k-seq", "ceph", "mb_s", 1.2, None)
    speed = value("w128k-seq", "ours", "mb_s")
    if speed is not None:
        add(TITLES["w128k-seq"], "-", ">= 600 MB/s", f"{speed:.0f} MB/s", True, speed >= 600)
    add_ratio("r128k-seq", "nbdkit", "mb_s", 0.7, 1.0)
    if facts.get("idle"):
        most = max(facts["idle"].values())
        add("idle, 100 volumes", "< 2% of a core per node", "~0", f"{most:.2f}%", most < 2,
            most < 0.2)
    return found


def gate_table(table, facts):
    lines = ["| work | gate | goal | measured | reached |", "|---|---|---|---|---|"]
    return lines + ["| " + " | ".join(gate) + " |" for gate in gates(table, facts)]


def plot(table, works, targets):
    """One panel a work, one bar a target: IOPS for small requests, MB/s for large ones."""
    width, row, left, right, head = 760, 20, 170, 170, 26
    panel = head + row * len(targets) + 14
    height = panel * len(works) + 10
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for index, work in enumerate(works):
        name, unit = ("mb_s", "MB/s") if "128k" in work else ("iops", "IOPS")
        present = [t for t in targets if (work, t) in table]
        most = max((table[work, t][name] for t in present), default=1) or 1
        top = index * panel + 10
        parts.append(f'<text x="10" y="{top + 14}" font-weight="bold" fill="#222222">'
                     f'{escape(TITLES[work])} ({unit}, server CPU per I/O)</text>')
        for line, target in enumerate(present):
            m = table[work, target]
            y = top + head + line * row
            length = (width - left - right) * m[name] / most
            cpu = f", {number(m['server_us_per_io'])} us" if m["server_us_per_io"] else ""
            parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end" fill="#222222">'
                         f'{escape(LABELS[target])}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{max(length, 1):.1f}" height="14" '
                         f'fill="{COLOURS[target]}"/>')
            parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 11}" fill="#222222">'
                         f'{number(m[name])}{cpu}</text>')
    return "\n".join([*parts, "</svg>", ""])


def write(folder):
    with (folder / "speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    facts_file = folder / "facts.json"
    facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
    table = medians(rows)
    works = [work for work in TITLES if any(row["work"] == work for row in rows)]
    targets = [target for target in ("ours", "ceph", "nbdkit", "qemu-nbd", "raw")
               if any(row["target"] == target for row in rows)]
    lines = [*gate_table(table, facts), "", *speed_table(table, works, targets), "",
             *process_table(rows, works, targets), "", *split_table(facts)]
    (folder / "tables.md").write_text("\n".join(lines))
    (folder / "speed.svg").write_text(plot(table, works, targets))
    print("\n".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results")
