"""`pydiffusion devices`, and the options for device placement on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pydiffusion import devices
from pydiffusion.cli import main


@pytest.fixture
def model(gguf_file: Callable[..., Path]) -> str:
    return str(gguf_file("small", "f32", seed=0, dtype="f32"))


@pytest.mark.skipif(bool(devices()), reason="a GPU is here: a machine without one was NOT checked")
def test_without_a_gpu(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "-m", model]) == 0
    out = capsys.readouterr().out
    assert "no GPU" in out and "docs/gpu.md" in out and "cpu: all" in out
    assert main(["generate", "-m", model, "-p", "a", "--gpu-layers", "2", "--device", "CUDA0"]) == 2
    assert "CUDA0" in capsys.readouterr().err
    given = ["generate", "-m", model, "-p", "a", "--raw", "-n", "1", "--steps", "1", "--seed", "0"]
    assert main([*given, "--gpu-layers", "0"]) == 0
    expected = capsys.readouterr().out
    for layers in ("99", "all"):  # as commands for a GPU are passed on
        assert main([*given, "-ngl", layers]) == 0
        out, err = capsys.readouterr()
        assert out == expected and f"warning: --gpu-layers {layers}: no GPU" in err


def test_the_plan(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "-m", model, "--device", "host", "--ctx", "100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["device"] == "host" and plan["n_gpu_layers"] == plan["n_layer"] and plan["n_cpu_moe"] == 0
    needed = plan["weight_bytes"] + plan["cache_bytes"] + plan["step_bytes"]
    less = str(needed - 1)
    assert main(["devices", "-m", model, "--device", "host", "--ctx", "100", "--gpu-memory", less]) == 0
    out = capsys.readouterr().out
    assert "experts of 1 stay on the CPU" in out and "together" in out


def test_the_plan_of_several(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["devices", "-m", model, "--device", "host,host", "--ctx", "100"]
    assert main([*given, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    shares = plan["shares"]
    assert [share["device"] for share in shares] == ["host", "host"]
    assert sum(share["n_layers"] for share in shares) == plan["n_gpu_layers"] == plan["n_layer"]
    assert sum(share["weight_bytes"] for share in shares) == plan["weight_bytes"]
    assert main([*given, "--gpu-memory", "1G,2G"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("host, ") and "layers: weights" in line for line in lines[-2:]] == [True, True]
    assert main([*given, "--gpu-memory", "1G,2G,3G"]) == 2
    assert "3 limits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--gpu-layers", "many", "--gpu-layers is many"),
        ("--n-cpu-moe", "-1", "n_cpu_moe is -1"),
        ("--gpu-memory", "lots", "is not a size"),
        ("--device", "CUDA77", "no device 'CUDA77'"),
        ("--cache-type", "q2", "--cache-type is q2"),
    ],
)
def test_wrong_use(
    option: str, value: str, said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-m", model, "-p", "a", option, value]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "said"), [("host", "3 of 3 layers on host"), ("host,host", " of 3 layers, ")]
)
def test_generate_on_a_device(device: str, said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "-m", model, "-p", "a", "--raw", "--device", device, "--steps", "2", "-n", "8"]
    assert main([*given, "--ctx", "100", "--seed", "1"]) == 0
    assert said in capsys.readouterr().err


def test_bench_on_several_devices(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "--synthetic", "tiny", "--type", "q8_0", "--prompt", "20", "--steps", "2"]
    assert main([*given, "--device", "host,host", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["device"] == "host,host" and figures["step_seconds"] > 0 and not figures["parts"]


def test_bench_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "--synthetic", "tiny", "--type", "q8_0", "--prompt", "20", "--steps", "2"]
    assert main([*given, "--device", "host", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["device"] == "host" and figures["n_gpu_layers"] > 0
    assert {"self-conditioning", "attention", "experts", "head", "sampler"} <= set(figures["parts"])
    assert all(part["seconds"] > 0 for part in figures["parts"].values())
