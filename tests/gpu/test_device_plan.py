"""Device plans: weights, cache and buffers on one device or several, and the part that stays on the CPU."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import case, denoise_case, encode_case, load_golden

from pydiffusion import DiffusionModel, Plan, _native, device_plan, devices, plan
from pydiffusion.errors import InsufficientMemoryError

GPUS = [device.name for device in devices()]
DEVICES = ["host", "host,host", *GPUS, *([",".join(GPUS)] if len(GPUS) > 1 else [])]
N_LAYER = 6  # of the checkpoint "wide"


@pytest.fixture
def file(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("wide", "q8_0", seed=0, dtype="f32")


def planned(file: Path, device: str, **arguments: Any) -> Plan:
    return plan(file, device=device, **{"n_ctx": 512, **arguments})


@pytest.mark.parametrize("device", DEVICES)
def test_experts_move_to_the_cpu_first(device: str, file: Path) -> None:
    whole = planned(file, device)
    assert (whole.n_gpu_layers, whole.n_cpu_moe) == (N_LAYER, 0)
    seen = []
    room = max(share.total_bytes for share in whole.shares)
    for limit in range(room, 0, -max(1, room // 400)):
        found = planned(file, device, gpu_memory=limit)
        assert all(share.total_bytes <= limit for share in found.shares)
        assert sum(share.n_layers for share in found.shares) == found.n_gpu_layers
        state = (found.n_gpu_layers, found.n_cpu_moe)
        if not seen or seen[-1] != state:
            seen.append(state)
    everything_without_experts = seen.index((N_LAYER, N_LAYER))
    # With two devices, moving one more layer's experts may make room for two layers on one of them.
    expected = [(N_LAYER, i) for i in range(N_LAYER + 1)]
    found_first = seen[: everything_without_experts + 1]
    assert found_first == expected if "," not in device else set(found_first) <= set(expected)
    assert seen[-1] == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_cache_is_counted(device: str, file: Path, gguf_file: Callable) -> None:
    """Planned cache bytes equal a session's; an 8-bit cache is counted in blocks, with attention's copies."""
    found = {}
    for kv_type in ("f32", "f16", "q8_0"):
        found[kv_type] = planned(file, device, kv_type=kv_type)
        model = DiffusionModel(file, n_ctx=512, device=device, kv_type=kv_type)
        assert found[kv_type].cache_bytes == model.new_session().native.cache_bytes
        shares = [share.n_layers for share in found[kv_type].shares]
        assert model.description["device_layers"] == shares
        assert model.description["backend"] == found[kv_type].device == device
    if "host" in device:  # CUDA pads rows of blocks to 512 elements
        assert found["q8_0"].cache_bytes == found["f16"].cache_bytes * 34 // 64
    assert found["q8_0"].step_bytes > found["f16"].step_bytes
    with pytest.raises(ValueError, match="a multiple of 32; this model has 16"):
        planned(gguf_file("tiny", "f32", seed=0, dtype="f32"), device, n_ctx=64, kv_type="q8_0")


@pytest.mark.parametrize("device", DEVICES)
def test_insufficient_memory_says_what_is_needed(device: str, file: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"2 layers on the devices? need .* GB.*n_cpu_moe"):
        planned(file, device, n_gpu_layers=2, gpu_memory=1000)


def model_logits(file: Path) -> int:
    model = _native.Model(str(file), 1)
    return model.canvas_length * model.n_vocab


def test_sessions_are_counted(file: Path) -> None:
    """Each session has its own cache, logits and buffers; weights are counted once."""
    one, two, three = (planned(file, "host", n_sessions=n) for n in (1, 2, 3))
    assert one.weight_bytes == two.weight_bytes and two.cache_bytes == 2 * one.cache_bytes
    logits = 4 * model_logits(file)
    assert two.step_bytes - one.step_bytes == three.step_bytes - two.step_bytes > logits
    room = one.total_bytes
    assert planned(file, "host", gpu_memory=room) == one
    less = planned(file, "host", gpu_memory=room, n_sessions=2)
    assert less.n_gpu_layers - less.n_cpu_moe < N_LAYER
    model = DiffusionModel(file, n_ctx=512, device="host", gpu_memory=room, n_sessions=2)
    assert model.description["n_gpu_layers"] == less.n_gpu_layers
    for wrong in (0, -1, True, "2", 1 << 20):
        with pytest.raises(ValueError, match="n_sessions is"):
            planned(file, "host", n_sessions=wrong)


@pytest.mark.skipif(not GPUS, reason="no GPU: that some of its memory stays free was NOT checked")
def test_some_memory_stays_free(file: Path) -> None:
    """For cuBLAS, the kernels' code and ggml's temporary buffers; also where the limit is larger."""
    with pytest.raises(InsufficientMemoryError, match=r"another \d+\.\d\d GB kept free") as refused:
        planned(file, GPUS[0], n_ctx=1 << 30, n_gpu_layers=N_LAYER, n_sessions=60000, gpu_memory=1 << 50)
    gpu = devices()[0]
    kept = float(re.search(r"([\d.]+) GB kept free", str(refused.value))[1]) * 1e9
    assert kept == pytest.approx(max(512 << 20, gpu.total_bytes / 20), abs=1e7)


# Several devices


def costs(file: Path) -> tuple[list[int], int]:
    """Weights and cache of each layer, from what one more of them adds to a plan; and what is in no layer."""
    outside = sum(t.n_bytes for t in _native.GgufFile(str(file)).tensors if not t.name.startswith("blk."))
    totals = [outside]
    for n in range(1, N_LAYER + 1):
        share = planned(file, "host", n_gpu_layers=n).shares[0]
        totals.append(share.weight_bytes + share.cache_bytes)
    return [after - before for before, after in itertools.pairwise(totals)][::-1], outside


def test_parts_add_up(file: Path) -> None:
    """Two devices together hold what one does; the last has the tensors outside layers, and the logits."""
    one, two = planned(file, "host"), planned(file, "host,host")
    assert two.weight_bytes == one.weight_bytes and two.cache_bytes == one.cache_bytes
    assert [share.device for share in two.shares] == ["host", "host"]
    first, last = two.shares
    assert last.step_bytes == one.step_bytes > first.step_bytes
    assert first.n_layers + last.n_layers == N_LAYER and first.n_layers > 0


@pytest.mark.parametrize("n_devices", [2, 3])
def test_layers_follow_free_memory(n_devices: int, file: Path) -> None:
    """Of all ways to split the layers, the plan's fullest device is the least full; and where any split fits,
    all layers are on devices.
    """
    sizes, outside = costs(file)
    on_each, on_last = (share.step_bytes for share in planned(file, "host,host").shares)
    on_last += outside
    ways = [runs for runs in itertools.product(range(N_LAYER + 1), repeat=n_devices) if sum(runs) == N_LAYER]
    rng = random.Random(n_devices)
    n_fitted = 0
    for _ in range(100):
        left = [rng.randrange(1, sum(sizes)) for _ in range(n_devices)]  # of each device, for layers

        def fullest(runs: Sequence[int], left: list[int] = left) -> float:
            ends = list(itertools.accumulate(runs))
            layers = [sum(sizes[end - n : end]) for n, end in zip(runs, ends, strict=True)]
            return max(n_bytes / room for n_bytes, room in zip(layers, left, strict=True))

        rooms = [room + on_each for room in left[:-1]] + [left[-1] + on_last]
        found = planned(file, ",".join(["host"] * n_devices), gpu_memory=rooms, n_cpu_moe=0)
        best = min(map(fullest, ways))
        assert (found.n_gpu_layers == N_LAYER) == (best <= 1)
        if found.n_gpu_layers == N_LAYER and len(found.shares) == n_devices:
            n_fitted += 1
            assert fullest([share.n_layers for share in found.shares]) == pytest.approx(best)
    assert n_fitted > 10


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_several_devices_give_the_same_bits_as_one(kv_type: str, gguf_file: Callable) -> None:
    """Devices don't share memory: activations are copied between them; results are equal to the bit."""
    file = gguf_file("wide", "q4_k_m", seed=0, dtype="f32")
    golden = case(load_golden("logits-wide-f32"), "commit")
    results = []
    for names in ("host", "host,host", "host,host,host"):
        model = _native.Model(str(file), 2, kv_type=kv_type, device=names, n_ctx=128)
        assert len(model.description["device_layers"]) == len(names.split(","))
        assert min(model.description["device_layers"]) > 0
        session = _native.Session(model, 128)
        hidden = encode_case(session, golden)
        results.append({"hidden": hidden, **denoise_case(session, golden)})
        # The last device embeds, each computes its layers, the last the head: no further copies.
        n_devices = len(names.split(","))
        assert session.n_splits == (1 if n_devices == 1 else n_devices + 1)
    for key, expected in results[0].items():
        assert all(np.array_equal(expected, result[key]) for result in results[1:])


def test_a_device_without_memory_is_left_out(file: Path) -> None:
    room = planned(file, "host").total_bytes
    found = planned(file, "host,host", gpu_memory=[1, room])
    assert found.device == "host" and [share.n_layers for share in found.shares] == [N_LAYER]
    model = DiffusionModel(file, n_ctx=512, device="host,host", gpu_memory=[1, room])
    assert model.description["backend"] == "host"


def test_auto_uses_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device with the most free memory is last: it gets the tensors outside layers."""
    there = [device_plan.Device(f"GPU{i}", "", free, 100) for i, free in enumerate((30, 90, 20))]
    monkeypatch.setattr(device_plan, "devices", lambda: there)

    def chosen(device: str, gpu_memory: Any = None) -> Any:
        request = device_plan.device_request("auto", None, device, gpu_memory)
        return request["device"], request["memory_limits"]

    assert chosen("auto") == ("GPU2,GPU0,GPU1", [])
    assert chosen("auto", 8) == ("GPU2,GPU0,GPU1", [8, 8, 8])
    assert chosen("GPU0, GPU1", [8, 9]) == ("GPU0,GPU1", [8, 9])
    assert chosen("cpu", 8) == ("cpu", [])
    monkeypatch.setattr(device_plan, "devices", list)
    assert chosen("auto", 8) == ("cpu", [])


@pytest.mark.parametrize(
    ("device", "gpu_memory", "said"),
    [
        ("host,CUDA77", None, "no device 'CUDA77'"),
        ("host,", None, "no device ''"),
        ("host,cpu", None, "no device 'cpu'"),
        # Known to ggml, but its backend has no kernels here, as with a GPU of another vendor.
        ("CPU", None, "'CPU' belongs to ggml's CPU backend, .* no kernels: use device=\"cpu\""),
        ("host,host", [8], "1 limits"),
        ("auto", [8, 8], "2 limits, and device is 'auto'"),
        ("host,host", [8, -1], "gpu_memory is -1"),
        ("host", "8G", "gpu_memory is '8G'"),
    ],
)
def test_invalid_devices(device: str, gpu_memory: Any, said: str, file: Path) -> None:
    with pytest.raises(ValueError, match=said):
        planned(file, device, gpu_memory=gpu_memory)


def test_a_gpu_named_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan, "devices", lambda: [device_plan.Device("GPU0", "", 1, 1)])
    with pytest.raises(ValueError, match="GPU0 twice"):
        device_plan.device_request("auto", None, "GPU0,GPU0", None)
