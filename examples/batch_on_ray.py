"""Answer many prompts on a Ray cluster: `pydiffusion batch` with a model in each of several workers.

    pip install 'ray[data]'
    python examples/batch_on_ray.py prompts.jsonl answers.jsonl MODEL.gguf [--workers 2] [--seed 1]

Lines and answers are those of `pydiffusion batch` (docs/batch.md): short or OpenAI's batch form, prompts
as user messages unless --raw. With --seed the line with number N gets seed + N - 1, whichever worker answers
it. Answers are appended as blocks of lines come back; the same command answers what is missing, as would
`pydiffusion batch` with the same files. Exit code 1 if lines failed.

The model must have the same path on all machines, on a shared disk or copied there. pydiffusion does not
depend on Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from pydiffusion import DiffusionModel
from pydiffusion.openai.batch.answer_file import AnswerFile
from pydiffusion.openai.batch.answering import Defaults, answer_lines, error_of
from pydiffusion.openai.batch.lines import Line, read_input, read_lines


class Answerer:
    """Loads the model once per worker and answers blocks of lines."""

    def __init__(self, path: str, n_threads: int, n_parallel: int, defaults: Defaults) -> None:
        self._model = DiffusionModel(path, n_threads=n_threads, n_sessions=n_parallel)
        self._n_parallel = n_parallel
        self._defaults = defaults

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """block: column ``line`` with lines as JSON. Returns a column ``answer``, in order of completion."""
        lines = [Line(**json.loads(text)) for text in block["line"]]
        answers = answer_lines(self._model, lines, self._defaults, n_parallel=self._n_parallel)
        return {"answer": [json.dumps(answer) for answer in answers]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per worker")
    parser.add_argument("--parallel", type=int, default=4, help="sequences denoised in one batch by a worker")
    parser.add_argument("--max-tokens", type=int, default=None, help="default: up to the end of the context")
    parser.add_argument("--seed", type=int, default=None, help="of the first line; default: random")
    parser.add_argument("--raw", action="store_true", help="pass prompts as raw text, not as user messages")
    parser.add_argument("--retry-errors", action="store_true", help="answer lines that failed again")
    given = parser.parse_args(arguments)
    options = {"max_tokens": given.max_tokens, "seed": given.seed}
    defaults = Defaults(options, chat=False if given.raw else None)
    lines = read_lines(read_input(given.prompts), str(given.prompts), salt=defaults.salt)
    with AnswerFile(given.answers, lines, source=given.prompts, retry_errors=given.retry_errors) as answers:
        left = [line for line in lines if line.number not in answers.finished]
        print(f"{len(lines) - len(left)} of {len(lines)} lines have an answer already", file=sys.stderr)
        n_failed = sum(answers.finished.values())
        for answer in _answered(left, given, defaults) if left else ():
            answers.write(answer)
            n_failed += error_of(answer) is not None
    print(f"{len(left)} lines done, {n_failed} of all failed: {given.answers}", file=sys.stderr)
    return 1 if n_failed else 0


def _answered(lines: Sequence[Line], given: argparse.Namespace, defaults: Defaults) -> Any:
    """Yield the answers as blocks of lines come back, in any order."""
    n_lines = 4 * given.parallel  # per block: what an interruption loses, at most, of each worker
    blocks = ray.data.from_items(
        [{"line": json.dumps(asdict(line))} for line in lines],
        override_num_blocks=-(-len(lines) // n_lines),
    ).map_batches(
        Answerer,
        fn_constructor_args=(str(given.model.resolve()), given.threads, given.parallel, defaults),
        compute=ray.data.ActorPoolStrategy(size=given.workers),
        num_cpus=given.threads,
        batch_size=n_lines,
    )
    for row in blocks.iter_rows():
        yield json.loads(row["answer"])


if __name__ == "__main__":
    sys.exit(main())
