#!/usr/bin/env python3
"""Times saving and loading a checkpoint beside the disk itself (dd), the page cache (cat), and torch.distributed.checkpoint:
the shapes of SmolLM2-135M's weights and both moments, the same folder, in turn. Meant for an otherwise idle machine; nothing
is asserted. Standard library only. All seconds go to the standard error stream, medians as tables to standard output.

usage: tests/bench_checkpoint.py [FOLDER]     where to write, by default the system's folder for temporary files

ROUNDS        rounds that are counted, by default 5; three more come before them, in which memory that saves reuse is first taken
STEP          seconds from the begin of a save to the next update, by default 2: what is not written by then is copied. Saves
              whose update comes at once are timed beside
PEER_PYTHON   a Python that has torch; without one the peer is left out
PEER          its settings to try, as thread_count of FileSystemWriter and whether it keeps its staging memory, by default
              "1:0 1:1 2:1": what async_save does by itself, and with a DefaultStager that has no pinned memory
"""
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = int(os.environ.get("ROUNDS", 5))
WARMUP = 3
STEP = float(os.environ.get("STEP", 2))
PEER_PYTHON = os.environ.get("PEER_PYTHON")
PEER = os.environ.get("PEER", "1:0 1:1 2:1").split()
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", "target")).resolve()


class Child:
    """A program that answers a line with a line of seconds."""

    def __init__(self, *command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.line()

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with {self.process.wait()}")
        return line

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return [float(it) for it in self.line().split()]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


PEER_PROGRAM = r"""
import json, sys, time, warnings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
warnings.filterwarnings("ignore")
shapes = json.loads(sys.argv[1])
settings = dict(item.split("=") for item in sys.argv[2:])
dist.init_process_group("gloo", init_method="file://" + settings["store"], rank=0, world_size=1)
torch.manual_seed(0)
state = {kind: {name: torch.rand(shape) - 0.5 for name, shape in shapes.items()} for kind in ("model", "exp_avg", "exp_avg_sq")}
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
keeping = DefaultStager(StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=False,
                                       use_non_blocking_copy=False))
print("ready", flush=True)
for line in sys.stdin:
    what, folder, setting = line.split()
    start = time.perf_counter()
    if what == "save":
        threads, kept = map(int, setting.split(":"))
        writer = dcp.FileSystemWriter(folder, thread_count=threads)
        future = dcp.async_save(state, storage_writer=writer, async_stager=keeping if kept else None)
        stall = time.perf_counter() - start
        getattr(future, "upload_completion", future).result()
        print(stall, time.perf_counter() - start, flush=True)
    else:
        dcp.load(state, checkpoint_id=folder)
        print(time.perf_counter() - start, flush=True)
"""


def shapes(hidden=576, inner=1536, keys=192, blocks=30, vocabulary=49152):
    """SmolLM2-135M's tensors; the head is the embedding."""
    found = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    block = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    for index in range(blocks):
        found.update({f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()})
    return found


def timed(*command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    # What one has left for the disk to do is not the next one's to wait for.
    os.sync()
    return folder


def main():
    if len(sys.argv) > 2 or "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        sys.exit(__doc__)
    root = pathlib.Path(__file__).resolve().parent.parent
    build = ["cargo", "build", "--release", "--quiet", "-p", "checkpoint", "--example", "timed"]
    subprocess.run(build, check=True, cwd=root, env={**os.environ, "CARGO_TARGET_DIR": str(TARGET)})
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) == 2 else None) as folder:
        run(pathlib.Path(folder))


def run(folder):
    told = json.dumps(shapes())
    programs = {world: Child(str(TARGET / "release/examples/timed"), str(world), told) for world in (1, 2)}
    peer = None
    if PEER_PYTHON:
        peer = Child(PEER_PYTHON, "-W", "ignore", "-c", PEER_PROGRAM, told, f"store={folder / 'store'}")
    figures, sizes = {}, set()

    def note(**seconds):
        for name, value in seconds.items():
            figures.setdefault(name, []).append(round(value, 3))

    def ours(world):
        program = programs[world]
        stall, _, committed = program.ask("save", fresh(folder / "ours"), 0)
        note(**{f"stall at once {world}": stall, f"committed at once {world}": committed})
        stall, written, committed = program.ask("save", fresh(folder / "ours"), STEP)
        (step,) = (folder / "ours").iterdir()
        ranks = sorted(map(str, step.glob("*.safetensors")))
        sizes.add(sum(os.path.getsize(path) for path in ranks) // 1_000_000)
        note(**{f"stall {world}": stall, f"written {world}": written, f"committed {world}": committed})
        note(**{f"cat {world}": timed("cat", *ranks), f"load {world}": program.ask("load", step)[0]})
        shutil.rmtree(folder / "ours")

    def dd():
        (megabytes,) = sizes
        out = fresh(folder / "dd")
        note(dd=timed("dd", "if=/dev/zero", f"of={out}", "bs=1MB", f"count={megabytes}", "conv=fsync"))
        os.remove(out)

    def theirs(setting):
        stall, total = peer.ask("save", fresh(folder / "peer"), setting)
        note(**{f"peer stall {setting}": stall, f"peer total {setting}": total})
        note(**{f"peer load {setting}": peer.ask("load", folder / "peer", setting)[0]})
        shutil.rmtree(folder / "peer")

    turns = [(ours, 1), (ours, 2), (dd,), *((theirs, setting) for setting in (PEER if peer else []))]
    for turn in range(WARMUP + ROUNDS):
        for what, *argument in turns:
            what(*argument)
        if turn == WARMUP - 1:
            print(json.dumps(figures), file=sys.stderr)
            figures.clear()
        # Another order: what a disk does depends on what it did before.
        turns.append(turns.pop(0))
    for child in [*programs.values(), peer]:
        if child:
            child.close()
    print(json.dumps(figures), file=sys.stderr)
    show(sizes.pop() * 1_000_000, {name: statistics.median(values) for name, values in figures.items()})


def show(size, median):
    timed = (name for name in median if name.split()[0] in ("dd", "written", "cat", "load"))
    rate = {name: size / 1e9 / median[name] for name in timed}
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, medians of {ROUNDS} rounds\n")
    print("| | writers | s | GB/s | of dd or cat |\n|---|---:|---:|---:|---:|")
    print(f"| dd, conv=fsync | 1 | {median['dd']:.2f} | {rate['dd']:.2f} | |")
    for world in (1, 2):
        name = f"written {world}"
        print(f"| files written, durable | {world} | {median[name]:.2f} | {rate[name]:.2f} | {rate[name] / rate['dd']:.0%} |")
    for world in (1, 2):
        name, cat = f"load {world}", f"cat {world}"
        print(f"| cat > /dev/null, from the page cache | {world} | {median[cat]:.2f} | {rate[cat]:.2f} | |")
        print(f"| load, checked by crc32c | {world} | {median[name]:.2f} | {rate[name]:.2f} | {rate[name] / rate[cat]:.0%} |")
    what = ("stall", "total", "load")
    print("\n| save and load | stall, s | save, end to end, s | load, s |\n|---|---:|---:|---:|")
    ours = []
    for world in (1, 2):
        for when, text in ((" at once", "at once"), ("", f"after {STEP:g} s")):
            ours.append([median[f"stall{when} {world}"], median[f"committed{when} {world}"], median[f"load {world}"]])
            named = f"this project, {world} writer{'s' * (world - 1)}, the next update {text}"
            print(f"| {named} | {ours[-1][0]:.3f} | {ours[-1][1]:.2f} | {ours[-1][2]:.2f} |")
    for setting in PEER if "peer load " + PEER[0] in median else []:
        theirs = [median[f"peer {it} {setting}"] for it in what]
        threads, kept = setting.split(":")
        named = f"torch.distributed.checkpoint, {threads} thread{'s' * (threads != '1')}{', staging kept' * int(kept)}"
        # Beside the slower of ours whose update comes after a step.
        slower = [max(ours[1][index], ours[3][index]) for index in range(len(what))]
        times = [f"{it:.2f} ({it / own:.1f}x)" if own >= 0.01 else f"{it:.2f}" for it, own in zip(theirs, slower)]
        print(f"| {named} | " + " | ".join(times) + " |")


if __name__ == "__main__":
    main()
