#!/usr/bin/env bash
# Builds a kit for a GPU machine on a machine without a GPU: static libraries of native/ and of ggml with its CUDA
# backend, with headers and Python wheels, so that only the bindings are compiled there (docs/gpu.md).
#
#   scripts/gpu_prepare.sh [--kit DIR] [--architectures 90a-real] [--python python3.12]
#
# DIR/bundle is the kit to copy; DIR/machine is an environment for `gpu_run.sh --dry-run`. A second call reuses
# what is unchanged. Needs nvcc, a C++ compiler, Python 3.10 or newer and network access; no GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kit=$root/build/gpu-kit
architectures=90a-real
other_python=python3.12
fail() { echo "gpu_prepare: $*" >&2; exit 1; }
say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
while [ $# -gt 0 ]; do
    case $1 in
        --kit) kit=${2:?}; shift 2 ;;
        --architectures) architectures=${2:?}; shift 2 ;;
        --python) other_python=${2:?}; shift 2 ;;
        -h | --help) sed -n '2,9s/^# \?//p' "$0"; exit 0 ;;
        *) fail "unknown argument $1 (see --help)" ;;
    esac
done
mkdir -p "$kit"
kit=$(cd "$kit" && pwd)

# Lock the kit: two runs would write the same files.
exec 9>"$kit/.lock"
! command -v flock >/dev/null || flock -n 9 || fail "another gpu_prepare.sh is using $kit: wait for it, or choose another --kit"

nvcc=${CUDACXX:-$(command -v nvcc || true)}
[ -n "$nvcc" ] || [ ! -x /usr/local/cuda/bin/nvcc ] || nvcc=/usr/local/cuda/bin/nvcc
"${nvcc:-nvcc}" --version >/dev/null 2>&1 ||
    fail "no nvcc (${nvcc:-none on the PATH}): install the CUDA toolkit 13, or name its nvcc in CUDACXX"
version=$("$nvcc" --version | sed -n 's/.*release [0-9.]*, V\([0-9.]*\)/\1/p')
release=${version%%.*}
[ "$release" = 13 ] || fail "$nvcc is from CUDA ${release:-unknown}, but the linked cuBLAS needs CUDA 13: install CUDA toolkit 13"

# Build tools and cuBLAS, in the kit's own environment.
tools="nvidia-cublas==13.0.2.14 nanobind==3.1.0 cmake<4 ninja"
if [ "$(cat "$kit/venv/tools" 2>/dev/null)" != "$tools" ]; then
    say "installing $tools"
    rm -rf "$kit/venv"
    python3 -m venv "$kit/venv"
    # shellcheck disable=SC2086
    "$kit/venv/bin/pip" install --quiet --disable-pip-version-check $tools ||
        fail "pip could not install $tools: see above"
    echo "$tools" >"$kit/venv/tools"
fi
python=$kit/venv/bin/python
export PATH="$kit/venv/bin:$PATH"

flags="-DCMAKE_BUILD_TYPE=Release -DPYDIFFUSION_CUDA=ON -DPYDIFFUSION_PORTABLE=ON -DCMAKE_CUDA_ARCHITECTURES=$architectures"
made_with="$flags, nvcc $version, $tools"
key=$("$python" "$root/scripts/prebuilt.py" key --flags="$made_with")
if [ -f "$kit/bundle/manifest.json" ] && grep -q "\"build\": \"$key\"" "$kit/bundle/manifest.json"; then
    say "libraries are unchanged ($key)"
else
    say "configuring for $architectures with $nvcc"
    # shellcheck disable=SC2086
    CUDACXX=$nvcc cmake -S "$root" -B "$kit/tree" -G Ninja -DPython_EXECUTABLE="$python" $flags >"$kit/build.log" 2>&1 ||
        { tail -30 "$kit/build.log" >&2; fail "cmake failed: $kit/build.log"; }
    say "building (about 17 minutes on two cores; log: $kit/build.log)"
    ninja -C "$kit/tree" pydiffusion_native ggml ggml-cuda ggml-cpu ggml-base >>"$kit/build.log" 2>&1 ||
        { tail -30 "$kit/build.log" >&2; fail "the build failed: $kit/build.log"; }
    say "packing"
    "$python" "$root/scripts/prebuilt.py" pack "$kit/tree" "$kit/bundle" --flags="$made_with" --key "$key"
fi

# Wheels for any Python version that a machine with PyTorch and CUDA may lack.
pure="gguf==0.19.0 nanobind==3.1.0 scikit-build-core==1.1.2 pathspec==1.1.1"
if [ "$(cat "$kit/bundle/wheels/list" 2>/dev/null)" != "$pure" ]; then
    say "wheels: $pure"
    rm -rf "$kit/bundle/wheels"
    # shellcheck disable=SC2086
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --dest "$kit/bundle/wheels" $pure || fail "pip could not download $pure: see above"
    echo "$pure" >"$kit/bundle/wheels/list"
fi

# An environment that simulates the GPU machine in a dry run: another minor version of Python, no network.
machine="numpy safetensors tokenizers huggingface_hub jinja2 typer rich pytest pytest-xdist hypothesis pyyaml tqdm
    cmake<4 ninja packaging nvidia-cublas==13.0.2.14 nvidia-cuda-runtime==13.0.96"
found=
for one in "$other_python" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$other_python"; do
    if [ -z "$found" ] && "$one" --version >/dev/null 2>&1; then found=$one; fi
done
if [ -z "$found" ]; then
    say "no $other_python found: dry runs need it, or another interpreter given by --python"
elif [ "$(cat "$kit/machine/list" 2>/dev/null)" != "$machine" ]; then
    say "creating an environment with $other_python for dry runs"
    rm -rf "$kit/machine"
    "$found" -m venv "$kit/machine"
    # shellcheck disable=SC2086
    "$kit/machine/bin/pip" install --quiet --disable-pip-version-check $machine ||
        fail "pip could not install the packages for dry runs: see above"
    echo "$machine" >"$kit/machine/list"
fi

bundle=$(du -sb "$kit/bundle" | cut -f1)
files=$(cd "$root" && git ls-files -z | xargs -0 du -cb 2>/dev/null | tail -1 | cut -f1)
say "$(awk -v b="$bundle" -v f="$files" 'BEGIN { printf "bundle of %.1f MB, tree of %.1f MB: ", b / 1e6, f / 1e6 }')$kit/bundle"
[ "$bundle" -le 48000000 ] || say "the bundle is larger than the target of 48 MB: choose fewer architectures"
