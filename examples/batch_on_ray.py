"""Batch generation on a Ray cluster: every worker loads the model once and processes blocks of prompts.

pip install 'ray[data]'
python examples/batch_on_ray.py prompts.jsonl answers MODEL.gguf [--workers 2] [--parallel 4]

prompts.jsonl contains objects with a "prompt"; the results are written to the folder `answers` as JSON lines.
The model must have the same path on all machines, on a shared disk or copied there. pydiffusion does not
depend on Ray.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray

from pydiffusion import DiffusionModel, GenerationOptions


class Answers:
    """Loads the model once per worker and generates answers for blocks of prompts."""

    def __init__(self, path: str, parallel: int, threads: int, max_tokens: int) -> None:
        self._model = DiffusionModel(path, n_threads=threads)
        self._parallel = parallel
        self._max_tokens = max_tokens

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        prompts = [str(prompt) for prompt in block["prompt"]]
        options = [GenerationOptions(max_tokens=self._max_tokens, seed=i) for i in range(len(prompts))]
        texts, steps = [""] * len(prompts), [0] * len(prompts)
        errors = [""] * len(prompts)
        outcomes = self._model.generate_batch(prompts, options, n_parallel=self._parallel)
        for i, outcome in outcomes:
            if isinstance(outcome, Exception):
                errors[i] = str(outcome)
            else:
                texts[i], steps[i] = outcome.text, outcome.steps
        seeds = [option.seed for option in options]
        return {**block, "text": texts, "seed": seeds, "steps": steps, "error": errors}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts")
    parser.add_argument("answers")
    parser.add_argument("model")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per worker")
    parser.add_argument("--parallel", type=int, default=4, help="canvases per batch in a worker")
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()
    ray.data.read_json(arguments.prompts).map_batches(
        Answers,
        fn_constructor_args=(arguments.model, arguments.parallel, arguments.threads, arguments.max_tokens),
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=arguments.threads,
        batch_size=8 * arguments.parallel,
    ).write_json(arguments.answers)


if __name__ == "__main__":
    main()
