"""Record what transformers makes of the conversations. Needs transformers, and a second.

cd tests
python -m reference.make_chat_goldens            # writes tests/reference/goldens/chat.json
python -m reference.make_chat_goldens --check    # compares with what is there instead
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from support.chat_conversations import CONVERSATIONS
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
GOLDENS = Path(__file__).parent / "goldens" / "chat.json"

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


def record() -> dict[str, list[str | None]]:
    """Of each conversation the text of its messages, and that of what they are to be the same as."""
    template = TEMPLATE.read_text(encoding="utf-8")
    recorded = {}
    for conversation in CONVERSATIONS:
        texts = [reference_text(template, conversation.messages, conversation.variables)]
        if conversation.same_as is not None:
            variables = conversation.same_variables or conversation.variables
            texts.append(reference_text(template, conversation.same_as, variables))
        recorded[conversation.name] = texts
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    recorded = record()
    if not parser.parse_args().check:
        GOLDENS.write_text(json.dumps(recorded, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    elif json.loads(GOLDENS.read_text(encoding="utf-8")) != recorded:
        raise SystemExit(f"{GOLDENS} differs from what transformers makes of the conversations")


if __name__ == "__main__":
    main()
