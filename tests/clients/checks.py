"""Run a client's checks one by one and print a line for each: what run.sh makes its table of."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
MODEL = os.environ.get("CLIENTS_MODEL", "demo")
QUESTION = [{"role": "user", "content": "Who was Ada Lovelace?"}]


def run(client: str, checks: list[Callable[[], None]]) -> None:
    """Exits with 1 if a check raised; the name of a check is its function's."""
    failed = False
    for check in checks:
        name = f"{client}: {check.__name__.replace('_', ' ')}"
        try:
            check()
        except Exception as error:
            failed = True
            traceback.print_exc()
            print(f"FAIL {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        else:
            print(f"PASS {name}", flush=True)
    sys.exit(failed)
