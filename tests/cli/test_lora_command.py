"""``pydiffusion lora``, and ``--lora`` of the commands that write GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import write_checkpoint
from support.adapters_by_hand import random_adapter

from pydiffusion.adapters.adapter import Adapter, Side
from pydiffusion.adapters.gguf_file import write_adapter_gguf
from pydiffusion.adapters.loading import load_adapter, matrices_of
from pydiffusion.cli import main
from pydiffusion.convert import convert, open_parts

#: Of the checkpoint "tiny": 2 layers, of which the second has no V, and self-conditioning.
N_MATRICES = 10 + 9 + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny")


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    convert(folder, path, "f32")
    return path


def written(base: Path, target: Path, side: Side = "both") -> Path:
    shapes = {str(tensor.name): tuple(tensor.shape) for tensor in open_parts(base).tensors}
    write_adapter_gguf(random_adapter(shapes, side=side, name=target.stem), target, matrices_of(None))
    return target


@pytest.fixture(scope="module")
def shared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set for both modes."""
    return written(base, tmp_path_factory.mktemp("shared") / "shared.gguf")


@pytest.fixture(scope="module")
def decoders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set for the decoder only."""
    return written(base, tmp_path_factory.mktemp("decoders") / "decoders.gguf", "decoder")


def changes(adapter: Adapter) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(tensor, mode) -> A and B, scale in B, as the runtime takes them."""
    found = {}
    for tensor, side, a, b in adapter.scaled():
        found |= dict.fromkeys(
            [(tensor, mode) for mode in ("encoder", "decoder") if side in (mode, "both")], (a, b)
        )
    return found


def assert_same(one: Adapter, other: Adapter) -> None:
    found, wanted = changes(one), changes(other)
    assert found.keys() == wanted.keys()
    for place, (a, b) in wanted.items():
        assert np.array_equal(found[place][0], a) and np.array_equal(found[place][1], b), place


@pytest.mark.parametrize("side", ["shared", "decoders"])
def test_to_a_folder_and_back(  # where transformers has a module, and PEFT a set, for each mode
    side: str, request: pytest.FixtureRequest, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = request.getfixturevalue(side)
    folder, again = tmp_path / "folder", tmp_path / "again.gguf"
    assert main(["lora", "convert", str(given), str(folder), "-m", str(base)]) == 0
    assert (folder / "adapter_config.json").is_file()
    assert main(["lora", "convert", str(folder), str(again), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # The same set for each mode is one again.
    assert report["target"] == str(again) and report["n_targets"] == N_MATRICES
    assert_same(load_adapter(given, None), load_adapter(folder, open_parts(base).metadata))
    assert_same(load_adapter(given, None), load_adapter(again, None))


def test_what_an_adapter_changes(
    shared: Path, decoders: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", "inspect", str(shared), "-m", str(base), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert f"shared: {N_MATRICES} matrices, rank 4" in out and "can be merged by convert --lora: yes" in out
    assert "blk.1.ffn_gate_up_exps" in out and "A 4 x 4 x 64" in out
    assert main(["inspect", str(decoders)]) == 0
    out = capsys.readouterr().out
    assert f"Adapter: {N_MATRICES} matrices, rank 4" in out
    assert "no, it changes blk.0.attn_k for the decoder only" in out
    assert main(["lora", "inspect", str(decoders), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sides"] == {"decoder": N_MATRICES} and facts["ranks"] == [4]
    assert facts["merge_problem"] == "changes blk.0.attn_k for the decoder only"
    first = next(target for target in facts["targets"] if target["tensor"] == "blk.0.attn_q")
    assert (first["shape_a"], first["shape_b"], first["side"]) == ([4, 64], [32, 4], "decoder")
    assert main(["inspect", str(shared), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"]["sides"] == {"decoder": 3, "both": N_MATRICES - 3}


def test_merged_by_the_command(
    folder: Path, base: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint and of a GGUF alike, several, with scales; compared by verify."""
    used = ["--lora", f"{shared}:0.5", "--lora", f"{shared}:-2"]
    assert main(["convert", str(folder), str(tmp_path / "a.gguf"), "--type", "bf16", *used]) == 0
    assert main(["quantize", str(base), str(tmp_path / "b.gguf"), "bf16", *used]) == 0
    assert "adapter shared, scale -2: merged, 22 matrices changed" in capsys.readouterr().err
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    verify = ["verify", str(tmp_path / "a.gguf"), "--against", str(folder)]
    assert main([*verify, *used]) == 0
    capsys.readouterr()
    assert main(verify) == 1
    assert "give them with --lora (shared:0.5, shared:-2)" in capsys.readouterr().err


def test_a_dry_run_checks_the_adapter(folder: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), "--dry-run", "--lora", f"{shared}:3"]) == 0
    assert "adapter shared, scale 3: merged, 22 matrices changed" in capsys.readouterr().err


def test_the_home_folder_of_an_adapter(
    folder: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(shared.parent))
    monkeypatch.setenv("USERPROFILE", str(shared.parent))
    assert main(["lora", "inspect", "~/shared.gguf"]) == 0
    assert main(["convert", str(folder), "--dry-run", "--lora", "~/shared.gguf:3"]) == 0
    assert "22 matrices changed" in capsys.readouterr().err


MISTAKES = {
    "convert {folder} {out} --lora {decoders}": (1, "changes blk.0.attn_k for the decoder only"),
    "convert {folder} --dry-run --lora {decoders}": (1, "changes blk.0.attn_k for the decoder only"),
    "convert {folder} --dry-run --lora {none}": (1, "there is no such adapter"),
    "convert {folder} {out} --lora {none}": (1, "there is no such adapter"),
    "convert {folder} {out} --lora {shared}:nan": (2, "scale"),
    "convert {folder} {out} --lora ''": (2, "the path of an adapter is empty"),
    "convert {folder} {out} --mmproj --lora {shared}": (2, "--mmproj goes with"),
    "convert {shared} {out}": (1, "LoRA adapter, not a model"),
    "verify {base} --lora {shared}": (2, "--lora goes with --against"),
    "lora": (2, "inspect"),
    "lora inspect {none}": (1, "there is no such adapter"),
    "lora inspect {base}": (1, "base.gguf"),
    "lora inspect {shared} -m {shared}": (1, "shared.gguf"),
    "lora convert {shared} {out}": (1, "is a GGUF already; give a folder as OUT"),
    "lora convert {shared} {none} --type q8_0": (2, "--type is q8_0"),
    "lora convert {shared} {none} --type bf16": (2, "for GGUF files only"),
    "lora convert {shared} {folder}": (1, "is a model's folder"),
    "lora convert {shared} {none} --no-overwrite -m {none}": (1, "no such file"),
    "lora convrt": (2, "Did you mean 'convert'"),
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes(
    given: str,
    folder: Path,
    base: Path,
    shared: Path,
    decoders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, words = MISTAKES[given]
    paths = {"folder": folder, "base": base, "shared": shared, "decoders": decoders}
    paths |= {"out": tmp_path / "out.gguf", "none": tmp_path / "none"}
    arguments = [word.format(**paths).replace("''", "") for word in given.split()]
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert words in " ".join((out + err).split()) and "Traceback" not in err
    assert not list(tmp_path.iterdir())
