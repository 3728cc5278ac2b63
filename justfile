# Developer commands, run in the activated environment (CONTRIBUTING.md). The gate of a change is .ci/run.
# just and not nox: nox makes an environment for each session, and each would compile the extension anew.

set shell := ["bash", "-euo", "pipefail", "-c"]

# list these commands
default:
    @just --list

# install the package editable, with debug symbols; what changed in native/ is compiled at the next import
setup:
    pip install --upgrade scikit-build-core nanobind cmake ninja
    pip install --no-build-isolation --editable '.[test,dev]' \
        --config-settings=build-dir=build/editable --config-settings=cmake.build-type=RelWithDebInfo \
        --config-settings=editable.rebuild=true --config-settings=editable.verbose=false

# the tests of every day; arguments go to pytest
test *arguments:
    pytest -q {{ arguments }}

# the tests that take more than a few seconds each
slow *arguments:
    pytest -q -m slow {{ arguments }}

# the live comparison with torch and transformers (the extra `reference`)
reference *arguments:
    PYDIFFUSION_REQUIRE_REFERENCE=1 pytest -q -m reference {{ arguments }}

# the C++ tests, or with asan or tsan the same under sanitizers
cpp preset="test":
    cmake --preset {{ preset }}
    cmake --build --preset {{ preset }}
    ctest --preset {{ preset }}

# style of Python and C++
lint:
    ruff check .
    ruff format --check .
    clang-format --dry-run --Werror $(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# put that style in place
format:
    ruff check --fix .
    ruff format .
    clang-format -i $(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# types; the package is laid out as it is installed, with convert/ in it
types:
    rm -rf build/types && mkdir -p build/types/pydiffusion
    ln -s "$PWD"/pydiffusion/* "$PWD"/convert build/types/pydiffusion/
    cd build/types && mypy --config-file ../../pyproject.toml -p pydiffusion

# regenerate what is generated: the options in docs/cli.md and the stub of the extension; then check the docs
docs:
    python docs/cli_reference.py
    cd docs && python -m nanobind.stubgen -m pydiffusion._native -o ../pydiffusion/_native.pyi # else -m finds the source
    pytest -q -k docs

# the gate, in an environment of its own
ci:
    bash .ci/run
