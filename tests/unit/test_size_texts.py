"""One rule for sizes as text: G is 10**9, GiB 2**30, in every option and in what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from pydiffusion._util.sizes import count, format_size, parse_size
from pydiffusion.cli import main
from pydiffusion.cli._open import runtime_arguments


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("5G", 5 * 10**9), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("300m", 3 * 10**8), ("1.5 KB", 1500),
        ("2T", 2 * 10**12), ("4GiB", 4 << 30), ("4Gi", 4 << 30), ("1.5GiB", 3 << 29), ("900MiB", 900 << 20),
        ("1KiB", 1024), ("100", 100), ("77B", 77),
    ],
)  # fmt: skip
def test_what_is_read(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


TOO_LARGE = ("9" * 310, "9" * 310 + "T", "9223372037G")  # the first is no float


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "16X", "0", "0.0G", "0.1", "5 iB", "five", "1e9", "5P", *TOO_LARGE]
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (5 * 10**9, "5 GB"), (16 << 30, "17.2 GB"), (2e12, "2 TB")],
)
def test_what_is_printed(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text
    if n_bytes in (999, 1000, 5 * 10**9):
        assert parse_size(format_size(n_bytes)) == n_bytes
    assert count(25_200_000_000) == "25.2 G"


def test_the_options_share_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runtime_arguments({"gpu_layers": "auto", "gpu_memory": "8G"})["gpu_memory"] == 8 * 10**9
    limits = runtime_arguments({"device": "host,host", "gpu_memory": "8GiB,24GiB"})["gpu_memory"]
    assert limits == [8 << 30, 24 << 30]
    with pytest.raises(typer.BadParameter, match="'five' is not a size"):
        runtime_arguments({"gpu_memory": "8G,five"})
    for command in (
        ["convert", str(tmp_path), "--fit", "five"],
        ["convert", str(tmp_path), "--split-max-size", "five"],
        ["split", str(tmp_path / "a"), str(tmp_path / "b"), "--split-max-size", "five"],
    ):
        assert main(command) == 2
        assert "'five' is not a size" in capsys.readouterr().err
