"""What tests/bench.sh runs: times programs, sums the memory of their processes, prints tables. Standard library only."""
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

COORDINATOR = pathlib.Path("target/release/coordinator").resolve()


def setting(name, default):
    return int(os.environ.get(name, default))


STEPS, WARMUP, ROUNDS = setting("STEPS", 6), setting("WARMUP", 2), setting("ROUNDS", 3)
BATCH_PAIRS, MAX_LENGTH, WORKERS = setting("BATCH_PAIRS", 8), setting("MAX_LENGTH", 1024), setting("WORKERS", 1)
PEER = os.environ.get("PEER", "../shared/tools/peer_dpo.py")
PEER_PYTHON = os.environ.get("PEER_PYTHON")
PEER_MICRO = os.environ.get("PEER_MICRO", "1 8").split()


class Memory(threading.Thread):
    """The most that a process and its descendants hold at once: proportional set sizes, summed once a second, for reading them
    walks their page tables and takes from what is timed."""

    def __init__(self, root):
        super().__init__(daemon=True)
        self.root, self.peak, self.over = root, 0, threading.Event()

    def run(self):
        while not self.over.wait(1):
            self.peak = max(self.peak, sum(map(proportional, descendants(self.root))))


def descendants(root):
    found, rest = [], [root]
    while rest:
        found.append(rest.pop())
        for children in pathlib.Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                rest += map(int, children.read_text().split())
            except OSError:
                continue  # it has ended
    return found


def proportional(pid):
    try:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run(command, **options):
    """Standard output of a command and the memory it took, in GiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    memory = Memory(process.pid)
    memory.start()
    out, error = process.communicate()
    memory.over.set()
    memory.join()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{error[-3000:]}")
    return out, memory.peak / 2**30


def project(model, pairs, workers=WORKERS, threads=None):
    """A whole job: its timed steps, and the peak over its life, reference pass and export included."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return job(pathlib.Path(folder), model, pairs, workers, threads)


def job(folder, model, pairs, workers, threads):
    # As many pairs as the peer reads, so that the reference pass is as long.
    first = folder / "pairs.jsonl"
    first.write_text("".join(open(pairs).readlines()[: BATCH_PAIRS * (STEPS + WARMUP)]))
    values = {
        "job.name": "bench", "job.output": folder / "run", "model.path": model, "data.train": [str(first)], "data.eval": [],
        "data.max_length": MAX_LENGTH, "data.shuffle": False, "data.cache": folder / "tokens", "objective.kind": "cal_dpo",
        "reference.store": folder / "store", "optimizer.learning_rate": 1e-6, "schedule.kind": "constant",
        "train.steps": STEPS + WARMUP, "train.batch_pairs": BATCH_PAIRS, "checkpoint.every_steps": 0,
        "cluster.workers": workers,
    }
    if threads:
        values["cluster.threads"] = threads
    text = "".join(f"{key} = {json.dumps(value if isinstance(value, (int, float, list, bool)) else str(value))}\n"
                   for key, value in values.items())
    (folder / "job.toml").write_text(text)
    start = time.time()
    _, memory = run([COORDINATOR, folder / "job.toml"])
    whole = time.time() - start
    # A row has the update of the step before it, and the first update makes the moments: two steps of warm-up leave it out.
    rows = [json.loads(line) for line in open(folder / "run/metrics.jsonl")][WARMUP:]
    seconds = sum(row["seconds"] for row in rows)
    phases = {key.split("/")[1]: sum(row[key] for row in rows) / seconds for key in rows[0] if key.startswith("seconds/")}
    return {
        "pairs_per_second": sum(row["pairs"] for row in rows) / seconds,
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds,
        "memory": memory, "whole_seconds": whole, "phases": phases,
    }


def peer(model, pairs, micro, checkpointing=False):
    # Not resolved further: the Python of a virtual environment is a link.
    python, script, model, pairs = (os.path.abspath(shutil.which(it) or it) for it in (PEER_PYTHON, PEER, model, pairs))
    command = [python, script, "--model", model, "--data", pairs, "--steps", STEPS, "--warmup", WARMUP, "--batch-pairs", BATCH_PAIRS,
               "--micro-pairs", micro, "--max-length", MAX_LENGTH, "--threads", os.cpu_count()]
    with tempfile.TemporaryDirectory() as folder:  # it leaves files where it runs
        out, memory = run([str(part) for part in command + ["--checkpointing"] * checkpointing], cwd=folder)
    return json.loads(out.strip().splitlines()[-1]) | {"memory": memory}


def table(model, sets):
    print("| pairs | program | pairs/s | tokens/s | peak memory of all processes | whole run |\n|---|---|---|---|---|---|")
    for pairs in sets:
        name = pathlib.Path(pairs).stem
        peers = {}
        if PEER_PYTHON:
            for micro in PEER_MICRO:
                peers[micro] = [peer(model, pairs, micro)]
            best = max(peers, key=lambda micro: peers[micro][0]["pairs_per_second"])
            lean = peer(model, pairs, 1, checkpointing=True)
        ours = []
        for _ in range(ROUNDS):
            ours.append(project(model, pairs))
            if PEER_PYTHON:
                peers[best].append(peer(model, pairs, best))
        row(name, f"this, {WORKERS} worker(s)", ours)
        if not PEER_PYTHON:
            continue
        for micro, results in peers.items():
            row(name, f"{results[0]['peer']}, {micro} pairs a micro-batch", results)
        row(name, "the same, 1 pair, gradient checkpointing", [lean])
        ratios = [mine["pairs_per_second"] / theirs["pairs_per_second"] for mine, theirs in zip(ours, peers[best][1:])]
        memory = max(mine["memory"] for mine in ours)
        fastest = min(result["memory"] for result in peers[best])
        print(f"\n{name}: {statistics.median(ratios):.2f} times the peer's pairs/s (median of {ROUNDS} ratios in turn, {min(ratios):.2f} "
              f"to {max(ratios):.2f}), {memory / fastest:.2f} of its memory there, {memory / lean['memory']:.2f} of its leanest\n")


def row(pairs, program, results):
    median = lambda key: statistics.median(result[key] for result in results)
    whole = f"{median('whole_seconds'):.0f} s" if "whole_seconds" in results[0] else ""
    print(f"| {pairs} | {program} | {median('pairs_per_second'):.3f} | {median('tokens_per_second'):.0f} | "
          f"{max(result['memory'] for result in results):.2f} GiB | {whole} |", flush=True)
    for name, share in results[0].get("phases", {}).items():
        print(f"{name} {share:.1%}", end="  ", file=sys.stderr)
    print(file=sys.stderr)


def bench(model, pairs, **flags):
    command = [COORDINATOR, "worker", "bench", "--model", model, "--data", pairs, "--profile"]
    for flag, value in {"batch_pairs": BATCH_PAIRS, "steps": STEPS, "warmup": WARMUP, "max_length": MAX_LENGTH, **flags}.items():
        command += ["--" + flag.replace("_", "-"), value]
    return json.loads(run([str(part) for part in command])[0])


def curve(title, unit, points):
    """Seconds against a size, and the exponent of the straight line through their logarithms."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x_mean, y_mean = statistics.mean(xs), statistics.mean(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    exponent = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys)) / spread
    print(f"\n{title}: exponent {exponent:.2f}\n\n| {unit[0]} | {unit[1]} |\n|---|---|")
    for x, y in points:
        print(f"| {x:,.0f} | {y:.4g} |")
    sys.stdout.flush()


def growth(model, pairs):
    points = []
    for tokens in [256, 512, 1024, 2048, 4096]:
        result = bench(model, pairs, micro_batch_tokens=tokens)
        points.append((tokens, result["seconds_per_step"] / result["profile"]["computed_tokens"]))
    curve("Tokens at once", ("`micro_batch_tokens`", "seconds a computed token"), points)
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for length in [128, 256, 512, 1024, 2048]:
            file = pathlib.Path(folder) / f"{length}.jsonl"
            # About one token a word; one pair a step.
            text = lambda count, word: " ".join([word] * count)
            line = {"prompt": text(length // 2, "what"), "chosen": text(length // 2, "yes"), "rejected": text(length // 2, "no")}
            file.write_text((json.dumps(line) + "\n") * 4)
            result = bench(model, file, max_length=2 * length, batch_pairs=1, steps=2, warmup=1, micro_batch_tokens=8192)
            through = sum(result["profile"]["seconds"][phase] for phase in ["forward", "head", "backward"])
            points.append((length, through))
    curve("Length of a sequence", ("tokens", "seconds of forward and backward of a pair"), points)
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for hidden, blocks in [(128, 8), (256, 12), (384, 18), (576, 30)]:
            result = bench(random_model(folder, model, hidden, blocks), pairs, steps=2, warmup=1)
            points.append((result["parameters"], result["seconds_per_step"]))
    curve("Model size", ("parameters", "seconds a step"), points)
    points = []
    for workers in [1, 2, 4]:
        points.append((workers, BATCH_PAIRS / project(model, pairs, workers, threads=1)["pairs_per_second"]))
    curve(f"Workers of one thread on {os.cpu_count()} cores", ("workers", "seconds a step"), points)


def random_model(folder, like, hidden, blocks):
    """A Llama of this size with the tokenizer of another model; its weights are small and mean nothing."""
    out = pathlib.Path(folder) / f"{hidden}x{blocks}"
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((out / "config.json").read_text())
    heads = hidden // 64
    config.update(hidden_size=hidden, num_hidden_layers=blocks, intermediate_size=hidden * 8 // 3, num_attention_heads=heads,
                  num_key_value_heads=heads, head_dim=64, tie_word_embeddings=True)
    (out / "config.json").write_text(json.dumps(config))
    inner, shapes = hidden * 8 // 3, {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for block in range(blocks):
        name = f"model.layers.{block}."
        for part in "qkvo":
            shapes[f"{name}self_attn.{part}_proj.weight"] = [hidden, hidden]
        shapes[name + "mlp.gate_proj.weight"] = shapes[name + "mlp.up_proj.weight"] = [inner, hidden]
        shapes[name + "mlp.down_proj.weight"] = [hidden, inner]
        shapes[name + "input_layernorm.weight"] = shapes[name + "post_attention_layernorm.weight"] = [hidden]
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # bf16 0.02, -0.015, 0.01, -0.025 over and over.
        pattern = bytes.fromhex("a43c76bc243ccdbc")
        file.write(pattern * (offset // len(pattern) + 1))
        file.truncate(8 + len(text) + offset)
    return out


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "growth":
        growth(sys.argv[2], sys.argv[3])
    elif len(sys.argv) > 2:
        table(sys.argv[1], sys.argv[2:])
    else:
        sys.exit("usage: see tests/bench.sh")
