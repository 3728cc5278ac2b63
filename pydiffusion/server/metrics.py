"""The server's counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Scheduler


class Metrics:
    """Counts HTTP responses; ``text`` adds the scheduler's counters."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()

    def text(self, scheduler: Scheduler) -> str:
        work = scheduler.counters
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, samples: Mapping[str, float]) -> None:
            lines.append(f"# HELP pydiffusion_{name} {meaning}")
            lines.append(f"# TYPE pydiffusion_{name} {kind}")
            lines.extend(f"pydiffusion_{name}{labels} {value}" for labels, value in samples.items())

        answers = {
            f'{{path="{path}",status="{status}"}}': count
            for (path, status), count in sorted(self.responses.items())
        }
        add("http_responses_total", "counter", "Answers by path and status.", answers)
        add("requests_waiting", "gauge", "Requests in the queue.", {"": scheduler.n_waiting})
        add("requests_active", "gauge", "Requests being served.", {"": scheduler.n_active})
        add("requests_cancelled_total", "counter", "Requests stopped early.", {"": work.cancelled})
        add("lanes", "gauge", "In-flight sequences, denoised in one batch.", {"": scheduler.n_in_flight})
        add("lanes_limit", "gauge", "Most sequences in flight.", {"": scheduler.n_parallel})
        add("sessions", "gauge", "Sessions that hold a cache.", {"": scheduler.n_sessions})
        add("prompt_tokens_total", "counter", "Tokens of prompts.", {"": work.prompt_tokens})
        add("cached_tokens_total", "counter", "Of these, found in a cache.", {"": work.cached_tokens})
        add("generated_tokens_total", "counter", "Tokens generated.", {"": work.generated_tokens})
        add("canvases_total", "counter", "Canvases finished.", {"": work.canvases})
        add("steps_total", "counter", "Denoising steps.", {"": work.steps})
        add("busy_seconds_total", "counter", "Seconds spent computing.", {"": round(work.busy_seconds, 6)})
        return "\n".join(lines) + "\n"
