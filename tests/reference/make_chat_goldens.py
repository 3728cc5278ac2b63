"""Record what transformers makes of the conversations. Needs transformers, and a second.

cd tests
python -m reference.make_chat_goldens            # writes tests/reference/goldens/chat.json
python -m reference.make_chat_goldens --check    # compares with what is there instead
python -m reference.make_chat_goldens --published chat_template.jinja   # chat_diffusion_gemma.json too

The last one takes the template of google/diffusiongemma-26B-A4B-it, which is not in this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from support.chat_conversations import CONVERSATIONS
from support.format_conversations import EXAMPLES
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
GOLDENS = Path(__file__).parent / "goldens" / "chat.json"
PUBLISHED_GOLDENS = GOLDENS.with_name("chat_diffusion_gemma.json")

_tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(BPE()), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
)


def reference_text(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str | None:
    """What ``apply_chat_template`` makes of the messages; None where it fails."""
    options = {"add_generation_prompt": True, **variables}
    try:
        return _tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except Exception:  # of any kind: the template's own, jinja2's, Python's
        return None


def record(template: str) -> dict[str, list[str | None]]:
    """Of each conversation the text of its messages, and that of what they are to be the same as."""
    recorded = {}
    for conversation in CONVERSATIONS:
        texts = [reference_text(template, conversation.messages, conversation.variables)]
        if conversation.same_as is not None:
            variables = conversation.same_variables or conversation.variables
            texts.append(reference_text(template, conversation.same_as, variables))
        recorded[conversation.name] = texts
    return recorded


def record_published(template: str) -> dict[str, Any]:
    """What DiffusionGemma's own template makes of these conversations, and of those that show its format."""
    examples = {name: reference_text(template, *case) for name, case in EXAMPLES.items()}
    digest = hashlib.sha256(template.encode()).hexdigest()
    return {"template_sha256": digest, "conversations": record(template), "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    parser.add_argument("--published", type=Path, metavar="FILE", help="DiffusionGemma's template")
    arguments = parser.parse_args()
    recorded: dict[Path, Any] = {GOLDENS: record(TEMPLATE.read_text(encoding="utf-8"))}
    if arguments.published is not None:
        recorded[PUBLISHED_GOLDENS] = record_published(arguments.published.read_text(encoding="utf-8"))
    for path, texts in recorded.items():
        if not arguments.check:
            path.write_text(json.dumps(texts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        elif json.loads(path.read_text(encoding="utf-8")) != texts:
            raise SystemExit(f"{path} differs from what transformers makes of the conversations")


if __name__ == "__main__":
    main()
