"""Reports of a request in progress, from which its response is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from pydiffusion.events import CanvasEvent, Event, ToolCall

from .errors import ApiError


@dataclass(frozen=True)
class Prefilled:
    """The prompt of a run is in the cache; ``n_cached`` tokens were reused."""

    n_cached: int


@dataclass(frozen=True)
class Failed:
    """The request failed with this error."""

    error: ApiError


@dataclass(frozen=True)
class Finished:
    """All runs of the request are done."""


# Reported together with the index of the run.
Report: TypeAlias = Prefilled | Event | Failed | Finished


def up_to_first_call(event: CanvasEvent) -> tuple[CanvasEvent, bool]:
    """The event without what follows a tool call, and whether it has one."""
    for i, part in enumerate(event.parts):
        if isinstance(part, ToolCall):
            return replace(event, parts=event.parts[: i + 1]), True
    return event, False
