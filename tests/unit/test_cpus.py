"""The number of threads by default: from fake system files, in a real affinity, in a real cgroup."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pydiffusion import DiffusionModel
from pydiffusion._util.cpus import (
    Cpus,
    available_cpus,
    describe_cpus,
    read_cpus,
    step_threads,
    too_many_threads,
)
from pydiffusion.cli import main
from pydiffusion.convert import quantize

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
# Of a container of Docker without a namespace of its own, and of its host's systemd.
V1_MOUNTS = (
    "40 30 0:35 {0} /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
    "41 30 0:36 {0} /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
    "42 30 0:37 / /proc rw - proc proc rw\n"
)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


class System:
    """A folder with the files of a fake system."""

    def __init__(self, root: Path):
        self.root = root

    def write(self, path: str, text: str) -> System:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return self

    def in_cgroup(self, mounts: str, cgroups: str) -> System:
        return self.write("proc/self/mountinfo", mounts).write("proc/self/cgroup", cgroups)

    def cores(self, *cores: str) -> System:
        """Cores by their hardware threads, as Linux lists them."""
        for core in cores:
            for cpu in _expand(core):
                self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", core + "\n")
        return self

    def describe(self, numbers: str, n_online: int | None = None) -> Cpus:
        allowed = frozenset(_expand(numbers))
        return describe_cpus(allowed, n_online or len(allowed), self.root)


def _expand(text: str) -> list[int]:
    parts = [part.split("-") for part in text.split(",")]
    return [cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)]


def numbers_of(cpus: Cpus) -> tuple[int, int]:
    """(threads of a step, threads of a conversion)."""
    return step_threads(cpus).n, available_cpus(cpus)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"app/box/cpu.max": "600000 100000\n"}, 6.0),
        ({"app/box/cpu.max": "max 100000\n", "app/cpu.max": "250000 100000\n"}, 2.5),  # of the parent only
        ({"app/box/cpu.max": "300000 100000\n", "app/cpu.max": "50000 50000\n"}, 1.0),  # the lower one
        ({"app/box/cpu.max": "100000 50000\n", "app/cpu.max": "max 100000\n", "cpu.max": "max 1000"}, 2.0),
        ({"app/box/cpu.max": "max 100000\n", "cpu.max": "700000 100000\n"}, 7.0),  # of the mount itself
        ({"app/box/cpu.max": "max 100000\n"}, None),
        ({"app/cpu.stat": "nr_periods 0\n"}, None),
    ],
)
def test_quotas_of_cgroup_v2(system: System, files: dict[str, str], quota: float | None) -> None:
    system.in_cgroup(V2_MOUNT, "0::/app/box\n")
    for name, text in files.items():
        system.write(f"sys/fs/cgroup/{name}", text)
    assert system.describe("0-7").quota == quota


def test_quota_of_a_container_with_a_cgroup_namespace(system: System) -> None:
    system.in_cgroup(V2_MOUNT, "0::/\n").write("sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert system.describe("0-7").quota == 1.5
    # Its cgroup was moved away from below the mount: what is mounted still counts.
    system.in_cgroup(V2_MOUNT, "0::/../../other\n").write("sys/other/cpu.max", "50000 100000\n")
    assert system.describe("0-7").quota == 1.5


@pytest.mark.parametrize(
    ("mount_root", "cgroup", "folder"),
    [
        ("/", "/user.slice/app", "user.slice/app"),
        ("/", "/user.slice/app/deeper", "user.slice/app"),  # of a parent
        ("/docker/4a5b", "/docker/4a5b", ""),  # Docker mounts the container's own folder
        ("/docker/4a5b", "/docker/4a5b/inner", "inner"),
        ("/docker/4a5b", "/", ""),
    ],
)
def test_quotas_of_cgroup_v1(system: System, mount_root: str, cgroup: str, folder: str) -> None:
    system.in_cgroup(V1_MOUNTS.format(mount_root), f"9:cpuset:/\n4:cpu,cpuacct:{cgroup}\n1:name=systemd:/\n")
    top = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    system.write(f"{top}/cpu.cfs_quota_us", "400000\n").write(f"{top}/cpu.cfs_period_us", "100000\n")
    system.write("sys/fs/cgroup/cpuset/cpu.cfs_quota_us", "100000\n")  # not the controller of CPU time
    system.write("sys/fs/cgroup/cpuset/cpu.cfs_period_us", "100000\n")
    assert system.describe("0-7").quota == 4.0
    system.write(f"{top}/cpu.cfs_quota_us", "-1\n")
    assert system.describe("0-7").quota is None


def test_both_versions_of_cgroups(system: System) -> None:
    """As systemd mounts them together: version 2 without the controller, version 1 with the quota."""
    mounts = V1_MOUNTS.format("/") + V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    system.in_cgroup(mounts, "4:cpu,cpuacct:/app\n0::/app\n").write("sys/fs/cgroup/unified/app/cpu.stat", "")
    system.write("sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us", "250000")
    system.write("sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us", "100000")
    assert system.describe("0-7").quota == 2.5


@pytest.mark.parametrize(
    ("quota", "n"),
    [(0.1, 1), (0.99, 1), (1.0, 1), (1.25, 1), (1.5, 2), (2.5, 3), (3.4, 3), (7.9, 8), (64, 8)],
)
def test_threads_within_a_quota(quota: float, n: int) -> None:
    assert numbers_of(Cpus(frozenset(range(8)), 8, quota, "a cgroup")) == (n, n)


def test_hardware_threads_of_a_core(system: System) -> None:
    """A step uses one per core, a conversion all."""
    system.cores("0,4", "1,5", "2,6", "3,7")
    assert numbers_of(system.describe("0-7")) == (4, 8)
    assert step_threads(system.describe("0-7")).reason == "4 cores of 8 CPUs"
    assert numbers_of(system.describe("0-3", 8)) == (4, 4)  # taskset to one thread of each core
    assert numbers_of(system.describe("0,4,1", 8)) == (2, 3)
    assert step_threads(system.describe("0,4", 8)) == (1, "1 core of 2 CPUs, affinity to 2 of 8 CPUs")


def test_intel_hybrid(system: System) -> None:
    """Six performance cores with two hardware threads each, eight efficiency cores."""
    system.cores(*(f"{i}-{i + 1}" for i in range(0, 12, 2)), *map(str, range(12, 20)))
    system.write("sys/devices/cpu_core/cpus", "0-11\n").write("sys/devices/cpu_atom/cpus", "12-19\n")
    cpus = system.describe("0-19")
    assert numbers_of(cpus) == (6, 20)
    assert step_threads(cpus).reason == "6 performance cores of 20 CPUs"
    assert numbers_of(system.describe("12-19", 20)) == (8, 8)  # where there are only these, they are used
    assert numbers_of(system.describe("10-13", 20)) == (1, 4)


@pytest.mark.parametrize(
    ("capacities", "n"),
    [
        ([400] * 4 + [1024] * 4, 4),  # RK3588: with all eight the fast ones would wait
        ([430] * 4 + [871] * 2 + [1024] * 2, 4),  # 4 * 871 is the most
        ([250] * 3 + [780] * 4 + [1024], 5),  # a phone's single fastest core doesn't work alone
        ([520] * 4 + [1024] * 2, 6),  # 6 * 520 > 2 * 1024
        ([1010, 1024, 1015, 1024], 4),
        ([1024] * 4, 4),
    ],
)
def test_arm_big_little(system: System, capacities: list[int], n: int) -> None:
    for cpu, capacity in enumerate(capacities):
        system.write(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", f"{capacity}\n")
    cpus = system.describe(f"0-{len(capacities) - 1}")
    assert numbers_of(cpus) == (n, len(capacities))
    assert ("performance" in step_threads(cpus).reason) == (n < len(capacities))


def test_the_reason_names_cores_and_quota(system: System) -> None:
    system.cores(*(f"{i}-{i + 1}" for i in range(0, 16, 2)), *map(str, range(16, 24)))
    system.write("sys/devices/cpu_core/cpus", "0-15\n").in_cgroup(V2_MOUNT, "0::/\n")
    system.write("sys/fs/cgroup/cpu.max", "600000 100000\n")
    assert step_threads(system.describe("0-23")) == (
        6,
        "8 performance cores of 24 CPUs, limited to 6 CPUs by a cgroup",
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\0\xff",
            "x",
            "-1 -1",
            "0 100000",
            "100000 0",
            "1e5 100000",
            "nan inf",
            "1 2 3",
            f"1{'0' * 400} 1",
        ),
        *("99999999999-1", "0-99999999999", "5-2", "1,,2", "-5", "a\nb\n:::\n - \n"),
    ],
)
def test_broken_files_do_not_limit(system: System, text: str) -> None:
    system.in_cgroup(V2_MOUNT, "0::/app\n").write("sys/fs/cgroup/app/cpu.max", text)
    system.write("sys/devices/cpu_core/cpus", text)
    for cpu in range(4):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        system.write(f"{folder}/topology/thread_siblings_list", text).write(f"{folder}/cpu_capacity", text)
    assert numbers_of(system.describe("0-3")) == (4, 4)
    system.in_cgroup(text, text)
    assert numbers_of(system.describe("0-3")) == (4, 4)


def test_files_that_can_not_be_read(system: System) -> None:
    assert numbers_of(system.describe("0-3")) == (4, 4)
    system.in_cgroup(V2_MOUNT, "0::/app\n").write("sys/fs/cgroup/app/cpu.max/is-a-folder", "")
    (system.root / "sys/devices/system/cpu/cpu0/topology").mkdir(parents=True)
    (system.root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list").write_bytes(b"\xff\xfe\x80")
    assert numbers_of(system.describe("0-3")) == (4, 4)


@pytest.mark.parametrize(
    ("n_cpus", "quota", "n_threads", "said"),
    [
        (8, 1.5, 8, "may use 1.5 CPUs, limited by a cgroup; the default is 2"),
        (8, 1.5, 2, None),
        (8, 20.0, 9, "may use 8 CPUs; the default is 8"),
        (1, None, 2, "may use 1 CPU; the default is 1"),
        (8, None, 8, None),
    ],
)
def test_more_threads_than_cpus_give_a_warning(
    n_cpus: int, quota: float | None, n_threads: int, said: str | None
) -> None:
    warning = too_many_threads(n_threads, Cpus(frozenset(range(n_cpus)), n_cpus, quota, "a cgroup"))
    assert warning is None if said is None else warning is not None and said in warning


PRINT_NUMBERS = (
    "import os, json; from pydiffusion._util.cpus import *; c = read_cpus(); "
    "print(json.dumps([sorted(c.numbers), c.quota, step_threads().n, available_cpus()]))"
)


def _run(code: str, **environment: str) -> list:
    command = [sys.executable, "-c", code]
    return json.loads(subprocess.check_output(command, env={**os.environ, **environment}, text=True))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="NOT CHECKED: affinity (Linux only)")
def test_a_real_affinity() -> None:
    first = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{first}}}); "
    found = _run(pin + PRINT_NUMBERS)
    assert found[0] == [first] and found[2:] == [1, 1]
    assert len(read_cpus().numbers) == len(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.version_info < (3, 13), reason="NOT CHECKED: PYTHON_CPU_COUNT, from Python 3.13 on")
def test_a_persons_choice() -> None:
    assert _run(PRINT_NUMBERS, PYTHON_CPU_COUNT="1")[2:] == [1, 1]


@contextlib.contextmanager
def _cgroup(quota: float) -> Iterator[Path]:
    """A cgroup of the real system with a quota; skips where none can be made."""
    name = f"pydiffusion-test-{os.getpid()}"
    for top, limits in (
        ("/sys/fs/cgroup", {"cpu.max": f"{quota * 1e5:.0f} 100000"}),
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": f"{quota * 1e5:.0f}"}),
    ):
        folder = Path(top, name)
        if not Path(top, "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            for file, text in limits.items():
                (folder / file).write_text(text)
            yield folder
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("NOT CHECKED: a real quota (making a cgroup needs root and its CPU controller)")


def test_a_real_quota() -> None:
    with _cgroup(0.5) as folder:
        enter = f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0'); "
        assert _run(enter + PRINT_NUMBERS)[1:] == [0.5, 1, 1]


def test_who_uses_which_number(
    gguf_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hardware threads of two cores: two threads for steps, three for conversion."""
    two = frozenset((0, 1))
    cpus = Cpus(frozenset(range(3)), 3, siblings={0: two, 1: two})
    monkeypatch.setattr("pydiffusion._util.cpus.read_cpus", lambda: cpus)
    with DiffusionModel(gguf_file("small")) as model:
        assert model.n_threads == 2
    with DiffusionModel(gguf_file("small"), n_threads=3) as model:
        assert model.n_threads == 3
    pools: list[int] = []

    def pool(n_workers: int) -> ThreadPoolExecutor:
        pools.append(n_workers)
        return ThreadPoolExecutor(n_workers)

    monkeypatch.setattr("pydiffusion.convert.gguf.writer.ThreadPoolExecutor", pool)
    quantize(gguf_file("small"), tmp_path / "small-q8_0.gguf", "q8_0")
    assert pools and set(pools) == {3}


def test_bench_uses_the_number_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pydiffusion._util.cpus.read_cpus", lambda: Cpus(frozenset(range(4)), 4, 1.0))
    assert main(["bench", "--synthetic", "tiny", "--prompt", "8", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_threads"] == 1


def test_devices_says_the_number_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    n, reason = step_threads()
    assert json.loads(capsys.readouterr().out)["cpu"] == {"n_threads": n, "reason": reason}
    assert main(["devices"]) == 0
    assert capsys.readouterr().out.startswith(f"cpu: {n} thread")


def test_the_command_line_warns_of_too_many_threads(
    gguf_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["devices", "-m", str(gguf_file("small")), "--threads"]
    assert main([*plan, "1"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*plan, "500"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("pydiffusion: warning: --threads: 500 threads wait") and err.count("\n") == 1
