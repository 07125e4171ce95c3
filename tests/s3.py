#!/usr/bin/env python3
"""Storage, checkpoints and shared reference values against an S3 server that is not ours: moto, in memory, on loopback.

    pip install 'moto[server]' && tests/s3.py

Asks the server what every store promises (conditions, uploads of several parts, races), shares and merges reference segments
there, and puts a checkpoint through the commands of `checkpoint` (not export) by URL, comparing with the same on a disk. Builds with
`--features object-store` what it runs. A job's workers are not part of it: they need the ML stack. Exits with 1 at the first thing
that is not as on a disk. moto knows `If-None-Match` and `If-Match` of puts from version 5.1 on.
"""
import json, logging, os, shutil, subprocess, sys, tempfile, urllib.request
from pathlib import Path

from moto.server import ThreadedMotoServer

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


def main():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"))
    env = {
        **os.environ,
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    scratch = Path(tempfile.mkdtemp(prefix="caldpo-s3-"))
    try:
        cargo("build", "--release", "-p", "checkpoint", "--features", "object-store")
        cargo("build", "--release", "-p", "coordinator", "--no-default-features", "--features", "object-store")
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
    finally:
        shutil.rmtree(scratch)
        server.stop()
    print("all as on a disk")


if __name__ == "__main__":
    main()
