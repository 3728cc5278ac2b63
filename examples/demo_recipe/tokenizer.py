"""The demo model's tokenizer: a byte-fallback BPE like Gemma's, with a few hundred tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
VISIBLE = ["<|channel>", "<channel|>"]
MORE = ["<|think|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
IMAGE = ["<|image>", "<image|>", "<|image|>"]
SPECIAL = CONTROL + VISIBLE + MORE + IMAGE
"""In order of their ids, 0 to 16."""

# Words that occur in every prompt are single tokens. No merge contains a digit or a '.', or joins a space
# with a letter, so sudoku cells, digits of numbers and list items stay separate tokens.
WORDS = [
    "user", "model", "json:", "sudoku", "sort:", "reverse:", "add:", "count:", "▁▁",
    '{"name":"', '","age":', ',"city":"', '"}',
]  # fmt: skip

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% set turn = namespace(text='', end='<turn|>') %}\
{% if message['content'] is string %}{% set turn.text = message['content'] %}\
{% else %}{% for part in message['content'] if part['type'] != 'image' %}\
{% set turn.text = turn.text + part['text'] %}{% endfor %}\
{% for part in message['content'] if part['type'] == 'image' %}\
{% set turn.text = (turn.text | trim) + '\\n<|image|>' %}{% set turn.end = '' %}{% endfor %}{% endif %}\
{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + \
(turn.text | trim) + turn.end + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""
"""A message's image is after its text, wherever it was given, and its own end token takes the place of the
end of the turn, so that the canvas is as far from the sudoku's cells as in a text prompt (see vision.py)."""


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer (deterministic)."""
    characters = ["\n", "▁", *(chr(code) for code in range(33, 127))]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(pair)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "additional_special_tokens": SPECIAL[5:],
        "added_tokens_decoder": {
            str(index): {
                "content": token, "lstrip": False, "normalized": False,
                "rstrip": False, "single_word": False, "special": True,
            }
            for index, token in enumerate(SPECIAL)
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def chat_prompt(message: str) -> str:
    """Render the chat template for one user message, including the start of the answer."""
    return f"<bos><|turn>user\n{message.strip()}<turn|>\n<|turn>model\n"
