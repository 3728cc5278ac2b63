#!/usr/bin/env bash
# Tests and benchmarks on a GPU: see scripts/gpu_run.py --help and docs/gpu.md.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
