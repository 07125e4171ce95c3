#!/usr/bin/env python3
"""A soak: faults every 20 to 30 seconds against a coordinator and its workers, real processes in network namespaces of their own.

    cargo build --release && sudo tests/soak.py [--minutes 30] [--workers 4] [--folder FOLDER]

Of the faults 60 % are a kill -9 of a worker (a supervisor starts it again), 20 % a SIGSTOP for longer than the heartbeat limit
and a SIGCONT, 10 % a partition of a worker from all others and its end, 10 % a kill -9 of the coordinator and its restart.
Prints what happened: recoveries, how long each took from the fault to the first commit after it, pairs per second beside those of the
same machine without faults, memory and file handles of whoever lived long. Then every committed step is computed again without
faults, and must have the same bits (tests/src/replay.rs). Exits with 1 if anything is lost, differs or does not recover.

Needs root (network namespaces) and Python 3; `--no-network` leaves the partitions out and needs neither.
"""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "target" / "release"
BRIDGE, NET = "caldpo0", "10.77.0"
HEARTBEAT = 2.0

CONFIG = """
[job]
name = "soak"
seed = 7
output = "{folder}/run"
[model]
path = "configs/quickstart/reference"
[data]
train = ["configs/quickstart/train.jsonl"]
eval = ["configs/quickstart/eval.jsonl"]
max_length = 128
[objective]
kind = "cal_dpo"
beta = 0.1
[optimizer]
learning_rate = 1e-4
[schedule]
kind = "constant"
[train]
steps = 10000000
batch_pairs = {pairs}
micro_batch_tokens = 2048
[evaluate]
every_steps = 100000
[checkpoint]
every_steps = {save}
[reference]
store = "{folder}/store"
[cluster]
workers = {workers}
heartbeat_timeout_seconds = {heartbeat}
"""


def sh(*command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True)


class Process:
    """A process that is started again after a kill, with what it uses over its present life."""

    def __init__(self, name, command, log):
        self.name, self.command, self.log, self.uses = name, command, log, []
        self.start()

    def start(self):
        self.uses = []
        self.child = subprocess.Popen(self.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def kill(self):
        self.child.kill()
        self.child.wait()

    def measure(self):
        """Resident KiB and open files."""
        try:
            status = Path(f"/proc/{self.child.pid}/status").read_text()
            rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            self.uses.append((time.time(), rss, len(os.listdir(f"/proc/{self.child.pid}/fd"))))
        except (FileNotFoundError, StopIteration, ProcessLookupError):
            pass


class Soak:
    def __init__(self, options):
        self.options, self.random = options, random.Random(options.seed)
        self.folder = Path(options.folder or tempfile.mkdtemp(prefix="soak-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.network = not options.no_network
        self.host = f"{NET}.1" if self.network else "127.0.0.1"
        self.url = f"http://{self.host}:17070"
        self.token = self.folder / "token"
        self.token.write_text("soak-" + os.urandom(16).hex() + "\n")
        self.rows = self.folder / "run" / "metrics.jsonl"
        self.faults, self.late = [], []

    def namespace(self, index):
        return f"caldpo{index + 1}"

    def set_up(self):
        if self.network:
            self.tear_down()
            sh("ip", "link", "add", BRIDGE, "type", "bridge")
            sh("ip", "addr", "add", f"{self.host}/16", "dev", BRIDGE)
            sh("ip", "link", "set", BRIDGE, "up")
            for index in range(self.options.workers):
                name = self.namespace(index)
                sh("ip", "netns", "add", name)
                sh("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
                sh("ip", "link", "set", f"v{name}", "master", BRIDGE, "up")
                inside = ("ip", "netns", "exec", name, "ip")
                sh(*inside, "addr", "add", f"{NET}.{index + 10}/16", "dev", "eth0")
                sh(*inside, "link", "set", "eth0", "up")
                sh(*inside, "link", "set", "lo", "up")
        log = lambda name: open(self.folder / f"{name}.log", "ab")
        sets = [f"cluster.listen={self.host}:17070", f"cluster.state={self.folder}/state", f"security.token_file={self.token}"]
        command = [BIN / "coordinator", "--cluster"] + [part for value in sets for part in ("--set", value)]
        self.coordinator = Process("coordinator", command, log("coordinator"))
        self.workers = []
        for index in range(self.options.workers):
            inside = ["ip", "netns", "exec", self.namespace(index)] if self.network else []
            listen = f"{NET}.{index + 10}" if self.network else "127.0.0.1"
            command = inside + [BIN / "worker", "--coordinator", self.url, "--name", f"w{index}", "--threads", "1"]
            command += ["--listen", listen, "--token-file", self.token]
            self.workers.append(Process(f"w{index}", command, log(f"w{index}")))
        config = self.folder / "soak.toml"
        values = dict(folder=self.folder, workers=self.options.workers, heartbeat=HEARTBEAT)
        config.write_text(CONFIG.format(pairs=self.options.batch_pairs, save=self.options.save_every, **values))
        self.ask("submit", config)

    def tear_down(self):
        for process in [getattr(self, "coordinator", None)] + getattr(self, "workers", []):
            if process:
                process.child.send_signal(signal.SIGCONT)
                process.kill()
        if self.network:
            for index in range(self.options.workers):
                sh("ip", "netns", "del", self.namespace(index), check=False)
            sh("ip", "link", "del", BRIDGE, check=False)

    def ask(self, *words):
        """Asks until somebody answers: the coordinator may just have been started."""
        for _ in range(200):
            done = sh(BIN / "coordinator", *words, "--coordinator", self.url, "--token-file", self.token, check=False)
            if done.returncode == 0:
                return done.stdout
            time.sleep(0.1)
        sys.exit(f"coordinator {words}: {done.stderr}")

    def watch(self):
        """Reads rows as they are written: (time seen, step, generation, world)."""
        self.seen, rest, place = [], b"", 0
        while not self.over:
            try:
                with open(self.rows, "rb") as file:
                    file.seek(place)
                    text = file.read()
            except FileNotFoundError:
                text = b""
            if text:
                now, place = time.time(), place + len(text)
                *lines, rest = (rest + text).split(b"\n")
                for line in lines:
                    row = json.loads(line)
                    self.seen.append((now, row["step"], row["generation"], row["world_size"]))
            time.sleep(0.01)

    def steps_between(self, start, end):
        return sum(1 for row in self.seen if start <= row[0] < end)

    def fault(self):
        kind = self.random.choices(["kill", "stop", "partition", "coordinator"], [60, 20, 10 if self.network else 0, 10])[0]
        victim = self.random.choice(self.workers)
        generation, start, heal = self.seen[-1][2], time.time(), None
        if kind == "kill":
            victim.kill()
            victim.start()
        elif kind == "stop":
            victim.child.send_signal(signal.SIGSTOP)
            heal = threading.Timer(3 * HEARTBEAT, lambda: victim.child.send_signal(signal.SIGCONT))
        elif kind == "partition":
            link = "v" + self.namespace(self.workers.index(victim))
            sh("ip", "link", "set", link, "down")
            heal = threading.Timer(3 * HEARTBEAT, lambda: sh("ip", "link", "set", link, "up"))
        else:
            self.coordinator.kill()
            time.sleep(0.2)
            self.coordinator.start()
        if heal:
            heal.start()
        return kind, victim.name if kind != "coordinator" else "", generation, start

    def run(self):
        self.over = False
        watcher = threading.Thread(target=self.watch, daemon=True)
        self.set_up()
        watcher.start()
        begin = time.time()
        while not any(row[3] == self.options.workers for row in self.seen):
            if time.time() - begin > 120:
                sys.exit("no step in two minutes: see the logs in " + str(self.folder))
            time.sleep(0.1)
        quiet = self.options.baseline
        start = time.time()
        time.sleep(quiet)
        without = self.steps_between(start, start + quiet) / quiet
        print(f"without faults {without * self.options.batch_pairs:.0f} pairs/s ({without:.1f} steps/s)", flush=True)
        start, end = time.time(), time.time() + 60 * self.options.minutes
        failed = False
        while time.time() < end:
            pause = time.time() + self.random.uniform(20, 30)
            while time.time() < min(pause, end):
                time.sleep(1)
                for process in self.workers + [self.coordinator]:
                    process.measure()
            if time.time() >= end:
                break
            kind, name, generation, at = self.fault()
            recovered = None
            while recovered is None and time.time() - at < 60:
                later = [row for row in self.seen[-2000:] if row[2] > generation and row[0] > at]
                recovered = later[0][0] - at if later else None
                time.sleep(0.01)
            self.faults.append((kind, recovered))
            failed |= recovered is None
            said = "NOT RECOVERED in 60 s" if recovered is None else f"{recovered:.2f} s"
            print(f"{at - start:7.0f} s  {kind:11} {name:3} {said}, step {self.seen[-1][1]}", flush=True)
        under = self.steps_between(start, end) / (end - start)
        time.sleep(4 * HEARTBEAT)
        self.ask("cancel", "soak", "--reason", "the soak is over")
        while json.loads(self.ask("jobs", "--json"))["jobs"][0]["state"] != "cancelled":
            time.sleep(0.2)
        self.over = True
        watcher.join()
        return self.report(without, under, failed)

    def report(self, without, under, failed):
        print()
        for kind in ["kill", "stop", "partition", "coordinator", "all"]:
            times = sorted(took for fault, took in self.faults if took is not None and kind in (fault, "all"))
            if times:
                at = lambda share: times[min(len(times) - 1, int(share * len(times)))]
                print(f"{kind:11} {len(times):3} recovered, p50 {at(0.5):.2f} s, p99 {at(0.99):.2f} s, longest {times[-1]:.2f} s")
        print(f"{under * self.options.batch_pairs:.0f} pairs/s under faults, {100 * under / without:.1f} % of {without * self.options.batch_pairs:.0f}")
        for process in self.workers + [self.coordinator]:
            if len(process.uses) > 2:
                (t0, rss0, files0), (t1, rss1, files1) = process.uses[1], process.uses[-1]
                print(f"{process.name:11} over its last {t1 - t0:.0f} s: {rss0 >> 10} to {rss1 >> 10} MiB, {files0} to {files1} open files")
        steps = [json.loads(line) for line in self.rows.read_text().splitlines()]
        whole = [row["step"] for row in steps] == list(range(1, len(steps) + 1))
        rising = all(a["generation"] <= b["generation"] for a, b in zip(steps, steps[1:]))
        rewinds = sum('"rewind"' in line for line in (self.folder / "run" / "events.jsonl").read_text().splitlines())
        print(f"{len(steps)} committed steps, one row each: {whole}; generations rise: {rising}; rewinds: {rewinds}")
        failed |= not whole or not rising or rewinds > 0
        if not self.options.no_replay:
            failed |= subprocess.run([BIN / "replay", self.folder / "run"], cwd=ROOT).returncode != 0
        return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch-pairs", type=int, default=64)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--baseline", type=float, default=60, help="seconds without faults before")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="kept; by default a temporary one that is removed when all is well")
    parser.add_argument("--no-network", action="store_true")
    parser.add_argument("--no-replay", action="store_true")
    soak = Soak(parser.parse_args())
    code = 1
    try:
        code = soak.run()
    finally:
        soak.tear_down()
        if code == 0 and not soak.options.folder:
            shutil.rmtree(soak.folder)
        else:
            print(f"logs and run: {soak.folder}")
    sys.exit(code)


if __name__ == "__main__":
    main()
