"""The layers of the tree, as scripts/layers.py declares them, and that the checker finds what breaks them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import REPOSITORY
from support.scripts import load_script

SCRIPT = REPOSITORY / "scripts" / "layers.py"


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    return load_script("scripts/layers.py")


# This repository


@pytest.fixture(scope="module")
def native(layers: ModuleType) -> Any:
    return layers.native_tree(REPOSITORY)


@pytest.fixture(scope="module")
def python(layers: ModuleType) -> Any:
    return layers.python_tree(REPOSITORY)


def test_no_include_points_upwards_or_in_a_circle(native: Any) -> None:
    assert len(native.rooms) > 60 and len(native.uses) > 100, "the sources were not found"
    assert native.violations() == []


def test_no_import_points_upwards_or_in_a_circle(python: Any) -> None:
    assert len(python.rooms) > 80 and len(python.uses) > 200, "the sources were not found"
    assert python.violations() == []


def test_the_orders_name_only_rooms_that_exist(layers: ModuleType, native: Any, python: Any) -> None:
    assert set(layers.PYTHON_ORDER) == set(python.rooms.values())
    assert set(layers.NATIVE_ORDER) - set(native.rooms.values()) <= {"tests"}


def test_few_files_at_the_top_and_few_arrows(layers: ModuleType, native: Any, python: Any) -> None:
    assert set(layers.top_files(REPOSITORY)) == {"native", "convert", "pydiffusion", "tests"}
    assert layers.limits(REPOSITORY, [native, python]) == []
    assert layers.MAX_TOP_FILES == {"native": 4, "convert": 4, "pydiffusion": 12, "tests": 4}
    assert layers.MAX_ARROWS == {"native": 48, "python": 100}


def test_no_module_uses_the_private_names_of_another(layers: ModuleType) -> None:
    assert layers.private_uses(REPOSITORY) == []


def test_the_script_prints_rooms_and_says_that_all_is_well() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  graph -> backend (" in done.stdout and "no violations" in done.stdout


# The checker, on trees of a few files


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_an_include_upwards_is_named_with_its_line(layers: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "native/util/error.h": '#include <string>\n#include "ggml.h"\n',
            "native/gguf/file.h": '#include "util/error.h"\n',
            "native/gguf/file.cpp": '// maps\n\n#include "file.h"\n  #  include "../model/model.h"\n',
            "native/model/model.h": '#include "gguf/file.h"\n',
        },
    )
    tree = layers.native_tree(tmp_path, ("util", "gguf", "model"))
    assert set(tree.arrows()) == {("gguf", "util"), ("gguf", "model"), ("model", "gguf")}
    assert tree.violations() == [
        "native/gguf/file.cpp:4: room gguf may not use room model (order: util < gguf < model)"
    ]
    assert layers.native_tree(tmp_path, ("util", "model", "gguf")).violations() == [
        "native/model/model.h:1: room model may not use room gguf (order: util < model < gguf)"
    ]


def test_an_include_beside_the_file_is_found_before_one_at_the_top(
    layers: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path, {"native/a/x.h": "", "native/b/a/x.h": "", "native/b/y.h": '#include "a/x.h"\n'})
    (use,) = layers.native_tree(tmp_path).uses
    assert use.used.as_posix() == "native/b/a/x.h"


def test_a_cycle_of_headers_is_named_file_by_file(layers: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "native/util/a.h": '\n#include "b.h"\n',
            "native/util/b.h": '#include "util/c.h"\n',
            "native/util/c.h": '#include "a.h"\n',
            "native/util/d.h": '#include "a.h"\n',
        },
    )
    assert layers.native_tree(tmp_path, ("util",)).violations() == [
        "native/util/a.h:2: cycle: native/util/a.h -> native/util/b.h -> native/util/c.h -> native/util/a.h"
    ]


PYTHON = {
    "pydiffusion/__init__.py": '_NAME_TO_MODULE = {"Model": "model", "run": "cli.run"}\n',
    "pydiffusion/errors.py": "",
    "pydiffusion/model.py": "from .errors import Error\n",
    "pydiffusion/cli/__init__.py": "",
    "pydiffusion/cli/run.py": "from pydiffusion import Model\nfrom pydiffusion.model import x\nimport os\n",
    "convert/__init__.py": '_NAME_TO_MODULE = {"write": "pydiffusion.convert.gguf.writer"}\n',
    "convert/gguf/__init__.py": "",
    "convert/gguf/writer.py": "import pydiffusion.errors\n",
}
ORDER = ("errors", "convert/gguf", "model", "convert/__init__", "__init__", "cli")


@pytest.mark.parametrize(
    ("statement", "line", "used"),
    [
        ("from pydiffusion.cli.run import f", 2, "cli"),
        ("from .cli import run", 2, "cli"),
        ("from .cli.run import f", 2, "cli"),
        ("from . import cli", 2, "cli"),
        ("import pydiffusion.cli.run", 2, "cli"),
        ("from pydiffusion import run", 2, "cli"),
        ("def f():\n    from pydiffusion.cli import run", 3, "cli"),
        ("if TYPE_CHECKING:\n    import os\nelse:\n    import pydiffusion.cli", 5, "cli"),
        ("import pydiffusion.convert", 2, "convert/__init__"),
        ("try:\n    pass\nfinally:\n    from pydiffusion import convert", 5, "convert/__init__"),
    ],
)
def test_an_import_upwards_is_named_with_its_line(
    statement: str, line: int, used: str, layers: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path, PYTHON | {"pydiffusion/model.py": "from .errors import Error\n" + statement + "\n"})
    wrong = [found for found in layers.python_tree(tmp_path, ORDER).violations() if "cycle" not in found]
    order = " < ".join(ORDER)
    assert wrong == [f"pydiffusion/model.py:{line}: room model may not use room {used} (order: {order})"]


@pytest.mark.parametrize(
    "statement",
    [
        "if TYPE_CHECKING:\n    from .cli.run import f",
        "if typing.TYPE_CHECKING:\n    from pydiffusion.cli import run",
        "from pydiffusion.convert import write",
        "from pydiffusion.convert.gguf.writer import write",
        "from pydiffusion import _native",
        "import numpy.cli",
    ],
)
def test_other_imports_are_permitted(statement: str, layers: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, PYTHON | {"pydiffusion/model.py": statement + "\n"})
    assert layers.python_tree(tmp_path, ORDER).violations() == []


def test_a_cycle_of_modules_is_named_file_by_file(layers: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        PYTHON
        | {
            "pydiffusion/cli/other.py": "\n\ndef f():\n    from . import run\n",
            "pydiffusion/cli/run.py": "from .other import f\n",
        },
    )
    assert layers.python_tree(tmp_path, ORDER).violations() == [
        "pydiffusion/cli/other.py:4: cycle: pydiffusion/cli/other.py -> pydiffusion/cli/run.py -> "
        "pydiffusion/cli/other.py"
    ]


def test_a_room_without_a_layer_is_named(layers: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, PYTHON)
    wrong = layers.python_tree(tmp_path, ORDER[1:]).violations()
    assert wrong == [
        "pydiffusion/errors.py:1: room errors is in no layer: add it to python's order in scripts/layers.py"
    ]


def test_a_file_that_the_order_names_is_a_room(layers: ModuleType, tmp_path: Path) -> None:
    """An interface below a folder's other files, which use what implements it."""
    write(
        tmp_path,
        {
            "convert/kinds/__init__.py": "",
            "convert/kinds/interface.py": "",
            "convert/kinds/registry.py": "from pydiffusion.convert.kinds.one.kind import ONE\n",
            "convert/kinds/one/__init__.py": "",
            "convert/kinds/one/kind.py": "from pydiffusion.convert.kinds.interface import Kind\n",
        },
    )
    order = ("convert/kinds/interface", "convert/kinds/one", "convert/kinds")
    assert layers.python_tree(tmp_path, order).violations() == []
    (wrong,) = layers.python_tree(tmp_path, order[1:]).violations()
    assert wrong.startswith(
        "convert/kinds/one/kind.py:1: room convert/kinds/one may not use room convert/kinds "
    )


@pytest.mark.parametrize(
    ("text", "line", "used"),
    [
        ("def f(model):\n    return model._weights", 2, "model._weights"),
        ("class A:\n    def f(self, b):\n        return b.session._x\n    _x = 1", 3, "b.session._x"),
        ("class A:\n    _x = 1\nclass B:\n    def f(self, a):\n        a._x = 2", 5, "a._x"),
        ("from .model import Model, _start", 1, "pydiffusion.model._start"),
        ("def f():\n    from pydiffusion.model import _start", 2, "pydiffusion.model._start"),
        ("from .cli import _text", 1, "pydiffusion.cli._text"),
        ("from pydiffusion.cli._text import say", 1, "pydiffusion.cli._text.say"),
        ("import os, pydiffusion.cli._text", 1, "pydiffusion.cli._text"),
        ("if TYPE_CHECKING:\n    from pydiffusion import _helper", 2, "pydiffusion._helper"),
    ],
)
def test_a_private_name_of_another_module_is_named_with_its_line(
    text: str, line: int, used: str, layers: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path, PYTHON | {"pydiffusion/cli/_text.py": "", "pydiffusion/session.py": text + "\n"})
    assert layers.private_uses(tmp_path) == [
        f"pydiffusion/session.py:{line}: {used} is private to another module"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def f(self, other):\n        self._x = super()._x\n        return other._x",
        "class A:\n    @classmethod\n    def f(cls):\n        return cls._x",
        "def f(point):\n    return point._replace(x=1), sys._getframe(), f.__name__",
        "from pydiffusion import _native, __version__\nfrom pydiffusion._util.files import check",
        "from . import _text\nfrom ._text import say",
        "from re import _parser",
    ],
)
def test_other_names_may_begin_with_an_underscore(text: str, layers: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, PYTHON | {"pydiffusion/cli/_text.py": "", "pydiffusion/cli/run.py": text + "\n"})
    assert layers.private_uses(tmp_path) == []


def test_too_many_files_or_arrows_are_named(
    layers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        PYTHON
        | {f"native/n{i}.cpp": "" for i in range(4)}
        | {"native/README.md": "", "native/_native.so": ""},
    )
    trees = [layers.native_tree(tmp_path), layers.python_tree(tmp_path)]
    assert layers.limits(tmp_path, trees) == ["native: 5 files at the top, at most 4: move some into folders"]
    monkeypatch.setitem(layers.MAX_ARROWS, "python", 2)
    pairs = trees[1].outer_arrows()
    assert pairs == {("model", "errors"), ("cli", "model"), ("convert", "errors")}
    assert "python: 3 arrows between outermost rooms, at most 2" in layers.limits(tmp_path, trees)
