#!/usr/bin/env python3
"""Storage, checkpoints and shared reference values against an S3 server that is not ours: moto, in memory, on loopback.

    pip install 'moto[server]' && tests/s3.py [--jobs]

Asks the server what every store promises (conditions, uploads of several parts, races), shares and merges reference segments
there, and puts a checkpoint through the commands of `checkpoint` (not export) by URL, comparing with the same on a disk. With `--jobs`
it also trains: a whole job with checkpoints and reference values there, one whose processes are all killed on the way, one whose
server does not answer for a while, and one whose server is gone. Builds with `--features object-store` what it runs, and with `--jobs`
the ML stack, too. Exits with 1 at the first thing that is not as on a disk. moto knows `If-None-Match` and `If-Match` of puts from
version 5.1 on.
"""
import json, os, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
GOLDEN = ROOT / "crates/checkpoint/tests/golden/version-1"
BUCKET, SECRET = "caldpo-test", "wJalrXUtnFEMIsecret"


def run(*command, code=0, env=None):
    """Runs a command in the repository; gives its standard output."""
    print("+", *command, flush=True)
    done = subprocess.run([str(it) for it in command], cwd=ROOT, env=env, capture_output=True, text=True)
    told = done.stdout + done.stderr
    if done.returncode != code:
        sys.exit(f"it ended with {done.returncode} and not with {code}:\n{told}")
    if SECRET in told:
        sys.exit(f"it tells the secret:\n{told}")
    return done.stdout


def cargo(*arguments, env=None):
    return run("cargo", *arguments, env=env)


def server_tests(env, package, name, test):
    told = cargo("test", "--release", "-p", package, "--features", "object-store", "--test", name, "--", "--ignored", "--exact", test, env=env)
    if "1 passed" not in told:
        sys.exit(f"there is no test {test}:\n{told}")


def check_cache(env, url):
    gc = [TARGET / "coordinator", "cache", "gc", url]
    would = json.loads(run(*gc, "--dry-run", "--json", env=env))["scopes"]
    assert [scope["segments"] for scope in would] == [4], would
    done = json.loads(run(*gc, "--json", env=env))
    assert [scope["action"] for scope in done["scopes"]] == ["merged"] and done["bytes_freed"] > 0, done
    again = json.loads(run(*gc, "--json", env=env))["scopes"]
    assert [(scope["action"], scope["segments"]) for scope in again] == [("kept", 1)], again
    run(*gc, "--older-than", "1", code=2, env=env)


def check_checkpoint(env, url, scratch):
    def program(*arguments, code=0):
        return run(TARGET / "checkpoint", *arguments, code=code, env=env)

    def both(*arguments):
        """The same of the disk and of the server."""
        told = [program(*(it.format(at=at) for it in arguments)) for at in (disk, url)]
        told = [text.replace(str(disk), "AT").replace(url, "AT") for text in told]
        assert told[0] == told[1], told
        return told[0]

    disk = scratch / "disk"
    program("verify", url, code=2)
    for at in (disk, url):
        program("reshard", GOLDEN, "--world", "3", "--out", at)
    step = "{at}/step-00000020"
    both("inspect", "{at}", "--json")
    both("verify", "{at}")
    program("diff", "--exit-code", GOLDEN, url)
    for at in (disk, url):
        program("reshard", f"{at}/step-00000020", "--world", "2", "--in-place")
    program("diff", "--exit-code", disk, url)
    program("diff", "--exit-code", GOLDEN, url)
    both("pin", step, "--note", "kept")
    both("gc", "{at}", "--keep-last", "1")
    both("unpin", step)
    both("gc", "{at}", "--keep-last", "1", "--dry-run")


class Server:
    """moto in a process of its own, which can be stopped and killed."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.endpoint = f"http://127.0.0.1:{port}"
        bucket = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        for patience in range(100):
            try:
                return urllib.request.urlopen(bucket).close()
            except OSError:
                time.sleep(0.1)
        sys.exit("moto does not answer")

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        self.process.kill()
        self.process.wait()


def check_jobs(env, server, scratch):
    """Jobs of the quickstart: the same model comes of them, wherever checkpoints and reference values are."""

    def begin(name, checkpoints, *sets):
        sets = [f"job.output={scratch / name}", f"reference.store={scratch / name}-store", f"checkpoint.path={checkpoints}", *sets]
        command = [TARGET / "coordinator", "configs/quickstart.toml", *(part for text in sets for part in ("--set", text))]
        print("+", *command, flush=True)
        log = open(scratch / f"{name}.log", "ab")
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def end(name, process, code=0):
        found, told = process.wait(timeout=300), (scratch / f"{name}.log").read_text()
        if found != code:
            sys.exit(f"{name} ended with {found} and not with {code}:\n{told}")
        assert SECRET not in told, name
        return told

    def job(name, checkpoints, *sets, code=0):
        return end(name, begin(name, checkpoints, *sets), code)

    def events(name):
        lines = (scratch / name / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def saved(name, process, count):
        """Waits until so many checkpoints are there."""
        while process.poll() is None:
            if (scratch / name / "events.jsonl").exists() and sum(it["kind"] == "checkpoint" for it in events(name)) >= count:
                return
            time.sleep(0.01)
        end(name, process, None)

    def same(name):
        one, other = ((scratch / it / "export/model.safetensors").read_bytes() for it in ("disk", name))
        assert one == other, f"{name}: another model"

    at = lambda name: f"s3://{BUCKET}/jobs/{name}/checkpoints"
    job("disk", scratch / "disk/checkpoints")
    shared = f"reference.shared=s3://{BUCKET}/jobs/reference"
    for name, computed in (("first", True), ("second", False)):
        job(name, at(name), shared)
        same(name)
        ready = [it["text"] for it in events(name) if it["kind"] == "ready"]
        assert all((", 0 computed" not in text) == computed for text in ready), ready

    often = "checkpoint.every_steps=5"
    process = begin("killed", at("killed"), often)
    saved("killed", process, 6)
    # The coordinator leads a group of its own, in which its workers are.
    os.killpg(process.pid, signal.SIGKILL)
    end("killed", process, -9)
    job("killed", at("killed"), often)
    same("killed")

    process = begin("silent", at("silent"), often)
    saved("silent", process, 4)
    server.signal(signal.SIGSTOP)
    time.sleep(8)
    server.signal(signal.SIGCONT)
    end("silent", process)
    same("silent")

    process = begin("gone", at("gone"), often)
    saved("gone", process, 4)
    server.stop()
    told = end("gone", process, 1)
    assert "quickstart failed" in told and "5 checkpoints in a row (checkpoint.failures_max) could not be written" in told, told


def main():
    jobs = sys.argv[1:] == ["--jobs"]
    if sys.argv[1:] and not jobs:
        sys.exit(__doc__)
    server = Server()
    env = {
        **os.environ,
        "AWS_ENDPOINT": server.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    scratch = Path(tempfile.mkdtemp(prefix="caldpo-s3-"))
    try:
        cargo("build", "--release", "-p", "checkpoint", "--features", "object-store")
        cargo("build", "--release", "-p", "coordinator", "--features", "object-store", *([] if jobs else ["--no-default-features"]))
        url = f"s3://{BUCKET}/storage"
        server_tests(
            {**env, "STORAGE_TEST_URL": url}, "storage", "object_store",
            "a_server_of_the_environment_keeps_what_every_store_promises",
        )
        url = f"s3://{BUCKET}/runs/reference"
        server_tests(
            {**env, "REFCACHE_TEST_URL": url}, "refcache", "compacting",
            "all_segments_become_one_on_a_server_of_the_environment",
        )
        check_cache(env, url)
        check_checkpoint(env, f"s3://{BUCKET}/runs/1/checkpoints", scratch)
        if jobs:
            check_jobs(env, server, scratch)
    finally:
        shutil.rmtree(scratch)
        server.stop()
    print("all as on a disk")


if __name__ == "__main__":
    main()
