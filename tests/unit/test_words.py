"""The field's words in place of our own, as scripts/words.py lists them, and that the checker finds ours."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import REPOSITORY
from support.scripts import load_script

SCRIPT = REPOSITORY / "scripts" / "words.py"


@pytest.fixture(scope="module")
def words() -> ModuleType:
    return load_script("scripts/words.py")


@pytest.fixture(scope="module")
def looked_through(words: ModuleType) -> tuple[dict[Path, str], list[Any], set[Any]]:
    """The repository's texts, what is found in them, and the exceptions that were of use."""
    texts, used = words.texts(REPOSITORY), set()
    return texts, list(words.find(texts, used=used)), used


def test_the_repository_has_the_fields_words(looked_through: tuple[dict, list, set]) -> None:
    texts, found, _ = looked_through
    for name in ("native", "pydiffusion", "convert", "tests", "docs", "README.md"):
        assert any(path.parts[0] == name for path in texts), f"nothing of {name} was read"
    assert [str(each) for each in found] == []


def test_every_exception_allows_something(words: ModuleType, looked_through: tuple[dict, list, set]) -> None:
    entries = {entry for rule in words.RULES for entry in rule.allowed}
    assert entries - looked_through[2] == set(), "take these out of scripts/words.py"


# The checker

OURS = [
    ("native/a.cpp", "// ggml's products\n", "product"),
    ("native/a.cpp", "int n_columns = 3;\n", "columns"),
    ("native/a.h", "// 16 float32 numbers\n", "numbers"),
    ("docs/a.md", "runs on the processor\n", "processor"),
    ("native/runtime/a.cpp", "int n_lanes = 3;\n", "lane"),
    ("pydiffusion/a.py", "self._fill_lanes()\n", "lane"),
    ("pydiffusion/a.py", "from . import placement\n", "placement"),
    ("native/a.h", "class Engine;\n".lower(), "engine"),
    ("native/a.h", "// of portable graphs\n", "portable"),
    ("native/a.cpp", '"%.1f MB more are not to be had"\n', "not to be had"),
    ("README.md", "answers in the making\n", "in the making"),
    ("convert/a.py", '"""A folder; a file is none."""\n', "is none"),
    ("docs/a.md", "an array stands as an object\n", "stands"),
    ("native/a.h", "// where a weight lies\n", "lies"),
    ("docs/a.md", "a step brings events\n", "brings"),
    ("native/a.cpp", "// values (turned over)\n", "turned over"),
    ("docs/a.md", "sessions can be taken back\n", "taken back"),
    ("pydiffusion/a.py", '"""What a request reports."""\n', "What a ..."),
    ("native/a.h", "  // What the bindings share.\n", "What a ..."),
    ("native/a.cpp", "bool unsound;\n", "unsound"),
    ("native/a.cpp", "best_rows(x);\n", "best_rows"),
    ("convert/a.py", "def _filled_up(): ...\n", "filled_up"),
    ("native/a.cpp", '#include "row_ops.h"\n', "row_ops"),
    ("fuzz/README.md", "`Hyperparameters`\n", "Hyperparameters"),
    ("docs/a.md", "`matrix/` has tiles\n", "matrix/"),
    ("tests/unit/a.py", "from pydiffusion.structure import Guide\n", "old modules"),
]


@pytest.mark.parametrize(("name", "text", "word"), OURS)
def test_a_word_of_ours_is_found(name: str, text: str, word: str, words: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, name, "\n\n" + text)
    (found,) = words.find(words.texts(tmp_path))
    assert found.rule.word == word
    assert str(found).startswith(f"{name}:3: ") and str(found).endswith(f": say {found.rule.say}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("convert/a.py", "import itertools\nitertools.product(range(3), repeat=2)\n"),
        ("docs/a.md", "in production, reproduction; a preprocessor and the multiprocessor\n"),
        ("cmake/a.cmake", "${CMAKE_SYSTEM_PROCESSOR}\n"),
        ("convert/a.py", 'LogitsProcessor, "processor_config.json"\nif x is None or there_is_none:\n'),
        ("convert/a.py", "# where there is none, None is returned\n"),
        ("native/backend/cpu/a.cpp", "int lane = 3; n_lanes;\n"),
        ("native/model/a.h", "// Requested device placement; -1 means automatic.\n"),
        (
            "docs/a.md",
            "taken as it stands; what it stands for; a stand-in; a standard; it lies within the file\n",
        ),
        ("tests/unit/a.py", "class StatisticsTest: columns = 3; belies\n"),
        ("README.md", "PYDIFFUSION_PORTABLE=ON builds for any x86-64 CPU; hyperparameters\n"),
    ],
)
def test_other_words_are_permitted(name: str, text: str, words: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, name, text)
    assert [str(found) for found in words.find(words.texts(tmp_path))] == []


@pytest.mark.parametrize("gap", ["\n", "\n// ", "\n    # ", "\n * ", "\n> ", "  "])
def test_a_phrase_is_found_across_lines(gap: str, words: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "native/a.h", f"// first\n// more memory is not to be{gap}had\n")
    (found,) = words.find(words.texts(tmp_path))
    assert (found.rule.word, found.line) == ("not to be had", 2)


def test_an_exception_holds_for_its_files_and_lines_only(words: ModuleType, tmp_path: Path) -> None:
    rule = words.Rule("ours", r"\bours\b", "theirs", allowed=(("native/*", "SIMD", "of vectors"),))
    for name in ("native/a.h", "docs/a.md"):
        write(tmp_path, name, "ours of SIMD\nours\n")
    used: set[Any] = set()
    found = [str(each) for each in words.find(words.texts(tmp_path), [rule], used)]
    assert found == [
        "native/a.h:2: 'ours': say theirs",
        "docs/a.md:1: 'ours': say theirs",
        "docs/a.md:2: 'ours': say theirs",
    ]
    assert used == set(rule.allowed)


def test_data_is_left_out(words: ModuleType, tmp_path: Path) -> None:
    for name in ("tests/reference/goldens/a.md", "fuzz/corpus/a.txt", "vendor/a.md", "native/a.bin"):
        write(tmp_path, name, "the processor\n")
    assert words.texts(tmp_path) == {}


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
