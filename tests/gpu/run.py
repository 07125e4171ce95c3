"""The checks and timings of tests/gpu.sh, which says what they are and what they need."""
import json, os, signal, socket, subprocess, sys, tempfile, time

BIN = os.path.abspath(os.environ["GPU_BIN"])
OUT = os.path.abspath(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-"))
TOKENIZER = os.environ.get("TOKENIZER", "../shared/models/smollm2-135m-instruct")
PAIRS = os.environ.get("PAIRS", "../shared/data/chat-preferences-1024.jsonl")
SHORT = os.path.abspath(os.environ.get("SHORT", "../shared/data/instruction-preferences.jsonl"))
PEER = os.environ.get("PEER", "../shared/tools/peer_dpo.py")
# A simulated device (tests/gpu/simulated) needs more time for fewer steps.
PATIENCE = float(os.environ.get("PATIENCE", "1"))
JOB_STEPS = int(os.environ.get("JOB_STEPS", "60"))
TOKENS = [int(tokens) for tokens in os.environ.get("TOKENS", "8192 16384").split()]
os.makedirs(OUT, exist_ok=True)
SCRATCH = tempfile.mkdtemp(prefix="gpu-")
START = time.time()
ROWS, FAILED, LATER = [], [], []


def say(*words):
    print(f"[{time.time() - START:4.0f} s]", *words, flush=True)


def row(what, result, note=""):
    ROWS.append((what, result, note))
    say(what, "|", result, "|", note)


def run(name, command, limit, **environment):
    """Runs a program; its output goes to a file and is returned with its exit status."""
    limit *= PATIENCE
    log = os.path.join(OUT, name + ".txt")
    with open(log, "w") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env={**os.environ, **environment}).returncode
        except subprocess.TimeoutExpired:
            status = f"no end within {limit} s"
        except OSError as error:
            status = str(error)
    return status, open(log).read()


def test(what, program, arguments, limit, **environment):
    status, output = run(what.replace(" ", "-").replace(",", ""), [os.path.join(BIN, program), *arguments], limit, **environment)
    results = [line for line in output.splitlines() if line.startswith("test result")]
    if status != 0:
        FAILED.append(what)
    row(what, "passed" if status == 0 else f"FAILED ({status})", results[-1][13:].split(";")[0:2] if results else output[-300:])


def kernels():
    test("fused kernels against the host", "kernels_cuda", ["--ignored", "--test-threads=1", "--nocapture"], 120)


def goldens():
    for dtype in ("f32", "bf16"):
        test(f"transformers goldens, {dtype}", "model_golden", ["--test-threads=1", "--nocapture"], 90, CALDPO_TEST_DEVICE="cuda", CALDPO_TEST_DTYPE=dtype)


def nccl():
    arguments = ["--ignored", "--test-threads=1", "--nocapture"]
    test("NCCL, world of one", "collective_nccl", [*arguments, "--skip", "process"], 90)
    test("NCCL, ranks on one GPU", "collective_nccl", [*arguments, "process"], 120)


# Weights that are never trained, of which a GPU has operands alone.
FROZEN = {"under an adapter": {"adapter.kind": "lora", "adapter.rank": 8}, "with a reference of its own": {"model.reference": "configs/quickstart/reference"}}


def agree():
    """60 steps of DPO on the quickstart's letters, on the CPU and on the GPU, in f32 and bf16; in bf16 also under an adapter, and with a
    reference of its own that has the policy's first weights.

    A model this small is moved far by rounding alone: the CPU's own bf16 is the yardstick of the GPU's.
    """
    runs = {}
    kinds = [(backend, dtype) for backend in ("cpu", "cuda") for dtype in ("f32", "bf16", *FROZEN)]
    for backend, kind in kinds:
        dtype = "bf16" if kind in FROZEN else kind
        output = os.path.join(SCRATCH, f"{backend}-{kind.replace(' ', '-')}")
        settings = {"cluster.backend": backend, "model.dtype": dtype, "job.output": output, "train.steps": 60, "cluster.workers": 1,
                    "reference.store": os.path.join(SCRATCH, "references"), **FROZEN.get(kind, {})}
        command = [os.path.join(BIN, "coordinator"), "--config", "configs/quickstart-dpo.toml"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        status, log = run(f"agree-{backend}-{kind.replace(' ', '-')}", command, 120)
        if status != 0:
            FAILED.append("agree")
            return row(f"60 steps, {backend} {kind}", f"FAILED ({status})", log[-300:])
        runs[backend, kind] = [json.loads(line) for line in open(os.path.join(output, "metrics.jsonl"))]
    names = ("log_ratios/chosen", "log_ratios/rejected")
    exact = runs["cpu", "f32"]

    def means(key):
        return [(a[name], b[name]) for a, b in zip(exact, runs[key]) for name in names if abs(a[name]) >= 10]

    def farthest(key):
        return max((abs(a - b) / abs(a) for a, b in means(key)), default=0.0)

    yardstick = {"f32": 0.05, "bf16": max(0.05, 1.5 * farthest(("cpu", "bf16")))}
    for key in (("cuda", "f32"), ("cuda", "bf16")):
        first = max(abs(runs[key][0][name]) for name in names)
        pairs, worst = means(key), farthest(key)
        good = first == 0.0 and pairs and worst <= yardstick[key[1]]
        if not good:
            FAILED.append("agree")
        row(f"60 steps against the CPU's f32, {key[1]}", "passed" if good else "FAILED",
            f"first step's log-ratios {first:g}; the {len(pairs)} means of at least 10 nats differ by {100 * worst:.2f} % at most, {100 * yardstick[key[1]]:.1f} % allowed")
    for kind in FROZEN:
        host, card = runs["cpu", kind], runs["cuda", kind]
        first = max(abs(rows[0][name]) for rows in (host, card) for name in names)
        size = max(abs(host[-1][name]) for name in names)
        worst = max(abs(a[name] - b[name]) for a, b in zip(host, card) for name in names) / size
        good = first == 0.0 and size >= 10 and worst <= yardstick["bf16"]
        if not good:
            FAILED.append("agree")
        row(f"60 steps in bf16 {kind}", "passed" if good else "FAILED",
            f"first step's log-ratios {first:g}; means differ from the CPU's bf16 by {100 * worst:.2f} % of {size:.0f} nats at most")


def larger():
    """60 steps of DPO with MODEL, or a model of SmolLM2's shape and random weights, which moves less: bf16 on the GPU against f32 on the
    CPU, which takes minutes and runs beside the other parts."""
    least, rate = (10, 3e-5) if "MODEL" in os.environ else (5, 1e-4)
    model = os.environ.get("MODEL") or random_model("smollm2-135m-agree", "--like")
    runs = {}
    for backend, dtype in (("cpu", "f32"), ("cuda", "f32"), ("cuda", "bf16")):
        output = os.path.join(SCRATCH, f"larger-{backend}-{dtype}")
        settings = {"cluster.backend": backend, "model.dtype": dtype, "job.output": output, "cluster.workers": 1, "model.path": model, "data.train": json.dumps([SHORT]),
                    "data.eval": "[]", "evaluate.every_steps": 60, "checkpoint.every_steps": 0, "data.max_length": 192, "objective.beta": 0.1, "train.steps": 60,
                    "train.batch_pairs": 8, "optimizer.learning_rate": rate, "reference.store": os.path.join(SCRATCH, "references-larger")}
        command = [os.path.join(BIN, "coordinator"), "--config", "configs/quickstart-dpo.toml"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        log = open(os.path.join(OUT, f"larger-{backend}-{dtype}.txt"), "w")
        runs[backend, dtype] = (output, log, subprocess.Popen(command, stdout=log, stderr=log))
        if backend == "cuda":
            runs[backend, dtype][2].wait(timeout=120 * PATIENCE)

    def finish():
        rows = {}
        for key, (output, log, process) in runs.items():
            try:
                status = process.wait(timeout=240 * PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                status = "no end in time"
            if status != 0:
                FAILED.append("larger")
                return row(f"60 steps of {os.path.basename(model)}, {' '.join(key)}", f"FAILED ({status})", open(log.name).read()[-300:])
            rows[key] = [json.loads(line) for line in open(os.path.join(output, "metrics.jsonl"))]
        names = ("log_ratios/chosen", "log_ratios/rejected")
        for key in (("cuda", "f32"), ("cuda", "bf16")):
            means = [(a[name], b[name]) for a, b in zip(rows["cpu", "f32"], rows[key]) for name in names if abs(a[name]) >= least]
            worst = max((abs(a - b) / abs(a) for a, b in means), default=1.0)
            first = max(abs(rows[key][0][name]) for name in names)
            good = first == 0.0 and means and worst <= 0.05
            if not good:
                FAILED.append("larger")
            row(f"60 steps of {os.path.basename(model)}, {key[1]}, against the CPU's f32", "passed" if good else "FAILED",
                f"first step's log-ratios {first:g}; the {len(means)} means of at least {least} nats differ by {100 * worst:.2f} % at most")

    LATER.append(finish)


def wait_for(address, limit):
    """Until somebody listens there."""
    host, port = address.split(":")
    end = time.time() + limit * PATIENCE
    while time.time() < end:
        try:
            return socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nobody listens on {address}")


class Service:
    """A coordinator and two workers, a and b, that share the card.

    NCCL before 2.30 refuses two ranks on one GPU of one host, so each is told a host of its own, and they talk over sockets.
    """

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.listen = "127.0.0.1:%d" % probe.getsockname()[1]
        self.program = os.path.join(BIN, "coordinator")
        self.processes = {}
        self.start()

    def start(self):
        """Whatever does not run."""
        state = os.path.join(SCRATCH, "service")
        self._process("coordinator", "--cluster", "--set", f"cluster.listen={self.listen}", "--set", f"cluster.state={state}")
        wait_for(self.listen, 30)
        for name in "ab":
            self._process(name, "worker", "--coordinator", f"http://{self.listen}", "--name", name, "--backend", "cuda", "--collective", "nccl")

    def _process(self, name, *arguments):
        if name in self.processes and self.processes[name].poll() is None:
            return
        exact = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "NCCL_NVLS_ENABLE": "0", "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
        log = open(os.path.join(OUT, f"job-{name}.txt"), "a")
        self.processes[name] = subprocess.Popen([self.program, *arguments], stdout=log, stderr=log, env={**os.environ, **exact, "NCCL_HOSTID": name})

    def kill(self, *names):
        for name in names or list(self.processes):
            self.processes[name].kill()
            self.processes[name].wait()

    def submit(self, name, workers, *settings):
        """The output folder and the command that submits this job, or goes on to follow it, to its end."""
        output = os.path.join(SCRATCH, "job-" + name)
        command = [self.program, "submit", "configs/quickstart-dpo.toml", "--coordinator", f"http://{self.listen}", "--watch", "--key", name]
        for setting in (f"job.name={name}", f"job.output={output}", f"train.steps={JOB_STEPS}", f"cluster.workers={workers}", "cluster.min_workers=1",
                        f"reference.store={os.path.join(SCRATCH, 'references')}", *settings):
            command += ["--set", setting]
        return output, command

    def result(self, name, workers, *settings):
        """The rows of a whole job."""
        output, command = self.submit(name, workers, *settings)
        status, log = run("job-" + name, command, 120)
        if status != 0:
            raise RuntimeError(f"{name}: {status}: {log[-300:]}")
        return rows(output)

    def begin(self, name, workers, first, *settings):
        """A job that has at least `first` rows: its output folder, and how many there are."""
        output, command = self.submit(name, workers, *settings)
        follow = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        count = wait_for_rows(output, first)
        follow.kill()
        follow.wait()
        return output, count


def rows(output):
    """The whole rows of a run so far."""
    try:
        return [json.loads(line) for line in open(os.path.join(output, "metrics.jsonl")) if line.endswith("\n")]
    except OSError:
        return []


def exported(output):
    """The exported weights of a run, and of an adapter's also the adapter."""
    files = [os.path.join(output, *name) for name in (("export", "model.safetensors"), ("adapter", "adapter_model.safetensors"))]
    return [open(file, "rb").read() for file in files if os.path.exists(file)]


def wait_for_rows(output, count):
    """Until a run has so many rows; how many it has then."""
    end = time.time() + 60 * PATIENCE
    while len(rows(output)) < count:
        if time.time() > end:
            raise RuntimeError(f"{output}: {len(rows(output))} rows and no more")
        time.sleep(0.02)
    return len(rows(output))


def job():
    """Two workers that share the card and reduce over NCCL, against one worker alone: the same losses up to the order of sums, and the same
    bits twice, also when everything is killed on the way and started again; and jobs that lose a worker to kill -9 and to SIGSTOP."""
    keys = ("loss", "log_ratios/chosen", "log_ratios/rejected", "grad_norm")

    def pairs(one, other):
        return [(a[key], b[key]) for a, b in zip(one, other) for key in keys if key in a]

    def compare(what, alone, two, again):
        differ = max((abs(a - b) / max(abs(a), 1.0) for a, b in pairs(alone, two)), default=1.0)
        same = len(again) == JOB_STEPS and all(a == b for a, b in pairs(two, again))
        good = differ <= 0.02 and same and len(two) == JOB_STEPS
        if not good:
            FAILED.append("job")
        row(what, "passed" if good else "FAILED", f"{len(alone)} steps differ from one worker's by {100 * differ:.3f} % at most; the same bits twice: {same}")

    service = Service()
    try:
        alone, two, again = service.result("alone", 1, "cluster.max_workers=1"), service.result("two", 2), service.result("again", 2)
        compare("job of 2 workers over NCCL, f32", alone, two, again)
        # f32 masters in shards, gradients too, and both on the host: the first steps of one worker's bf16.
        alone = service.result("bf16-alone", 1, "cluster.max_workers=1", "model.dtype=bf16")
        offload = ["model.dtype=bf16", "cluster.zero=2", "cluster.offload=true"]
        for name, settings in (("bf16", offload[:1]), ("bf16-zero2", offload[:2]), ("bf16-offload", offload)):
            two, again = (service.result(name + turn, 2, *settings) for turn in ("", "-again"))
            compare(f"job of 2 workers over NCCL, {name}", alone[:10], two, again)
        for name, settings in (("bf16-zero2", offload[:2]), ("bf16-offload", offload), ("bf16-lora", [offload[0], "adapter.kind=lora", "adapter.rank=8"])):
            first = os.path.join(SCRATCH, "job-" + name)
            whole = rows(first) or service.result(name, 2, *settings)
            settings = [*settings, f"checkpoint.every_steps={max(1, JOB_STEPS // 6)}"]
            output, _ = service.begin(name + "-restarted", 2, JOB_STEPS // 3, *settings)
            service.kill()
            before = len(rows(output))
            service.start()
            found = service.result(name + "-restarted", 2, *settings)
            same = pairs(whole, found) and all(a == b for a, b in pairs(whole, found)) and exported(first) and exported(first) == exported(output)
            good = before < len(found) == JOB_STEPS and bool(same)
            if not good:
                FAILED.append("job")
            row(f"all killed (-9) and started again, {name}", "passed" if good else "FAILED", f"{before} rows before, {len(found)} in the end; the same rows and exported bits as without: {bool(same)}")
        for what, number in (("killed (-9)", signal.SIGKILL), ("stopped (SIGSTOP)", signal.SIGSTOP)):
            total, name = JOB_STEPS * 20 // 3, "lost-" + number.name
            settings = [*offload[:2], f"train.steps={total}"]
            output, before = service.begin(name, 2, JOB_STEPS * 2 // 3, *settings)
            service.processes["b"].send_signal(number)
            lost = time.time()
            wait_for_rows(output, before + 3)
            recovered = time.time() - lost
            service.kill("b")
            service.start()
            steps = [line["step"] for line in service.result(name, 2, *settings)]
            good = steps == list(range(1, total + 1))
            if not good:
                FAILED.append("job")
            row(f"one of 2 workers {what}, bf16-zero2", "passed" if good else "FAILED", f"{before} steps before, three more rows {recovered:.2f} s after; {len(steps)} rows")
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        FAILED.append("job")
        row("job of 2 workers over NCCL", "FAILED", str(error)[-300:])
    finally:
        service.kill()


def random_model(name, *arguments):
    path = os.path.join(SCRATCH, name)
    status, log = run("make-" + name, [sys.executable, "tests/gpu/random_model.py", TOKENIZER, path, *arguments], 180)
    if status != 0:
        raise SystemExit(f"make {name}: {log[-500:]}")
    return path


def conversations(path):
    """The pairs with their shared turns as the prompt, which is what the peer reads."""
    out = os.path.join(SCRATCH, "pairs.jsonl")
    with open(out, "w") as file:
        for line in open(path):
            row = json.loads(line)
            if isinstance(row["chosen"], list) and not isinstance(row["prompt"], list):
                shared = 0
                while shared < min(len(row["chosen"]), len(row["rejected"])) - 1 and row["chosen"][shared] == row["rejected"][shared]:
                    shared += 1
                row = dict(prompt=row["chosen"][:shared], chosen=row["chosen"][shared:], rejected=row["rejected"][shared:])
            file.write(json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected")}) + "\n")
    return out


def bench(model, micro, *arguments):
    command = [os.path.join(BIN, "coordinator"), "worker", "bench", "--model", model, "--data", os.path.join(SCRATCH, "pairs.jsonl"), "--batch-pairs", "64",
               "--micro-batch-tokens", str(micro), "--steps", "2", "--warmup", "1", "--max-length", "1024", "--dtype", "bf16", "--backend", "cuda", "--profile", *arguments]
    status, log = run(f"bench-{os.path.basename(model)}-{micro}", command, 180)
    lines = [line for line in log.splitlines() if line.startswith("{")]
    if status != 0 or not lines:
        FAILED.append("speed")
        row(f"{os.path.basename(model)}, {micro} tokens at once", f"FAILED ({status})", log[-300:])
        return None
    result = json.loads(lines[-1])
    profile = result["profile"]
    device = profile.pop("device", [])
    busy = sum(work["seconds"] for work in device)
    row(f"{os.path.basename(model)}, bf16, {micro} tokens at once", f"{result['pairs_per_second']:.1f} pairs/s",
        f"{result['tokens_per_second']:.0f} tokens/s, {result['seconds_per_step']:.3f} s a step, {profile['needed_gflop'] / 1e3 / result['seconds_per_step']:.0f} TFLOP/s needed, {result['peak_memory_gib']:.1f} GiB")
    print("   phases:", {key: round(value, 4) for key, value in profile["seconds"].items() if value > 0}, flush=True)
    for work in device[:16]:
        rate = f"{work['tflop_per_second']:.0f} TFLOP/s" if "tflop_per_second" in work else ""
        print(f"   {work['name']:28} {work['launches']:5} {1e3 * work['seconds']:8.2f} ms {100 * work['seconds'] / busy:5.1f} %  {rate}")
    print(f"   all launches {sum(work['launches'] for work in device)}, {1e3 * busy:.1f} ms, one step", flush=True)
    return result


def peer(model, micro):
    command = [sys.executable, PEER, "--model", model, "--data", os.path.join(SCRATCH, "pairs.jsonl"), "--steps", "2", "--warmup", "1", "--batch-pairs", "64",
               "--micro-pairs", str(micro), "--dtype", "bf16", "--device", "cuda"]
    status, log = run(f"peer-{os.path.basename(model)}-{micro}", command, 240)
    lines = [line for line in log.splitlines() if line.startswith('{"peer"')]
    if status != 0 or not lines:
        row(f"TRL, {os.path.basename(model)}, {micro} pairs at once", f"no result ({status})", log.strip().splitlines()[-1][:200] if log.strip() else "")
        return None
    result = json.loads(lines[-1])
    row(f"TRL, {os.path.basename(model)}, bf16, {micro} pairs at once", f"{result['pairs_per_second']:.1f} pairs/s",
        f"{result['tokens_per_second']:.0f} tokens/s, {result['peak_memory_gib']:.1f} GiB; {result['peer']}")
    return result


def speed():
    conversations(PAIRS)
    models = [(os.environ.get("MODEL") or random_model("smollm2-135m-random", "--like"), TOKENS), (random_model("llama-1.2b-random"), TOKENS)]
    for model, tokens in models:
        own = [result for result in (bench(model, micro) for micro in tokens) if result]
        peers = [result for result in (peer(model, micro) for micro in os.environ.get("PEER_MICRO", "8 32").split()) if result]
        if own and peers:
            best = lambda results: max(results, key=lambda result: result["pairs_per_second"])
            a, b = best(own), best(peers)
            row(f"{os.path.basename(model)} beside TRL", f"{a['pairs_per_second'] / b['pairs_per_second']:.2f} × pairs/s", f"memory {a['peak_memory_gib'] / b['peak_memory_gib']:.2f} of TRL's")
    # A model of 3.2e9 parameters trained whole on one card.
    if os.environ.get("LARGE", "1") == "1":
        large = random_model("llama-3b-random", "--hidden", "3072", "--layers", "28", "--heads", "24", "--kv-heads", "8", "--intermediate", "8192")
        bench(large, 4096, "--gradient-checkpointing")


def probe():
    status, output = run("probe", [os.path.join(BIN, "gpu_probe"), "all"], 180)
    row("probe", "done" if status == 0 else f"ended with {status}", "see probe.txt")
    print(output)


PARTS = dict(kernels=kernels, goldens=goldens, nccl=nccl, agree=agree, larger=larger, job=job, speed=speed, probe=probe)
wanted = sys.argv[1:] or ["larger", "kernels", "goldens", "nccl", "agree", "job", "speed"]
for name in wanted:
    if name not in PARTS:
        raise SystemExit(f"{name} is none of {', '.join(PARTS)}")
status, facts = run("device", ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], 30)
say(facts.strip())
for name in wanted:
    PARTS[name]()
for finish in LATER:
    finish()
print("\n| what | result | |\n|---|---|---|")
for what, result, note in ROWS:
    print(f"| {what} | {result} | {note if isinstance(note, str) else ';'.join(note)} |")
sys.exit(1 if FAILED else 0)
