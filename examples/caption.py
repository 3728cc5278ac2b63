"""Describe images, several at a time: for each a line of JSON with a caption and tags.

    python examples/caption.py model.gguf photo.jpg drawing.png --mmproj mmproj.gguf [--max-soft-tokens 70]

Without ``--mmproj`` the vision file is the one beside the model. An image that can't be read is named on
stderr, and the others go on; the exit code is then 1. Lines come in the order of completion.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydiffusion import DiffusionModel

QUESTION = "Describe the picture: a caption of one sentence, and up to five tags."
ANSWER = {
    "type": "object",
    "properties": {
        "caption": {"type": "string", "maxLength": 200},
        "tags": {"type": "array", "maxItems": 5, "items": {"type": "string", "maxLength": 20}},
    },
    "required": ["caption", "tags"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--mmproj", default="auto")
    parser.add_argument("--max-soft-tokens", type=int, help="70 is the fastest, 1120 sees the most")
    parser.add_argument("--parallel", type=int, default=4)
    args = parser.parse_args()

    model = DiffusionModel(args.model, mmproj=args.mmproj)
    conversations = (asked(image, args.max_soft_tokens) for image in args.images)
    failed = False
    for index, answer in model.chat_batch(
        conversations, n_parallel=args.parallel, json_schema=ANSWER, max_tokens=256
    ):
        if isinstance(answer, Exception):
            print(f"{args.images[index]}: {answer}", file=sys.stderr)
            failed = True
        else:
            print(json.dumps({"file": str(args.images[index]), **json.loads(answer.text)}), flush=True)
    return int(failed)


def asked(image: Path, max_soft_tokens: int | None) -> list[dict[str, Any]]:
    """A conversation about one image, which is read when its turn comes."""
    part: dict[str, Any] = {"type": "image", "path": str(image)}
    if max_soft_tokens is not None:
        part["max_soft_tokens"] = max_soft_tokens
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


if __name__ == "__main__":
    sys.exit(main())
