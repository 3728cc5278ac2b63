"""How busy the machine is: the shares by arithmetic, the counters from faked texts of /proc."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pydiffusion.testing import machine_load
from pydiffusion.testing.bench_report import format_load
from pydiffusion.testing.machine_load import LoadMeter, MachineLoad, fair_share, session_share, thread_times

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="NOT CHECKED: the load of this machine; only Linux says it"
)


def test_the_fair_share_by_thread() -> None:
    """A step of 114 ms on 2 CPUs becomes one of 152 ms beside one busy process."""
    assert 114 * fair_share(2, 2, 0) / fair_share(2, 2, 1) == pytest.approx(152)
    assert [fair_share(2, 2, k) for k in (0, 1, 2, 3)] == pytest.approx([2, 3 / 2, 1, 1 / 2 + 1 / 3])
    assert [fair_share(2, 1, k) for k in (0, 1, 3)] == pytest.approx([1, 1, 1 / 2])
    assert fair_share(8, 4, 4) == 4  # room for all
    assert fair_share(8, 8, 2) == pytest.approx(6 + 2 / 2)
    assert fair_share(2, 4, 0) == 2  # no more than there are
    assert fair_share(2, 2, 0.5) == pytest.approx((2 + 1.5) / 2)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("others", [[], [1], [1, 1], [1, 1, 1], [2], [0.5, 4], [8, 8, 8]])
def test_the_fair_share_by_session(n_threads: int, others: list[float]) -> None:
    """Against filling all sessions drop by drop."""
    n_cpus, drop = 4, 1e-3
    wants, given = [n_threads, *others], [0.0] * (1 + len(others))
    for _ in range(round(n_cpus / drop)):
        hungry = [i for i in range(len(wants)) if given[i] < wants[i] - drop / 2]
        if not hungry:
            break
        given[min(hungry, key=lambda i: given[i])] += drop
    assert session_share(n_cpus, n_threads, others) == pytest.approx(given[0], abs=3 * drop)


def test_a_session_with_more_threads_gets_no_more() -> None:
    for k, share in ((1, 1), (2, 2 / 3), (3, 1 / 2)):
        assert session_share(2, 2, [1] * k) == pytest.approx(share)
        assert session_share(2, 1, [1] * k) == pytest.approx(share)


class FakeMachine:
    """The files of a machine with three CPUs, of which the process may use the first two."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/cgroup", "0::/work\n")
        self.write("proc/sys/kernel/sched_autogroup_enabled", "1\n")
        self.counters()

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def counters(self, busy: int = 0, stolen: int = 0, waited: int = 0, throttled: int = 0) -> None:
        """busy, stolen: hundredths of a second per CPU; waited: nanoseconds; throttled: microseconds."""
        cpus = "".join(f"cpu{i} {busy} 0 0 77 0 0 0 {stolen} 0 0\n" for i in range(2))
        self._stat = f"cpu  9 9 9 9\n{cpus}cpu2 {9 * busy} 0 0 0 0 0 0 {9 * stolen} 0 0\nintr 1 2 3\n"
        for i in range(3):
            self.write(f"proc/self/task/{i}/schedstat", f"5 {waited // 3} 1\n")
        self.write("sys/fs/cgroup/work/cpu.stat", f"usage_usec 7\nthrottled_usec {throttled}\n")
        self.runnable(1, 1)

    def runnable(self, n: int, ours: int) -> None:
        """Threads of the machine that are runnable, and those of them that are ours."""
        self.write("proc/stat", f"{self._stat}procs_running {n}\nprocs_blocked 3\n")
        for i in range(3):
            self.write(f"proc/self/task/{i}/stat", f"{i} (a ) R b) {'R' if i < ours else 'S'} 1 2 3\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Its clock says that 10 seconds pass, in which the process runs for 12."""
    wall, ran = iter([100.0, 110.0]), iter([3.0, 15.0])
    clock = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(ran))
    monkeypatch.setattr(machine_load, "time", clock)
    monkeypatch.setattr(machine_load, "_affinity", lambda: frozenset((0, 1)))
    return FakeMachine(tmp_path)


def test_what_others_did_is_what_is_left(machine: FakeMachine) -> None:
    meter = LoadMeter(machine.root)
    for n, ours in ((4, 1), (5, 2), (1, 1), (1, 2)):  # the last: one of ours ended between two reads
        machine.runnable(n, ours)
        meter.sample()
    machine.counters(busy=850, stolen=50, waited=3_000_000_000, throttled=2_500_000)
    load = meter.result()
    assert (load.n_cpus, load.seconds, load.ran) == (2, 10.0, 1.2)
    assert load.others == pytest.approx((2 * 8.5 - 12) / 10)
    assert load.runnable == pytest.approx((3 + 3 + 0 + 0) / 4)
    assert load.waited == pytest.approx(0.3)
    assert load.stolen == pytest.approx(0.05)
    assert load.throttled == pytest.approx(0.25)
    assert load.by_session is True and load.frequency is None and load.quiet is False
    assert load.n_busy == load.runnable
    by_thread, by_session = load.fair_shares(2) or (0, 0)
    assert by_thread == pytest.approx(fair_share(2, 2, 1.5)) == pytest.approx(1.25)
    assert by_session == pytest.approx(2 - 0.5 - 0.75)
    assert format_load(load) == (
        "machine: NOT QUIET: others used 0.50 of 2 CPUs; 1.5 of their threads were runnable; 5% of the time "
        "was stolen by the hypervisor; the cgroup's quota stopped us 25% of the time"
    )


def test_a_quiet_machine(machine: FakeMachine) -> None:
    meter = LoadMeter(machine.root)
    meter.sample()
    machine.counters(busy=601)
    load = meter.result()
    assert load.quiet is True and format_load(load) == "machine: quiet"
    assert load.fair_shares(2) == (pytest.approx(2, abs=0.01), pytest.approx(2, abs=0.01))


def test_counters_of_a_cgroup_of_version_1(machine: FakeMachine) -> None:
    machine.write("proc/self/cgroup", "9:name=systemd:/\n4:cpu,cpuacct:/docker/0123\n0::/\n")
    machine.write("sys/fs/cgroup/cpu/cpu.stat", "nr_periods 1\nthrottled_time 0\n")
    meter = LoadMeter(machine.root)
    machine.write("sys/fs/cgroup/cpu/cpu.stat", "nr_periods 2\nthrottled_time 1000000000\n")
    assert meter.result().throttled == pytest.approx(0.1)


def test_the_lowest_frequency_limit(machine: FakeMachine) -> None:
    for i, limit in enumerate((3_000_000, 1_500_000)):
        folder = f"sys/devices/system/cpu/cpufreq/policy{i}"
        machine.write(f"{folder}/cpuinfo_max_freq", "3000000\n")
        machine.write(f"{folder}/scaling_max_freq", f"{limit}\n")
    load = LoadMeter(machine.root).result()
    assert load.frequency == 0.5 and load.disturbances == ["a CPU is limited to 50% of its frequency"]


@pytest.mark.parametrize(
    "text", [None, "", "cpu\n", "cpu0\nprocs_running\n", "cpu0 x y z\nprocs_running z\n"]
)
def test_what_is_not_known(tmp_path: Path, text: str | None) -> None:
    """Other systems have no /proc; in a sandbox it may hold anything."""
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/stat").write_text(text)
    meter = LoadMeter(tmp_path)
    meter.sample()
    load = meter.result()
    assert load.ran >= 0 and load.seconds > 0
    assert (load.waited, load.throttled, load.frequency, load.by_session) == (None,) * 4
    assert not load.disturbances
    assert MachineLoad(2, 1.0, 1.0).quiet is None and MachineLoad(2, 1.0, 1.0).fair_shares(2) is None
    assert format_load(MachineLoad(2, 1.0, 1.0)) == "machine: not known whether it was quiet"


@linux_only
def test_thread_times_are_those_of_the_process() -> None:
    before, since = thread_times(), time.process_time()
    while time.process_time() - since < 0.2:
        pass
    after = thread_times(os.getpid())
    assert before is not None and after is not None
    assert (after - before).ran == pytest.approx(0.2, abs=0.1) and (after - before).waited >= 0
    assert thread_times(2**30) is None
