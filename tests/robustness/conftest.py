"""The worker process in which suspect files are opened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.hostile_process import Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()
