"""What a request in progress reports, from which its answer is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pydiffusion.events import Event

from .errors import ApiError


@dataclass(frozen=True)
class Prefilled:
    """The prompt of a run is in the cache, of which ``n_cached`` tokens were there already."""

    n_cached: int


@dataclass(frozen=True)
class Failed:
    """The request ends here, with this error."""

    error: ApiError


@dataclass(frozen=True)
class Finished:
    """All runs of the request are done."""


# What a job reports, with the number of the run that it is about.
Report: TypeAlias = Prefilled | Event | Failed | Finished
