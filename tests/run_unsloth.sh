#!/bin/bash
# Unsloth tests on a CPU, with the real library in an environment of its own.
#   tests/run_unsloth.sh [VENV] [pytest arguments]     default VENV: .venv-unsloth
# About 75 s to make the environment (2 GB, kept for the next run), about 3 minutes for the tests, two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:-.venv-unsloth}
shift || true
BASE="torch==2.13.0 transformers==5.17.0 trl==1.15.0 peft==0.21.2 accelerate==1.15.0 datasets==4.8.5 pillow psutil requests fastcore plotly tqdm typer nbdev pytest hypothesis"
UNSLOTH="unsloth==2026.10.9 unsloth_zoo==2026.10.9 bitsandbytes==0.50.2"  # --no-deps: triton, xformers and the like are not needed on a CPU
STAMP=$(echo "$BASE $UNSLOTH" | sha256sum | cut -c1-16)
if [ "$(cat "$VENV/stamp" 2>/dev/null)" != "$STAMP" ]; then
    ${PYTHON:-python3} -m venv "$VENV"
    # shellcheck disable=SC2086
    "$VENV/bin/pip" install -q $BASE
    # shellcheck disable=SC2086
    "$VENV/bin/pip" install -q --no-deps $UNSLOTH
    "$VENV/bin/pip" install -q --no-deps -e .
    echo "$STAMP" > "$VENV/stamp"
fi
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -q tests/test_unsloth.py tests/test_unsloth_widgets.py "$@"
