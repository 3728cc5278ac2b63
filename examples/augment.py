"""Data augmentation: from a few records and a JSON schema, make new records by the thousand.

    pip install rapidfuzz
    python examples/augment.py seeds.jsonl schema.json MODEL.gguf -o new.jsonl -n 1000 [--task TEXT]

seeds.jsonl has a record per line. Each new record is guaranteed to satisfy the schema. It is asked for by a
task in which $examples are some of the seeds, chosen by the record's number. For more variety, --values is a
JSON file, {"city": ["Rome", ...]}, of which the record's number chooses a value for $city in the task.

Near-duplicates of seeds and of earlier records are dropped, in the order of the numbers, so that the same
command gives the same records, whatever --parallel is. All answers are in new.jsonl.answers: after an
interruption, or with a larger -n, the same command goes on from there; if seeds, task or schema have changed,
it refuses that file.

Exit codes: 0, as many records as asked for; 1, fewer; 2, wrong arguments; 130, interrupted.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz, process

from pydiffusion import DiffusionModel, PyDiffusionError
from pydiffusion.openai.batch.answer_file import AnswerFile
from pydiffusion.openai.batch.answering import Defaults, answer_lines
from pydiffusion.openai.batch.lines import Line, read_input

TASK = "$examples\n\nWrite one more record like these, about something else."


class Prompts:
    """The lines to answer, by number."""

    def __init__(
        self, seeds: Sequence[Any], schema: Any, values: Mapping[str, Sequence[str]], given: Any
    ) -> None:
        """values: of which each record gets one.  given: the arguments task, examples and seed."""
        self._seeds = [json.dumps(record, ensure_ascii=False) for record in seeds]
        self._n_examples = min(given.examples, len(seeds))
        self._schema = schema
        self._values = values
        self._task = string.Template(given.task)
        self._seed = given.seed

    def line(self, number: int) -> Line:
        """number: from 1; the record's random seed is the first one's plus number - 1."""
        rng = random.Random(f"{self._seed}/{number}")
        chosen = {"examples": "\n".join(rng.sample(self._seeds, self._n_examples))}
        chosen |= {name: str(rng.choice(values)) for name, values in self._values.items()}
        try:
            content = self._task.substitute(chosen)
        except (KeyError, ValueError) as error:
            raise ValueError(f"--task: {error} is not $examples, nor a name in --values") from None
        fields = {"messages": [{"role": "user", "content": content}], "json_schema": self._schema}
        return Line(number, f"{zlib.crc32(json.dumps(fields).encode()):08x}", "short", fields)


class Records:
    """Takes answers in any order and decides on them in the order of their numbers."""

    def __init__(self, seeds: Sequence[Any], similarity: float) -> None:
        """similarity: of two records' values, 0 to 1, from which the later one is a near-duplicate."""
        self.kept: list[Any] = []
        self.n_dropped = self.n_failed = 0
        self._cutoff = 100 * similarity
        self._texts = [_values(record) for record in seeds]
        self._waiting: dict[int, Any] = {}
        self._next = 1

    def take(self, answer: dict[str, Any], n_wanted: int) -> None:
        self._waiting[answer["line"]] = answer
        while len(self.kept) < n_wanted and self._next in self._waiting:
            self._decide(self._waiting.pop(self._next))
            self._next += 1

    def _decide(self, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self.n_failed += 1
            print(f"record {answer['line']}: {answer['error']}", file=sys.stderr)
            return
        record = json.loads(answer["text"])
        text = _values(record)
        if process.extractOne(text, self._texts, scorer=fuzz.ratio, score_cutoff=self._cutoff):
            self.n_dropped += 1
            return
        self._texts.append(text)
        self.kept.append(record)


def _values(record: Any) -> str:
    """What records differ in: their values, without the names that all have."""
    if isinstance(record, dict):
        return " ".join(_values(record[name]) for name in sorted(record))
    if isinstance(record, list):
        return " ".join(map(_values, record))
    return " ".join(str(record).lower().split())


def _read_records(path: Path) -> list[Any]:
    records = []
    for number, raw in enumerate(read_input(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if raw.strip():
            try:
                records.append(json.loads(raw))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not valid JSON: {error}") from None
    if not records:
        raise ValueError(f"{path}: has no records")
    return records


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from None


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def _answered(path: Path) -> Iterator[dict[str, Any]]:
    """The answers of earlier runs."""
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def make(given: argparse.Namespace) -> int:
    """Make the records; returns how many are missing."""
    if any(given.output.exists() and given.output.samefile(path) for path in (given.seeds, given.schema)):
        raise ValueError(f"{given.output}: is one of the files that are read; give another one with -o")
    seeds, schema = _read_records(given.seeds), _read_json(given.schema)
    values = {} if given.values is None else _read_json(given.values)
    prompts = Prompts(seeds, schema, values, given)
    records, numbers = Records(seeds, given.similar), range(1, given.tries * given.n + 1)
    journal = given.output.with_name(f"{given.output.name}.answers")
    n_answers, started = 0, time.perf_counter()
    with AnswerFile(journal, map(prompts.line, numbers), source=given.seeds) as answers:
        for answer in _answered(journal):
            records.take(answer, given.n)
        n_before = len(records.kept)
        left = (prompts.line(number) for number in numbers if number not in answers.finished)
        defaults = Defaults({**given.option, "max_tokens": given.max_tokens, "seed": given.seed})
        try:
            if n_before < given.n:
                with DiffusionModel(given.model, n_threads=given.threads, n_sessions=given.parallel) as model:
                    started = time.perf_counter()
                    for answer in answer_lines(model, left, defaults, n_parallel=given.parallel):
                        answers.write(answer)
                        n_answers += 1
                        records.take(answer, given.n)
                        if len(records.kept) == given.n:
                            break
        finally:
            seconds = time.perf_counter() - started
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records.kept]
            given.output.write_text("".join(lines), encoding="utf-8")
            n_new = len(records.kept) - n_before
            print(
                f"{len(records.kept)} records, {n_new} of them new: {given.output}; {n_answers} answers in"
                f" {seconds:.1f} s, {n_new / seconds:.1f} records/s; in all {records.n_dropped}"
                f" near-duplicates dropped, {records.n_failed} failed",
                file=sys.stderr,
            )
    return int(given.n - len(records.kept))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", type=Path, help="records, one JSON value per line")
    parser.add_argument("schema", type=Path, help="JSON schema of a record")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file for the new records")
    parser.add_argument("-n", type=int, default=1000, help="number of new records")
    parser.add_argument("--task", default=TASK, help="message that asks for a record")
    parser.add_argument("--values", type=Path, help="JSON file of values for the task")
    parser.add_argument("--examples", type=int, default=3, help="number of seeds shown with each request")
    parser.add_argument(
        "--similar", type=float, default=0.9, help="drop records at least this similar, 0 to 1"
    )
    parser.add_argument("--tries", type=int, default=4, help="answers per record asked for, at most")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=_option,
        action="append",
        default=[],
        help="of GenerationOptions, as t_max=1.2; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args(arguments)
    given.option = dict(given.option)
    for name in ("n", "examples", "tries", "max_tokens", "parallel"):
        if getattr(given, name) < 1:
            parser.error(f"{name} is {getattr(given, name)}; permitted is an integer of at least 1")
    if not 0 < given.similar <= 1:
        parser.error(f"similar is {given.similar}; permitted is a number above 0, up to 1")
    try:
        n_missing = make(given)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    except (PyDiffusionError, ValueError, TypeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if n_missing:
        print(
            f"{n_missing} records are missing: more --values, a higher t_max or more --tries may help",
            file=sys.stderr,
        )
    return 1 if n_missing else 0


if __name__ == "__main__":
    sys.exit(main())
