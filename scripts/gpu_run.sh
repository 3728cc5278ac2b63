#!/usr/bin/env bash
# Checks and measures a GPU: see scripts/gpu_run.py --help and docs/gpu.md.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
