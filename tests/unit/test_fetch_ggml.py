"""vendor/fetch_ggml.py with the real pip and a package index in a folder, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support.paths import REPOSITORY
from support.scripts import load_script

PACKAGE, ARCHIVE = "llama-cpp-python==9.9", "llama_cpp_python-9.9.tar.gz"
NO_NETWORK = "http://127.0.0.1:9/simple"  # nothing listens there
# Builds the distribution whose source is fetched: its metadata, and no wheel, which would take a compiler.
BACKEND = """
import os, pathlib, subprocess, sys, time
def prepare_metadata_for_build_wheel(folder, settings=None):
    if os.environ.get("TEST_HANG"):
        pathlib.Path(os.environ["TEST_HANG"]).write_text(str(os.getpid()))
        time.sleep(60)
    info = pathlib.Path(folder, "llama_cpp_python-9.9.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 9.9\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\n")
    return info.name
"""
FILES = {
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
    "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n",
    "vendor/llama.cpp/ggml/CMakeLists.txt": "project(ggml)\n",
    "vendor/llama.cpp/ggml/src/ggml.c": "int x;\n",
    "vendor/llama.cpp/README.md": "not ours\n",
}


def write_archive(path: Path, files: dict[str, str]) -> str:
    """A source distribution of ``files``; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-9.9/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Tree:
    """A copy of vendor/ with a lock of its own, and an index that has what the lock pins."""

    def __init__(self, folder: Path) -> None:
        self.vendor = folder / "vendor"
        self.target = self.vendor / "ggml"
        self.served = folder / "simple/llama-cpp-python" / ARCHIVE
        self.sha256 = write_archive(self.served, FILES)
        (self.served.parent / "index.html").write_text(f'<a href="{ARCHIVE}">{ARCHIVE}</a>')
        (self.vendor / "patches").mkdir(parents=True)
        (self.vendor / "fetch_ggml.py").write_bytes((REPOSITORY / "vendor/fetch_ggml.py").read_bytes())
        ours = {name.partition("/ggml/")[2]: text for name, text in FILES.items() if "/ggml/" in name}
        digest = hashlib.sha256()  # of paths and contents, in the paths' order
        for name, text in sorted(ours.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(text.encode()).digest())
        (self.vendor / "ggml.lock").write_text(
            f"{PACKAGE} --hash=sha256:{self.sha256}\n# ggml-version: 0.99\n# archive-mb: 77\n"
            f"# tree-sha256: {digest.hexdigest()}\n# patched-sha256: {digest.hexdigest()}\n"
        )
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": (folder / "simple").as_uri(),
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def command(self, *options: str) -> list[str]:
        return [sys.executable, *options, str(self.vendor / "fetch_ggml.py")]

    def fetch(self, *options: str, **env: str) -> tuple[int, str, list[str]]:
        """Exit code, stdout, and the lines of stderr."""
        done = subprocess.run(
            self.command(*options), env={**self.env, **env}, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout, done.stderr.splitlines()

    def leftovers(self) -> set[str]:
        return {path.name for path in self.vendor.iterdir()} - {"fetch_ggml.py", "ggml.lock", "patches"}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("NOT CHECKED: fetching ggml (this environment has no pip)")
    return Tree(tmp_path)


def test_fetching_says_what_and_builds_nothing(tree: Tree) -> None:
    code, out, errors = tree.fetch()
    assert code == 0 and not errors
    assert re.fullmatch(
        rf".*{PACKAGE} \(77 MB, with ggml 0.99 in it\) from the package index with pip\n", out
    )
    assert (tree.target / "src/ggml.c").read_text() == "int x;\n"
    assert tree.leftovers() == {"ggml"}
    assert tree.fetch(PIP_INDEX_URL=NO_NETWORK) == (0, "", []), "what is there is not fetched again"


def test_a_file_with_another_hash_is_refused(tree: Tree) -> None:
    other = write_archive(tree.served, {**FILES, "vendor/llama.cpp/ggml/src/ggml.c": "int y;\n"})
    code, _, errors = tree.fetch()
    assert code == 1 and len(errors) == 1
    assert f"{PACKAGE} has sha256 {other}, pinned is {tree.sha256}" in errors[0]
    assert "PIP_INDEX_URL" in errors[0] and tree.leftovers() == set()


def test_without_a_network_the_last_line_says_what_to_do(tree: Tree) -> None:
    code, _, errors = tree.fetch(PIP_INDEX_URL=NO_NETWORK, PIP_RETRIES="1")
    assert code == 1
    assert any("Connection refused" in line for line in errors[:-1]), "pip's own words tell the cause"
    assert f"could not download {PACKAGE}" in errors[-1]
    for remedy in ("HTTPS_PROXY", "PIP_INDEX_URL", f"put {ARCHIVE} into {tree.vendor}"):
        assert remedy in errors[-1]
    assert tree.leftovers() == set()


def test_a_placed_archive_needs_neither_pip_nor_network(tree: Tree) -> None:
    placed = tree.vendor / ARCHIVE
    placed.write_bytes(tree.served.read_bytes())
    assert tree.fetch("-S", PIP_INDEX_URL=NO_NETWORK) == (0, "", [])
    assert (tree.target / "src/ggml.c").read_text() == "int x;\n"


def test_a_placed_archive_with_another_hash_is_refused(tree: Tree) -> None:
    found = write_archive(tree.vendor / ARCHIVE, {**FILES, "more": ""})
    code, _, errors = tree.fetch()
    assert code == 1 and len(errors) == 1 and not tree.target.exists()
    assert f"{ARCHIVE} has sha256 {found}, pinned is {tree.sha256}: delete it" in errors[0]


def test_without_pip_it_says_so(tree: Tree) -> None:
    code, _, errors = tree.fetch("-S")  # without site-packages, where pip is
    assert code == 1 and len(errors) == 1
    assert "has no pip" in errors[0] and "ensurepip" in errors[0] and ARCHIVE in errors[0]


def test_an_index_that_never_answers_is_given_up(tree: Tree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        code, _, errors = tree.fetch(PIP_INDEX_URL=url, PYDIFFUSION_FETCH_TIMEOUT="2")
    assert code == 1 and len(errors) == 1
    for part in (PACKAGE, "after 2 s", "HTTPS_PROXY", "PYDIFFUSION_FETCH_TIMEOUT"):
        assert part in errors[0]
    assert tree.leftovers() == set()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", ""])
def test_invalid_time_limits_are_refused(tree: Tree, value: str) -> None:
    code, _, errors = tree.fetch(PYDIFFUSION_FETCH_TIMEOUT=value)
    assert code == 1 and f"PYDIFFUSION_FETCH_TIMEOUT={value!r}: it takes seconds" in errors[-1]


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def heed_signals() -> None:
    """Also where the tests run in the background or under nohup, which ignore some of them."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="NOT CHECKED: processes (no /proc)")
@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_pips_child_processes(tree: Tree, tmp_path: Path, ended_by: signal.Signals) -> None:
    note = tmp_path / "pid"
    env = {**tree.env, "TEST_HANG": str(note), "PYDIFFUSION_FETCH_TIMEOUT": "0"}
    running = subprocess.Popen(
        tree.command(), env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals
    )
    try:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        started = int(note.read_text())
        assert is_running(started)
        running.send_signal(ended_by)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert len(said.splitlines()) == 1
    wait_for_end(started)
    assert tree.leftovers() == set()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="NOT CHECKED: processes (no /proc)")
def test_a_timeout_ends_child_processes(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    for seconds in (1.0, 4.0, 16.0, 64.0):  # the child may start late on a busy machine
        with pytest.raises(subprocess.TimeoutExpired):
            load_script("vendor/fetch_ggml.py").run([sys.executable, "-c", parent], seconds, tmp_path)
        if note.exists() and note.read_text():
            break
    wait_for_end(int(note.read_text()))


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10  # the kernel takes a moment
    while is_running(pid):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.05)


def test_update_writes_what_came_into_the_lock(tree: Tree) -> None:
    lock = tree.vendor / "ggml.lock"
    pinned = lock.read_text()
    lock.write_text(re.sub(r"(mb|tree-sha256|patched-sha256): \S+", r"\1: 0", pinned))
    done = subprocess.run([*tree.command(), "--update"], env=tree.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lock.read_text() == pinned.replace("archive-mb: 77", "archive-mb: 0")  # of a few hundred bytes


LINES = "# ggml-version: 0\n# archive-mb: 0\n# tree-sha256: 0\n"


def test_a_changed_tree_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fetch = load_script("vendor/fetch_ggml.py")
    tree = tmp_path / "ggml"
    tree.mkdir()
    (tree / "file.c").write_text("int x;")
    lock = tmp_path / "ggml.lock"
    line = f"llama-cpp-python==0 --hash=sha256:{'0' * 64}"
    lock.write_text(f"{line}\n{LINES}# patched-sha256: {fetch.tree_digest(tree)}\n")
    monkeypatch.setattr(fetch, "TARGET", tree)
    monkeypatch.setattr(fetch, "LOCK", lock)
    monkeypatch.setattr(sys, "argv", ["fetch_ggml.py"])
    assert fetch.main() == 0
    (tree / "file.c").write_text("int y;")
    assert fetch.main() == 1
    assert "is not the pinned ggml" in capsys.readouterr().err


def test_patches_are_applied_once_and_without_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """An unpatched tree is patched; one whose lines differ is refused without any change."""
    fetch = load_script("vendor/fetch_ggml.py")
    tree, patches, lock = tmp_path / "ggml", tmp_path / "patches", tmp_path / "ggml.lock"
    tree.mkdir()
    patches.mkdir()
    before = "".join(f"line {i}\n" for i in range(1, 21))
    after = before.replace("line 3\n", "third\n").replace("line 17\n", "line 17\nmore\n")
    (patches / "0001-some.patch").write_text(
        "Why.\n\n--- a/file.c\n+++ b/file.c\n@@ -2,3 +2,3 @@\n line 2\n-line 3\n+third\n line 4\n"
        "@@ -17,2 +17,3 @@ void f()\n line 17\n+more\n line 18\n"
    )
    digests = {}
    for name, text in (("patched", after), ("tree", before)):
        (tree / "file.c").write_text(text)
        digests[name] = fetch.tree_digest(tree)
    line = f"llama-cpp-python==0 --hash=sha256:{'0' * 64}"
    lines = LINES.replace("tree-sha256: 0", f"tree-sha256: {digests['tree']}")
    lock.write_text(f"{line}\n{lines}# patched-sha256: {digests['patched']}\n")
    for name, value in (("TARGET", tree), ("LOCK", lock), ("PATCHES", patches)):
        monkeypatch.setattr(fetch, name, value)
    monkeypatch.setattr(sys, "argv", ["fetch_ggml.py"])
    for _ in range(2):
        assert fetch.main() == 0
        assert (tree / "file.c").read_text() == after
    for text in (before.replace("line 4", "line four"), "line 0\n" + before):
        (tree / "file.c").write_text(text)
        with pytest.raises(fetch.FetchError, match=r"0001-some.patch: .*file.c, line 2: the file is not as"):
            fetch.apply_patches(tree)


def test_a_lock_without_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fetch = load_script("vendor/fetch_ggml.py")
    lock = tmp_path / "ggml.lock"
    lock.write_text("llama-cpp-python==0.3.36\n")
    monkeypatch.setattr(fetch, "LOCK", lock)
    monkeypatch.setattr(sys, "argv", ["fetch_ggml.py"])
    assert fetch.main() == 1
    assert "no requirement line with a sha256" in capsys.readouterr().err
