"""``pydiffusion doctor`` without torch: what it finds in files that are broken on purpose."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.adapter_folders import write_random_gguf
from support.gguf_mutator import ARRAY, F32, I32, STRING, U32, Array, RawGguf, String, read_gguf
from support.public_templates import OLD_TEMPLATE

from pydiffusion import DiffusionModel
from pydiffusion.cli import main
from pydiffusion.quality.doctor import layers_check, released, speed_check, stops_check
from pydiffusion.quality.doctor.examination import examine, page_of
from pydiffusion.quality.doctor.report import Finding, Report, Result, Section
from pydiffusion.quality.doctor.subject import Subject

A = "diffusion-gemma."
TEMPLATE = "tokenizer.chat_template"
TYPES = "tokenizer.ggml.token_type"


@pytest.fixture(scope="module")
def whole(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small", "f32")


@pytest.fixture(scope="module")
def source(checkpoint_folder: Callable[..., Path]) -> Path:
    return checkpoint_folder("small")


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Callable[[Callable[[RawGguf], object]], Path]:
    """``broken(change)``: a copy of the file, changed."""

    def make(change: Callable[[RawGguf], object]) -> Path:
        file = read_gguf(whole)
        change(file)
        return file.write(tmp_path / "broken.gguf")

    return make


def found(report: Report, section: str, what: str) -> Finding:
    """The only finding of that section whose subject begins so."""
    (one,) = (s for s in report.sections if s.title == section)
    (finding,) = (f for f in one.findings if f.what.startswith(what))
    return finding


def failures(report: Report) -> list[tuple[str, str]]:
    return [(s.title, f.what) for s in report.sections for f in s.findings if f.result is Result.FAILED]


def look(path: Path, reference: Path | None, *checks: str) -> Report:
    return examine(path, reference, checks=checks, runtime={"n_threads": 1, "n_gpu_layers": 0})


def test_a_sound_file_passes_and_the_page_has_no_paths(
    whole: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "page.md"
    assert main(["doctor", str(whole), "-o", str(target), "--gpu-layers", "0"]) == 0
    page = capsys.readouterr().out
    assert page == target.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.md"]
    for name in ("file", "shapes", "tokens", "template", "stops", "speed", "weights", "layers"):
        assert f"\n## {name}: " in page
    assert "What was NOT CHECKED:" in page and "- weights, weights of the reference: no --reference" in page
    assert "**nothing failed**" in page and "What failed:" not in page
    assert str(whole.parent) not in page and str(Path.home()) + "/" not in page
    assert "planned" in page and "ms per step" in page


def test_its_reference_agrees(whole: Path, source: Path) -> None:
    report = look(whole, source, "file", "shapes", "tokens", "template", "stops", "weights")
    assert failures(report) == []
    assert found(report, "weights", "weights").seen.startswith("all ")
    assert found(report, "tokens", "ids of the reference").result is Result.PASS
    assert found(report, "template", "the reference's template").result is Result.PASS
    assert found(report, "stops", "a seed repeats its text").seen == "equal on 2 threads and on 1"


def test_a_changed_tensor_is_named(broken: Callable[..., Path], source: Path) -> None:
    def change(file: RawGguf) -> None:
        tensor = file.tensor("blk.1.ffn_down.weight")
        tensor.data = (np.frombuffer(tensor.data, np.float32) * np.float32(1.01)).tobytes()

    report = look(broken(change), source, "weights")
    assert failures(report) == [("weights", "blk.1.ffn_down.weight")]
    assert "relative error 0.01" in found(report, "weights", "blk.1").seen


@pytest.mark.parametrize(
    ("key", "type", "value"),
    [
        ("rope.freq_base_swa", F32, 11_000.0),
        ("rope.freq_base", F32, 999_000.0),
        ("attention.sliding_window", U32, 17),
        ("expert_used_count", U32, 3),
    ],
)
def test_a_wrong_hyperparameter_is_named(
    key: str, type: int, value: float, broken: Callable[..., Path], source: Path
) -> None:
    report = look(broken(lambda file: file.set(A + key, type, value)), source, "shapes")
    assert failures(report) == [("shapes", f"metadata of the reference: {A}{key}")]
    finding = found(report, "shapes", "metadata of the reference")
    assert float(finding.seen) == pytest.approx(value) and finding.seen != finding.expected


def test_a_missing_scale_stops_only_what_needs_the_model(broken: Callable[..., Path], source: Path) -> None:
    name = "blk.1.layer_output_scale.weight"
    report = look(
        broken(lambda file: file.drop_tensor(name)), source, "shapes", "tokens", "stops", "weights", "layers"
    )
    assert failures(report) == [("shapes", "shapes"), ("weights", "tensors missing from the file")]
    assert name in found(report, "shapes", "shapes").seen
    assert found(report, "weights", "tensors missing").seen == name
    assert found(report, "tokens", "ids of the reference").result is Result.PASS
    assert found(report, "stops", "end tokens of the reference").result is Result.PASS
    skipped = [f for f in report.findings if f.result is Result.NOT_CHECKED and "see above" in f.seen]
    assert len(skipped) >= 2 and all("the model can't be loaded" in finding.seen for finding in skipped)


def test_swapped_tokens_are_named(broken: Callable[..., Path], source: Path) -> None:
    def swap(file: RawGguf) -> None:
        tokens = file.get("tokenizer.ggml.tokens").value.items
        tokens[300], tokens[301] = tokens[301], tokens[300]

    report = look(broken(swap), source, "tokens", "template")
    assert ("tokens", "vocabulary of the reference") in failures(report)
    seen = found(report, "tokens", "vocabulary of the reference").seen
    assert seen.startswith("2 tokens differ: 300 is ") and "301 is " in seen
    assert found(report, "template", "the reference's template").result is Result.PASS


def test_a_marker_typed_as_text_is_named(broken: Callable[..., Path]) -> None:
    def change(file: RawGguf) -> None:
        tokens = [item.data for item in file.get("tokenizer.ggml.tokens").value.items]
        file.get(TYPES).value.items[tokens.index(b"<|channel>")] = 1

    report = look(broken(change), None, "tokens")
    assert failures(report) == [("tokens", "types of the chat format's markers")]
    assert "<|channel> (NORMAL)" in found(report, "tokens", "types").seen


def test_an_edited_template(broken: Callable[..., Path], source: Path) -> None:
    def change(file: RawGguf) -> None:
        text = file.get(TEMPLATE).value.data.decode()
        file.set(TEMPLATE, STRING, text.replace("<|turn>model", "<|turn>Model"))

    report = look(broken(change), source, "template")
    assert ("template", "the reference's template") in failures(report)
    assert '"Model' in found(report, "template", "the reference's template").seen
    report = look(broken(lambda file: file.set(TEMPLATE, STRING, "{% for %}")), source, "template")
    assert failures(report) == [("template", "compiles")]
    report = look(broken(lambda file: file.drop(TEMPLATE)), source, "template")
    assert failures(report) == [("template", "chat template")]


@pytest.mark.parametrize(
    ("template", "result"),
    [(OLD_TEMPLATE, Result.WARNING), (OLD_TEMPLATE.replace("format_", "other_"), Result.PASS)],
)
def test_google_s_old_templates_are_recognised(
    template: str, result: Result, broken: Callable[..., Path]
) -> None:
    report = look(broken(lambda file: file.set(TEMPLATE, STRING, template)), None, "template")
    seen = found(report, "template", "turns at tool calls")
    assert seen.result is result
    assert ("loses track of turns" in seen.seen) == (result is Result.WARNING)


def test_the_template_that_is_given_is_checked(broken: Callable[..., Path], source: Path) -> None:
    file = broken(lambda file: file.set(TEMPLATE, STRING, "{% for %}"))
    report = examine(file, None, checks=("template",), runtime={"chat_template": "diffusion-gemma"})
    assert failures(report) == []
    assert found(report, "template", "a tool call and its result").result is Result.PASS


def test_end_tokens_that_are_gone(broken: Callable[..., Path], source: Path) -> None:
    def nameless(file: RawGguf) -> None:
        for key in ("eos_token_id", "eos_token_ids"):
            file.drop(f"tokenizer.ggml.{key}")

    def gone(file: RawGguf) -> None:
        nameless(file)
        tokens = file.get("tokenizer.ggml.tokens").value.items
        for i, token in enumerate(tokens):
            if token.data in (b"<eos>", b"<turn|>"):
                tokens[i] = String(token.data + b"x")

    report = look(broken(nameless), source, "stops")
    assert found(report, "stops", "eos of the metadata").result is Result.WARNING
    report = look(broken(gone), source, "tokens", "stops")
    assert ("tokens", "special tokens") in failures(report)
    assert ("stops", "end tokens") in failures(report)
    assert ("stops", "end tokens of the reference") in failures(report)


def test_a_truncated_file_fails_and_the_page_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(whole.read_bytes()[:-5000])
    assert main(["doctor", str(path)]) == 1
    page = capsys.readouterr().out
    assert "What failed:" in page and "- file, file: " in page and "is truncated" in page
    assert page.count("the file can't be read: see above") >= 7
    assert str(tmp_path) not in page


def test_a_file_of_another_architecture(broken: Callable[..., Path]) -> None:
    report = look(
        broken(lambda file: file.set("general.architecture", STRING, "gemma4")), None, "file", "shapes"
    )
    assert failures(report) == [("file", "architecture"), ("shapes", "shapes")]
    assert "gemma4" in found(report, "file", "architecture").seen


def test_weights_that_are_not_finite(broken: Callable[..., Path]) -> None:
    def change(file: RawGguf) -> None:
        tensor = file.tensor("blk.2.attn_q.weight")
        values = np.frombuffer(tensor.data, np.float32).copy()
        values[7] = np.nan
        tensor.data = values.tobytes()

    report = look(broken(change), None, "file")
    assert failures(report) == [("file", "weights are finite")]
    assert "blk.2.attn_q.weight" in found(report, "file", "weights are finite").seen


def test_the_digest_is_that_of_the_tensors(
    whole: Path, broken: Callable[..., Path], tmp_path: Path, gguf_file: Callable[..., Path]
) -> None:
    """Metadata and split don't change it; a weight does."""
    from pydiffusion.convert import repack

    def digest(path: Path) -> str:
        return found(look(path, None, "file"), "file", "digest").seen

    def weight(file: RawGguf) -> None:
        tensor = file.tensor("output_norm.weight")
        tensor.data = bytes([tensor.data[0] ^ 1]) + tensor.data[1:]

    first = digest(whole)
    assert len(first) == 32
    assert digest(broken(lambda file: file.set("general.name", STRING, "x"))) == first
    assert digest(broken(weight)) != first
    repack(whole, tmp_path / "parts.gguf", split_max_size=1_000_000)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    assert digest(parts[1]) == first
    parts[2].unlink()
    report = look(parts[0], None, "file")
    assert failures(report) == [("file", "file")] and parts[2].name in found(report, "file", "file").seen


def test_the_reference_of_another_model(
    whole: Path, checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    report = look(whole, checkpoint_folder("small", seed=1), "weights")
    listed = [what for _, what in failures(report)]
    assert len(listed) == 6 and listed[5].endswith(" more tensors")
    report = look(whole, checkpoint_folder("wide"), "shapes", "weights")
    keys = [what for _, what in failures(report) if what.startswith("metadata of the reference")]
    assert f"metadata of the reference: {A}block_count" in keys
    assert ("weights", "tensors missing from the file") in failures(report)
    empty = tmp_path / "empty"
    empty.mkdir()
    report = look(whole, empty, "shapes", "tokens", "weights")
    assert failures(report) == [("shapes", "shapes")]
    assert "config.json" in found(report, "shapes", "shapes").seen
    finding = found(report, "weights", "weights of the reference")
    assert finding.result is Result.NOT_CHECKED and finding.seen == "the reference has no weights"


def test_the_reference_s_small_files_are_enough_for_most(
    whole: Path, source: Path, broken: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "small files"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    report = look(whole, folder, "shapes", "tokens", "template", "stops", "weights", "layers")
    assert failures(report) == []
    assert found(report, "shapes", "metadata of the reference").result is Result.PASS
    assert found(report, "tokens", "ids of the reference").result is Result.PASS
    skipped = {f.what for f in report.findings if f.seen == "the reference has no weights"}
    assert skipped == {"weights of the reference", "layer by layer against transformers"}
    path = broken(lambda file: file.set(A + "rope.freq_base", F32, 5e5))
    assert failures(look(path, folder, "shapes")) == [
        ("shapes", f"metadata of the reference: {A}rope.freq_base")
    ]


def test_without_torch_the_layers_are_not_checked(
    whole: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_check.importlib.util, "find_spec", lambda name: None)
    finding = found(look(whole, source, "layers"), "layers", "layer by layer")
    assert finding.result is Result.NOT_CHECKED and finding.seen == "torch is not installed"
    assert "pip install" in finding.advice


def test_too_little_memory_for_a_layer(whole: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="NOT CHECKED: memory of the comparison of layers; needs torch")
    monkeypatch.setattr(layers_check, "_available_bytes", lambda: 1_000_000)
    finding = found(look(whole, source, "layers"), "layers", "layer by layer")
    assert finding.result is Result.NOT_CHECKED and "1 MB are free" in finding.seen


def test_texts_that_differ_between_threads_fail(whole: Path) -> None:
    """No machine at hand does this, so the loader swaps the seed."""
    subject, section = Subject(whole, runtime={"n_threads": 2, "n_gpu_layers": 0}), Section("stops")
    load, seeds = subject.load, iter((0, 1))

    def other_seed(**changed: object) -> DiffusionModel:
        model, seed = load(**changed), next(seeds)
        generate = model.generate
        model.generate = lambda prompt, **options: generate(prompt, **(options | {"seed": seed}))
        return model

    subject.load = other_seed
    stops_check._check_threads(subject, section)
    (finding,) = section.findings
    assert finding.result is Result.FAILED and "tokens differ from" in finding.seen


def test_memory_beyond_the_plan_is_a_warning(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(whole, runtime={"n_threads": 1, "n_gpu_layers": 0})
    sections: list[Section] = []
    for allowed in (200_000_000, -1_000_000_000):
        monkeypatch.setattr(speed_check, "_MORE_BYTES", allowed)
        sections.append(Section("speed"))
        speed_check._check_memory(subject, sections[-1])
    results = [[f.result for f in section.findings if f.what.startswith("memory")] for section in sections]
    assert results == [[Result.PASS], [Result.WARNING]]


def test_memory_of_adapters_is_planned(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_random_gguf(tmp_path / "adapter.gguf", whole, 1)
    monkeypatch.setattr(speed_check, "_MORE_BYTES", -1_000_000_000)  # so that it shows what it expects
    section = Section("speed")
    runtime = {"n_threads": 1, "n_gpu_layers": 0, "lora": [(adapter, 1.0)]}
    speed_check._check_memory(Subject(whole, runtime=runtime), section)
    (finding,) = section.findings
    assert re.search(r"\(weights, cache, step, adapters: (\S+ \S+ \+ ){3}[1-9]", finding.expected)


def test_a_fault_of_our_own_does_not_end_the_examination(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydiffusion.quality.doctor import examination

    def fails(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setitem(examination.CHECKS, "file", (fails,))
    report = look(whole, None, "file", "tokens")
    assert failures(report) == [("file", "file")]
    assert found(report, "file", "file").seen == "KeyError: 'oops'"
    assert found(report, "tokens", "texts survive").result is Result.PASS


def test_wrong_arguments(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        return main(["doctor", *arguments])

    assert run(str(tmp_path / "none.gguf")) == 1
    assert run(str(whole), "--reference", str(whole)) == 2
    assert run(str(whole), "-o", str(whole)) == 1
    assert "is one of the files being read" in capsys.readouterr().err
    assert run(str(whole), "-o", str(tmp_path / "no" / "page.md")) == 1
    assert "no such folder" in capsys.readouterr().err


def test_markdown_is_one_line_per_check() -> None:
    section = Section("file")
    section.fail("a|b", "two\nlines <b> & *stars*", "`code`", "do_this")
    page = page_of(Report("x.gguf", [], [section]), Path("x.gguf"))
    line = next(line for line in page.splitlines() if line.startswith("| a"))
    assert line == ("| a\\|b | **FAILED** | two lines \\<b\\> &amp; \\*stars\\* | \\`code\\` | do\\_this |")


def arrays(items: Sequence[int]) -> Array:
    return Array(I32, list(items))


def test_scalars_and_arrays_are_the_same(broken: Callable[..., Path], source: Path) -> None:
    def change(file: RawGguf) -> None:
        for key in ("attention.head_count", "feed_forward_length"):
            file.set(A + key, ARRAY, arrays([file.get(A + key).value] * 3))
        file.set(A + "attention.sliding_window_pattern", U32, 3)
        file.drop(A + "attention.causal")

    report = look(broken(change), source, "shapes")
    assert failures(report) == []


def test_a_copy_elsewhere_gives_the_same_page(whole: Path, tmp_path: Path) -> None:
    """So that pages of two owners can be compared line by line."""
    copy = tmp_path / "with spaces" / whole.name
    copy.parent.mkdir()
    shutil.copy(whole, copy)
    checks = ("file", "shapes", "tokens", "template")
    pages = [page_of(look(path, None, *checks), path) for path in (whole, copy)]
    assert pages[0] == pages[1]


def test_the_released_checkpoint_s_metadata() -> None:
    """Against the figures of its config.json and generation_config.json."""
    wanted = released.released_metadata()
    own = {key.removeprefix(A): value for key, value in wanted.items()}
    assert (own["block_count"], own["embedding_length"], own["expert_count"]) == (30, 2816, 128)
    assert own["attention.sliding_window_pattern"] == [i % 6 != 5 for i in range(30)]
    assert own["attention.head_count_kv"] == [8 if i % 6 != 5 else 2 for i in range(30)]
    assert (own["diffusion.canvas_length"], own["diffusion.eb_max_steps"]) == (256, 48)
    assert released.is_released(wanted) and not released.is_released(wanted | {A + "block_count": 29})
    assert released.differences(wanted, wanted) == []
    others = wanted | {A + "attention.sliding_window_pattern": 6, A + "feed_forward_length": [2304] * 30}
    del others[A + "attention.causal"]
    assert released.differences(others, wanted) == []
    for key, value in ((A + "rope.freq_base", 1e4), (A + "feed_forward_length", 2048)):
        assert released.differences(wanted | {key: value}, wanted) == [(key, value, wanted[key])]
    del others["diffusion.eb_t_min"]
    assert [key for key, *_ in released.differences(others, wanted)] == ["diffusion.eb_t_min"]
    assert "diffusion.eb_t_min" in released.sampler_keys(wanted)
