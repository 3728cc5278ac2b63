"""A tokenizer in Gemma's manner for the random checkpoints: byte-fallback BPE, U+2581 for spaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

#: Ids 0 to 12, as in the files that circulate. The channel markers are user-defined, the rest control tokens.
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>")
CONTROL += ("<|think|>", "<|image>", "<image|>", "<|image|>")
VISIBLE = ("<|channel>", "<channel|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] }}{{ '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)

_TEXT = """\
the river and the road run side by side through the town and the people there are used to the sound of
water in the morning the baker opens the door and the smell of bread comes down the street where the
children are on their way to school they stop and look at the window then they run on because the bell
is ringing and the teacher is waiting for them at the gate with a list of names in her hand and a pen
behind her ear some of them are late again there is a story in that but nobody has the time to tell it
not this morning"""


def _merges() -> Iterator[tuple[str, str]]:
    """The merges of byte pair encoding over a short text, most frequent first; ties: the smaller pair."""
    counts = Counter("▁" + word for word in _TEXT.split())
    pieces = {word: list(word) for word in counts}
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        yield best
        for word, parts in pieces.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            pieces[word] = joined


def vocabulary(n_vocab: int) -> tuple[list[str], list[tuple[str, str]]]:
    """All ``n_vocab`` tokens in id order, and the merges: bytes, then characters and merges as fit."""
    tokens = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    # Letters and U+2581 first: a vocabulary too small for all of ASCII leaves the rest to the byte fallback.
    characters = ["▁", "\n", *"etaoinshrdlucmfwypvbgkjqxz.,0123456789"]
    characters += [chr(c) for c in range(33, 127) if chr(c) not in characters]
    tokens += characters[: n_vocab - len(tokens)]
    merges: list[tuple[str, str]] = []
    for pair in _merges():
        if len(tokens) == n_vocab:
            break
        merges.append(pair)
        if "".join(pair) not in tokens:  # two merges may make the same token
            tokens.append("".join(pair))
    if len(tokens) != n_vocab or len(set(tokens)) != n_vocab:
        raise ValueError(f"a vocabulary of {n_vocab} can't be made from this text")
    return tokens, merges


def tokenizer_json(n_vocab: int) -> dict[str, object]:
    """``tokenizer.json`` of a vocabulary of ``n_vocab``."""
    tokens, merges = vocabulary(n_vocab)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in VISIBLE,
        }
        for i, token in enumerate(CONTROL)
    ]
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, {"SpecialToken": {"id": "<bos>", "type_id": 1}}, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def tokenizer_config() -> dict[str, object]:
    """``tokenizer_config.json``."""
    return {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "model_max_length": 1024,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
