"""What is measured: how to start it, which processes it is, how fio reaches it.

Everything listens on 127.0.0.1 and keeps its data below one folder. All processes are ended by
their ids. Ceph runs without authentication, with its settings for solid-state disks, three
replicas, and without the client's cache, so that a write is acknowledged by all replicas.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path


def make(name, arguments):
    kinds = {"raw": Raw, "nbdkit": Nbdkit, "qemu-nbd": QemuNbd, "ceph": Ceph, "ours": Ours}
    return kinds[name](name, arguments)


def run(command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def wait_for(what, seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come in {seconds} s")
        time.sleep(0.1)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except FileNotFoundError:
        return False


class Target:
    """A thing under test. `engine_is_file`: fio opens a file, and fdatasync is its flush."""

    engine_is_file = False
    # How often the region is written before it is measured.
    fills = 1

    def __init__(self, name, arguments):
        self.name = name
        self.arguments = arguments
        self.folder = arguments.work_dir / name
        self.processes = {}

    def start(self):
        """Starts it on an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def spawn(self, name, command):
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def pids(self):
        """The processes whose CPU and memory count as the server's."""
        return {name: process.pid for name, process in self.processes.items()}

    def stage_totals(self):
        """Where it counts the time of its steps: name to (seconds, times) so far."""
        return {}

    def stop(self):
        for process in reversed(self.processes.values()):
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Raw(Target):
    """A file of this machine with O_DIRECT and io_uring: no server, no copy elsewhere."""

    engine_is_file = True

    def fio_options(self):
        return ["--ioengine=io_uring", "--direct=1", f"--filename={self.folder / 'file'}"]


class NbdTarget(Target):
    """An NBD server with one file."""

    port = 0

    def start(self):
        super().start()
        self.file = self.folder / "file"
        with self.file.open("ab") as file:
            file.truncate(self.arguments.size_mib << 20)
        if listens(self.port):
            raise RuntimeError(f"port {self.port} is taken")
        self.spawn(self.name, self.command())
        wait_for(self.name, 20, lambda: listens(self.port))

    def fio_options(self):
        return ["--ioengine=nbd", f"--uri=nbd://127.0.0.1:{self.port}/vol"]


class Nbdkit(NbdTarget):
    """nbdkit's file plugin: one copy, through the page cache."""

    port = 10961

    def command(self):
        return ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(self.port), "-e", "vol", "file",
                str(self.file)]


class QemuNbd(NbdTarget):
    """qemu-nbd: one copy, O_DIRECT and io_uring."""

    port = 10962

    def command(self):
        return ["qemu-nbd", "--persistent", "--shared=8", "--bind=127.0.0.1",
                f"--port={self.port}", "--export-name=vol", "--format=raw", "--cache=none",
                "--aio=io_uring", str(self.file)]


CEPH_CONF = """[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:13300,v1:127.0.0.1:16789]
public_network = 127.0.0.0/8
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 3
osd_pool_default_min_size = 2
osd_crush_chooseleaf_type = 0
osd_pool_default_pg_autoscale_mode = off
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_warn_on_insecure_global_id_reclaim_allowed = false
run_dir = {folder}/run
admin_socket = {folder}/run/$cluster-$name.asok
log_file = {folder}/log/$name.log
crash_dir = {folder}/crash
mon_data = {folder}/mon.$id
mgr_data = {folder}/mgr.$id
osd_data = {folder}/osd.$id
osd_objectstore = bluestore
osd_memory_target = 1073741824
bluestore_block_size = {osd_bytes}
bluestore_debug_enforce_settings = ssd
osd_scrub_begin_hour = 0
osd_scrub_end_hour = 1
rbd_cache = false
"""


class Ceph(Target):
    """One monitor, one manager, three BlueStore OSDs on files written in full, one RBD image."""

    osds = 3

    def start(self):
        super().start()
        os.environ["CEPH_CONF"] = str(self.folder / "ceph.conf")
        for part in ("run", "log", "crash", "mon.a", "mgr.x"):
            (self.folder / part).mkdir()
        osd_bytes = (self.arguments.size_mib * 5 // 2) << 20
        fsid = str(uuid.uuid4())
        conf = CEPH_CONF.format(fsid=fsid, folder=self.folder, osd_bytes=osd_bytes)
        (self.folder / "ceph.conf").write_text(conf)
        run(["monmaptool", "--create", "--fsid", fsid, "--addv", "a",
             "[v2:127.0.0.1:13300,v1:127.0.0.1:16789]", str(self.folder / "monmap")])
        run(["ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self.folder / "monmap")])
        self.spawn("mon", ["ceph-mon", "-f", "-i", "a"])
        wait_for("the monitor", 60, lambda: self.ceph("mon", "stat") is not None)
        self.spawn("mgr", ["ceph-mgr", "-f", "-i", "x"])
        for number in range(self.osds):
            self.start_osd(number, osd_bytes)
        wait_for("all OSDs", 120, lambda: self.json("osd", "stat").get("num_up_osds") == self.osds)
        self.ceph("osd", "pool", "create", "rbd", "32", "32", needed=True)
        self.ceph("osd", "pool", "application", "enable", "rbd", "rbd", needed=True)
        wait_for("clean placement groups", 180, self.clean)
        run(["rbd", "create", "--size", str(self.arguments.size_mib), "vol"])

    def start_osd(self, number, osd_bytes):
        folder = self.folder / f"osd.{number}"
        folder.mkdir()
        # Written in full: O_DIRECT writes into it then change no metadata of the file system.
        run(["dd", "if=/dev/zero", f"of={folder / 'block'}", "bs=1M",
             f"count={osd_bytes >> 20}", "oflag=direct"])
        name = str(uuid.uuid4())
        given = self.ceph("osd", "new", name, needed=True).strip()
        if given != str(number):
            raise RuntimeError(f"OSD {given}, not {number}")
        run(["ceph-osd", "-i", str(number), "--mkfs", "--osd-uuid", name])
        self.spawn(f"osd{number}", ["ceph-osd", "-f", "-i", str(number)])

    def ceph(self, *words, needed=False):
        done = subprocess.run(["ceph", "--connect-timeout", "5", *words], capture_output=True,
                              text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
        if needed and done.returncode != 0:
            raise RuntimeError(f"ceph {words}: {done.stderr}")
        return done.stdout if done.returncode == 0 else None

    def json(self, *words):
        return json.loads(self.ceph(*words, "-f", "json") or "{}")

    def clean(self):
        summary = self.json("pg", "stat").get("pg_summary", {})
        states = summary.get("num_pg_by_state", [])
        return summary.get("num_pgs", 0) > 0 and all(s["name"] == "active+clean" for s in states)

    def pids(self):
        """The data path; what the monitor and the manager use is housekeeping."""
        return {n: p.pid for n, p in self.processes.items() if n.startswith("osd")}

    def fio_options(self):
        return ["--ioengine=rbd", "--clientname=admin", "--pool=rbd", "--rbdname=vol"]


class Ours(Target):
    """Ballast: three nodes, three replicas, through NBD on one of them, which then leads.

    The pools are ten times as large as the volume, and more than half of each is written before
    anything is measured: for most of what follows the file system has nothing left to allocate.
    """

    fills = 6

    def start(self):
        super().start()
        self.data = self.folder / "data"
        self.spawn("dev", [str(self.arguments.binaries / "ballastd"), "dev",
                           "--data", str(self.data), "--nodes", "3",
                           "--pool-size", f"{self.arguments.size_mib * 10}MiB",
                           "--volume", f"vol={self.arguments.size_mib}MiB"])
        wait_for("three nodes", 60, lambda: len(self.nodes()) == 3)
        self.uri = self.nodes()[0]["nbd"].rstrip("/") + "/vol"
        wait_for("the volume", 60, self.served)

    def served(self):
        if self.processes["dev"].poll() is not None:
            raise RuntimeError((self.folder / "dev.log").read_text())
        done = subprocess.run(["nbdinfo", "--size", self.uri], capture_output=True, check=False)
        return done.returncode == 0

    def nodes(self):
        try:
            nodes = json.loads((self.data / "dev.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return nodes["nodes"] if isinstance(nodes, dict) else nodes

    def pids(self):
        return {f"node{node['id']}": node["pid"] for node in self.nodes()}

    def stage_totals(self):
        totals = {}
        for node in self.nodes():
            with urllib.request.urlopen(node["metrics"], timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            for line in lines:
                name, _, value = line.rpartition(" ")
                for kind in ("_sum{", "_count{"):
                    metric, _, labels = name.partition(kind)
                    if labels and metric in ("ballast_stage_seconds", "ballast_command_seconds"):
                        step = labels.split('"')[1]
                        if metric == "ballast_command_seconds":
                            step = f"command {step}"
                        pair = totals.setdefault(f"node{node['id']} {step}", [0.0, 0.0])
                        pair[kind == "_count{"] = float(value)
        return totals

    def create_idle_volumes(self, count):
        endpoint = self.nodes()[0]["grpc"]
        for number in range(count):
            run([str(self.arguments.binaries / "ballastctl"), "--endpoint", endpoint, "volume",
                 "create", f"idle-{number}", "--size", "64MiB", "--wait"])

    def fio_options(self):
        return ["--ioengine=nbd", f"--uri={self.uri}"]

    def stop(self):
        pids = list(self.pids().values()) if self.processes else []
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
