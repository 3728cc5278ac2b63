"""Results of an examination, and the page that shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Result(Enum):
    """Result of one check."""

    PASS = "pass"
    WARNING = "warning"
    FAILED = "FAILED"
    NOT_CHECKED = "NOT CHECKED"


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, what was expected, and what to do about the difference."""

    what: str
    result: Result
    seen: str
    expected: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Table:
    """Figures beside the findings. ``rows``: one tuple per row, with as many cells as ``heads``."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """Findings about one subject, in the order in which they were made."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def passed(self, what: str, seen: str, expected: str = "") -> None:
        """Add a check that found nothing wrong."""
        self.findings.append(Finding(what, Result.PASS, seen, expected))

    def warn(self, what: str, seen: str, expected: str, advice: str) -> None:
        """Add a check that found something to look at."""
        self.findings.append(Finding(what, Result.WARNING, seen, expected, advice))

    def fail(self, what: str, seen: str, expected: str, advice: str) -> None:
        """Add a check that found something wrong."""
        self.findings.append(Finding(what, Result.FAILED, seen, expected, advice))

    def skip(self, what: str, why: str, advice: str = "") -> None:
        """Add a check that could not be made."""
        self.findings.append(Finding(what, Result.NOT_CHECKED, why, "", advice))

    def judge(
        self, right: bool, what: str, seen: str, expected: str, advice: str, wrong: Result = Result.FAILED
    ) -> None:
        """Add a check that passes if it is ``right``, and else has the result ``wrong``."""
        self.findings.append(
            Finding(what, Result.PASS if right else wrong, seen, expected, "" if right else advice)
        )

    @property
    def summary(self) -> str:
        """Its worst result, and how much of it was not checked."""
        found = Counter(finding.result for finding in self.findings)
        n_skipped = found.pop(Result.NOT_CHECKED, 0)
        worst = next((r for r in (Result.FAILED, Result.WARNING, Result.PASS) if found[r]), None)
        skipped = f"{n_skipped} NOT CHECKED" if worst else Result.NOT_CHECKED.value
        return ", ".join(([worst.value] if worst else []) + ([skipped] if n_skipped else []))


@dataclass
class Report:
    """An examination. ``facts``: what was examined, on which machine, as (name, value)."""

    name: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    @property
    def findings(self) -> Iterator[Finding]:
        """The findings of all sections."""
        return (finding for section in self.sections for finding in section.findings)

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(finding.result is Result.FAILED for finding in self.findings)

    def cleaned(self, clean: Callable[[str], str]) -> Report:
        """A copy with every text changed by ``clean``."""
        sections = [
            Section(
                section.title,
                [
                    Finding(clean(f.what), f.result, clean(f.seen), clean(f.expected), clean(f.advice))
                    for f in section.findings
                ],
                [
                    Table(clean(t.title), t.heads, [[clean(cell) for cell in row] for row in t.rows])
                    for t in section.tables
                ],
            )
            for section in self.sections
        ]
        return Report(clean(self.name), [(name, clean(value)) for name, value in self.facts], sections)

    def page(self) -> str:
        """The report in Markdown."""
        counts = Counter(finding.result for finding in self.findings)
        total = sum(counts.values())
        parts = [f"{counts[result]} {result.value}" for result in Result if counts[result]]
        verdict = "FAILED" if self.failed else "nothing failed"
        lines = [
            f"# pydiffusion doctor: {_cell(self.name)}",
            f"**{verdict}**, {total} checks: {', '.join(parts)}",
            _table(("", ""), [(name, _cell(value)) for name, value in self.facts]),
        ]
        lines.append(_list_of(self, Result.FAILED, "What failed"))
        lines.append(_list_of(self, Result.NOT_CHECKED, "What was NOT CHECKED"))
        for section in self.sections:
            lines.append(f"## {section.title}: {section.summary}")
            rows = [
                [_cell(f.what), _shown(f.result), *map(_cell, (f.seen, f.expected, f.advice))]
                for f in section.findings
            ]
            lines.append(_table(("check", "result", "seen", "expected", "what to do"), rows))
            for table in section.tables:
                cells = [list(map(_cell, row)) for row in table.rows]
                lines += [f"{table.title}:", _table(table.heads, cells)]
        return "\n\n".join(line for line in lines if line) + "\n"


def _shown(result: Result) -> str:
    return result.value if result is Result.PASS else f"**{result.value}**"


def _list_of(report: Report, result: Result, title: str) -> str:
    """A list of the findings with one result, at the top of the page; empty if there are none."""
    lines = [
        f"- {section.title}, {_cell(finding.what)}: {_cell(finding.seen)}"
        for section in report.sections
        for finding in section.findings
        if finding.result is result
    ]
    return "\n".join([f"{title}:", "", *lines]) if lines else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """The text on one line, with nothing that Markdown or HTML would take for markup."""
    line = " ".join(text.split())
    for character in "\\`*_<>|":
        line = line.replace(character, f"\\{character}")
    return line.replace("&", "&amp;")
