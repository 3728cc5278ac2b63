"""The server's counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Scheduler


class Metrics:
    """Counts HTTP responses; ``text`` adds the scheduler's counters."""

    def __init__(self, paths: Collection[str]) -> None:
        """paths: counted by name, others together: who requests made-up ones must not fill the memory."""
        self._paths = paths
        self._responses: Counter[tuple[str, int]] = Counter()

    def count(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses[path if path in self._paths else "other", status] += 1

    def text(self, scheduler: Scheduler) -> str:
        work = scheduler.counters
        answers = {
            f'{{path="{path}",status="{status}"}}': count
            for (path, status), count in sorted(self._responses.items())
        }
        counts = (
            ("http_responses_total", "counter", "Answers by path and status.", answers),
            ("requests_waiting", "gauge", "Requests in the queue.", {"": scheduler.n_waiting}),
            ("requests_active", "gauge", "Requests being served.", {"": scheduler.n_active}),
            ("requests_cancelled_total", "counter", "Requests stopped early.", {"": work.cancelled}),
            ("lanes", "gauge", "In-flight sequences, denoised in one batch.", {"": scheduler.n_in_flight}),
            ("lanes_limit", "gauge", "Most sequences in flight.", {"": scheduler.n_parallel}),
            ("sessions", "gauge", "Sessions that hold a cache.", {"": scheduler.n_sessions}),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", {"": work.prompt_tokens}),
            ("cached_tokens_total", "counter", "Of these, found in a cache.", {"": work.cached_tokens}),
            ("generated_tokens_total", "counter", "Tokens generated.", {"": work.generated_tokens}),
            ("canvases_total", "counter", "Canvases finished.", {"": work.canvases}),
            ("steps_total", "counter", "Denoising steps.", {"": work.steps}),
            ("busy_seconds_total", "counter", "Seconds spent computing.", {"": round(work.busy_seconds, 6)}),
        )
        return "".join(_metric(*count) for count in counts)


def _metric(name: str, kind: str, meaning: str, samples: Mapping[str, float]) -> str:
    """A metric's lines. samples: labels, with their braces, -> value."""
    lines = [f"# HELP pydiffusion_{name} {meaning}", f"# TYPE pydiffusion_{name} {kind}"]
    lines += [f"pydiffusion_{name}{labels} {value}" for labels, value in samples.items()]
    return "".join(f"{line}\n" for line in lines)
