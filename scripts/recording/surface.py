"""The public surface: names, signatures, members; the files of the package."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pydiffusion

from .record import Record

MODULES = ("pydiffusion", "pydiffusion.convert", "pydiffusion.sampling")


def record(record: Record) -> None:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        record.value(f"surface/{module_name}/all", sorted(module.__all__))
        for name in sorted(module.__all__):
            if name != "__version__":
                _record_object(record, f"surface/{module_name}.{name}", getattr(module, name))


def _record_object(record: Record, key: str, value: Any) -> None:
    if inspect.isclass(value):
        record.value(f"{key}/bases", [base.__name__ for base in value.__mro__[1:]])
        names = [name for name in dir(value) if not name.startswith("_") or name == "__init__"]
        record.value(f"{key}/members", names)
        record.text(f"{key}/doc", value.__doc__ or "")
        for name in names:
            _record_callable(record, f"{key}.{name}", inspect.getattr_static(value, name))
    elif callable(value):
        _record_callable(record, key, value)
    else:
        record.value(key, repr(value))


def _record_callable(record: Record, key: str, value: Any) -> None:
    """Names, kinds and defaults of parameters are values; annotations, which name modules, are texts."""
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    plain = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    record.value(f"{key}/signature", str(plain))
    record.text(f"{key}/signature", str(signature))
    record.text(f"{key}/doc", inspect.getdoc(value) or "")


def package_files() -> list[str]:
    """The files of the installed package, as its folder has them (links followed), but for caches."""
    root = Path(pydiffusion.__file__).parent
    found = []
    folders = [root]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir() and path.name != "__pycache__":
                folders.append(path)
            elif path.is_file() and path.suffix != ".pyc":
                found.append(path.relative_to(root.parent).as_posix())
    return sorted(found)
