"""Check the layers of native/, pydiffusion/ and convert/: includes and imports point downwards only.

    python scripts/layers.py

A room is a folder; of pydiffusion/ and convert/, each file at the top is a room of its own. A room may use
itself and the rooms before it in the order below, and no Python module the private names of another one.
Prints the arrows between rooms, and every violation (an arrow upwards, a cycle of files, a limit, a private
name) as ``path:line: what is wrong``; exit code 1 when there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The layers, lowest first.
NATIVE_ORDER = (
    "util", "gguf", "sampler",
    "backend/cpu/amx", "backend/cpu", "backend", "backend/ops", "backend/cuda",
    "model", "adapters", "kv_cache", "graph", "architectures", "vision", "quantization", "runtime", "bench",
    "bindings",
    "tests/cuda_emulation", "tests/toy", "tests",
)  # fmt: skip
PYTHON_ORDER = (
    "errors", "_util", "chat/formats", "tokenizer", "options", "chat", "events", "chat_output", "demo",
    "constrained", "vision", "generation",
    "convert/gguf", "convert/checkpoint", "convert/checkpoint/quantized",
    "convert/architectures/architecture", "convert/architectures/diffusion_gemma", "convert/architectures",
    "adapters", "convert/quantization", "convert/conversion", "convert/repacking", "convert/verification",
    "sampling", "device_plan", "session", "openai", "openai/batch", "model",
    "quality", "testing", "quality/doctor", "convert/__init__", "server", "__init__", "cli", "__main__",
)  # fmt: skip

# Files at the top of a folder at most, and arrows between rooms at most, where native's folders and
# all of convert/ count as one room each; those of native's tests, which use whatever they test, don't count.
MAX_TOP_FILES = {"native": 4, "convert": 4, "pydiffusion": 12, "tests": 4}
MAX_ARROWS = {"native": 48, "python": 100}

_SOURCES = (".h", ".hpp", ".cuh", ".c", ".cpp", ".cu")
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
# Modules that only hand names on: an import from them counts as one of the module that a name comes from.
_FACADES = ("pydiffusion", "pydiffusion.convert")
_FACADE_TABLE = "_NAME_TO_MODULE"
# Private modules that all of the package may import; others belong to the folder that they are in.
_SHARED_PRIVATE = ("_native", "_util")
# Names with an underscore that Python documents: of named tuples, and of sys.
_DOCUMENTED = ("_asdict", "_fields", "_make", "_replace", "_getframe")


@dataclass(frozen=True)
class Use:
    """A file that includes or imports another one. line: where."""

    path: Path
    line: int
    used: Path


@dataclass(frozen=True)
class Tree:
    """Files that use each other. order: of the rooms, lowest first."""

    name: str
    rooms: Mapping[Path, str]
    uses: Sequence[Use]
    order: Sequence[str]

    def arrows(self) -> dict[tuple[str, str], list[Use]]:
        """The uses that cross from one room into another."""
        found: dict[tuple[str, str], list[Use]] = {}
        for use in self.uses:
            pair = self.rooms[use.path], self.rooms[use.used]
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(use)
        return dict(sorted(found.items()))

    def outer_arrows(self) -> set[tuple[str, str]]:
        """The arrows between outermost rooms: ``backend`` with all that is in it, ``convert``."""
        pairs = ((user.partition("/")[0], used.partition("/")[0]) for user, used in self.arrows())
        return {(user, used) for user, used in pairs if user != used}

    def violations(self) -> list[str]:
        """Arrows that point upwards, rooms that the order doesn't name, cycles of files."""
        found = []
        for room in sorted(set(self.rooms.values()) - set(self.order)):
            path = min(path for path, its in self.rooms.items() if its == room)
            found.append(f"{path}:1: room {room} is in no layer: add it to {self.name}'s order in {_HERE}")
        for (user, used), uses in self.arrows().items():
            if {user, used} <= set(self.order) and self.order.index(used) > self.order.index(user):
                order = " < ".join(self.order)
                found += [
                    f"{use.path}:{use.line}: room {user} may not use room {used} (order: {order})"
                    for use in uses
                ]
        for cycle in cycles(self.uses):
            first = cycle[0]
            way = " -> ".join(str(path) for path in (first.path, *(use.used for use in cycle)))
            found.append(f"{first.path}:{first.line}: cycle: {way}")
        return found


_HERE = "scripts/layers.py"


def native_tree(root: Path, order: Sequence[str] = NATIVE_ORDER) -> Tree:
    """The sources of ``root/native`` and their includes in quotes; ggml's own headers are not in the tree."""
    top = Path("native")
    files = [p.relative_to(root) for p in sorted((root / top).rglob("*")) if p.suffix in _SOURCES]
    rooms = {path: path.parent.relative_to(top).as_posix() for path in files}
    uses = []
    for path in files:
        for number, line in enumerate((root / path).read_text(encoding="utf-8").splitlines(), 1):
            if found := _INCLUDE.match(line):
                places = (path.parent / found[1], top / found[1])
                normal = (Path(_normalized(place)) for place in places)
                used = next((place for place in normal if place in rooms), None)
                uses += [Use(path, number, used)] if used is not None else []
    return Tree("native", rooms, uses, order)


def _normalized(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def python_tree(root: Path, order: Sequence[str] = PYTHON_ORDER) -> Tree:
    """The modules of pydiffusion/ and convert/ (``pydiffusion.convert``) and their imports of each other.

    Imports within functions count, those for type checkers don't.
    """
    modules = _python_modules(root)
    files = list(modules.values())
    facades = {name: _facade_table(root, modules[name], name) for name in _FACADES if name in modules}
    uses = []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in _imports(ast.parse((root / path).read_text(encoding="utf-8"))):
            for used in _imported(node, package, modules, facades):
                if modules[used] != path:
                    uses.append(Use(path, node.lineno, modules[used]))
    return Tree("python", {path: _python_room(path, order) for path in files}, uses, order)


def _python_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of pydiffusion/ and of convert/, which is ``pydiffusion.convert``."""
    paths = [path for top in ("pydiffusion", "convert") for path in sorted((root / top).rglob("*.py"))]
    return {_module(path): path for path in (path.relative_to(root) for path in paths)}


def _module(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    parts = ["pydiffusion", *parts] if parts[0] == "convert" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _python_room(path: Path, order: Sequence[str]) -> str:
    """The folder; of files at the top, and of others that the order names, the file: ``model``,
    ``convert/verification``.
    """
    file = path.with_suffix("").as_posix().removeprefix("pydiffusion/")
    is_room = len(path.parts) <= 2 or file in order
    return file if is_room else path.parent.as_posix().removeprefix("pydiffusion/")


def _facade_table(root: Path, path: Path, package: str) -> dict[str, str]:
    """Name -> module, of the table that a facade imports from on first use."""
    for node in ast.parse((root / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == _FACADE_TABLE:
            table = ast.literal_eval(node.value)
            return {
                name: module if module.startswith("pydiffusion") else f"{package}.{module}"
                for name, module in table.items()
            }
    return {}


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in a node, but for those under ``if TYPE_CHECKING``."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _imports(child)


def _imported(
    node: ast.Import | ast.ImportFrom,
    package: str,
    modules: Mapping[str, Path],
    facades: Mapping[str, Mapping[str, str]],
) -> Iterator[str]:
    """The modules of the tree that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
        return
    base = _base(node, package)
    for alias in node.names:
        target = facades.get(base, {}).get(alias.name) or f"{base}.{alias.name}"
        if target in modules:
            yield target
        elif base in modules and base not in facades:
            yield base


def _base(node: ast.ImportFrom, package: str) -> str:
    """The dotted name that a statement imports from."""
    base = node.module or ""
    if not node.level:
        return base
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parents, base] if base else parents)


def private_uses(root: Path) -> list[str]:
    """Private names of one module, of its classes or of another folder's modules, used in another one.

    Of an object other than ``self``, a method may use what its own class defines.
    """
    modules = _python_modules(root)
    found = []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        uses = [*_private_imports(tree, package, modules), *_private_attributes(tree, frozenset())]
        found += [f"{path}:{line}: {text} is private to another module" for line, text in sorted(uses)]
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in _DOCUMENTED


def _private_imports(
    tree: ast.Module, package: str, modules: Mapping[str, Path]
) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{_base(node, package)}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] != "pydiffusion":
                continue
            for i, part in enumerate(parts):
                parent = ".".join(parts[:i])
                own_folder = parent == package and f"{parent}.{part}" in modules
                if _is_private(part) and part not in _SHARED_PRIVATE and not own_folder:
                    yield node.lineno, target


def _private_attributes(node: ast.AST, own: frozenset[str]) -> Iterator[tuple[int, str]]:
    """own: the names that the class around the node defines."""
    if isinstance(node, ast.ClassDef):
        own = frozenset(_defined(node))
    if isinstance(node, ast.Attribute) and _is_private(node.attr):
        name = node.value.id if isinstance(node.value, ast.Name) else None
        of_super = ast.unparse(node.value) == "super()"
        if name not in ("self", "cls") and not of_super and (name is None or node.attr not in own):
            yield node.lineno, ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from _private_attributes(child, own)


def _defined(node: ast.ClassDef) -> Iterator[str]:
    """Names of a class's methods and attributes, also of those that its methods assign."""
    for child in ast.walk(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield from [child.attr] if ast.unparse(child.value) in ("self", "cls") else []


def cycles(uses: Iterable[Use]) -> list[list[Use]]:
    """One cycle of files for each file that leads back to itself, each cycle once."""
    outgoing: dict[Path, list[Use]] = {}
    for use in uses:
        outgoing.setdefault(use.path, []).append(use)
    found: list[list[Use]] = []
    for start in sorted(outgoing):
        if any(start == use.path for cycle in found for use in cycle):
            continue
        way = _way_back(start, outgoing)
        if way:
            found.append(way)
    return found


def _way_back(start: Path, outgoing: Mapping[Path, list[Use]]) -> list[Use]:
    """The shortest chain of uses from a file to itself, or nothing."""
    before: dict[Path, Use] = {}
    waiting = [start]
    for path in waiting:
        for use in outgoing.get(path, []):
            if use.used not in before:
                before[use.used] = use
                waiting.append(use.used)
    if start not in before:
        return []
    way = [before[start]]
    while way[0].path != start:
        way.insert(0, before[way[0].path])
    return way


def top_files(root: Path) -> dict[str, int]:
    """How many files each top folder has beside its folders; what a build leaves there doesn't count."""
    built = {".so", ".pyd", ".pyc"}
    return {
        name: sum(path.suffix not in built for path in (root / name).iterdir() if path.is_file())
        for name in MAX_TOP_FILES
        if (root / name).is_dir()
    }


def limits(root: Path, trees: Iterable[Tree]) -> list[str]:
    """Counts that are above their limits."""
    found = [
        f"{name}: {count} files at the top, at most {MAX_TOP_FILES[name]}: move some into folders"
        for name, count in top_files(root).items()
        if count > MAX_TOP_FILES[name]
    ]
    for tree in trees:
        count = sum(user != "tests" for user, _ in tree.outer_arrows())
        most = MAX_ARROWS[tree.name]
        if count > most:
            found.append(f"{tree.name}: {count} arrows between outermost rooms, at most {most}")
    return found


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    trees = [native_tree(root), python_tree(root)]
    print("files at the top:", ", ".join(f"{name} {count}" for name, count in top_files(root).items()))
    for tree in trees:
        arrows = tree.arrows()
        outer = {room.partition("/")[0] for room in tree.rooms.values()}
        print(
            f"\n{tree.name}: {len(outer)} outermost rooms with {len(tree.outer_arrows())} arrows; in all, "
            f"{len(set(tree.rooms.values()))} with {len(arrows)}"
        )
        for (user, used), uses in arrows.items():
            print(f"  {user} -> {used} ({len(uses)})")
    wrong = [line for tree in trees for line in tree.violations()] + limits(root, trees) + private_uses(root)
    print("", *(wrong or ["no violations"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
