"""The tokenizer built from a GGUF: equal to the checkpoint's, strict about arrays, tolerant of any bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, trainers

from pydiffusion import ModelFormatError, PyDiffusionError, Tokenizer, UnsupportedModelError
from pydiffusion.tokenizer import TextStream

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|image|>"]
VISIBLE = ["<|channel>", "<channel|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on",
    "def add(a, b):\n    return a + b\n",
    "für Straße, où ça, niño 12345 67.89",
    "東京は日本の首都です。",
    "    indented  twice\n\n\n",
]


def trained_json() -> dict[str, Any]:
    """A tokenizer.json in Gemma's manner, its merges learned by the library's own trainer."""
    learner = Library(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    added = CONTROL + VISIBLE
    tokens = [*added, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": token in CONTROL}
            for i, token in enumerate(added)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": learned
        | {"vocab": {token: i for i, token in enumerate(tokens)}}
        | {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }


def arrays(source: dict[str, Any]) -> dict[str, Any]:
    """The metadata that a GGUF of this tokenizer.json has."""
    vocab = source["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    types = [1] * len(tokens)
    for i in range(256):
        types[vocab[f"<0x{i:02X}>"]] = 6
    for entry in source["added_tokens"]:
        types[entry["id"]] = 3 if entry["special"] else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab["<bos>"],
        "tokenizer.ggml.eos_token_id": vocab["<eos>"],
        "tokenizer.ggml.unknown_token_id": vocab["<unk>"],
        "tokenizer.ggml.padding_token_id": vocab["<pad>"],
        "tokenizer.ggml.add_space_prefix": False,
    }


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return arrays(trained_json())


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(metadata)


@pytest.fixture(scope="module", params=["trained", "random checkpoint", "demo checkpoint"])
def pair(
    request: pytest.FixtureRequest,
    checkpoint_folder: Callable[..., Path],
    gguf_file: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Library, Tokenizer]:
    """A checkpoint's own tokenizer and ours from the GGUF."""
    from pydiffusion import demo
    from pydiffusion._native import GgufFile
    from pydiffusion.convert import convert

    if request.param == "trained":
        source = trained_json()
        return Library.from_str(json.dumps(source)), Tokenizer(arrays(source))
    if request.param == "random checkpoint":
        folder, file = checkpoint_folder("small"), gguf_file("small")
    else:
        try:
            folder = demo.checkpoint_path()
        except FileNotFoundError:
            pytest.skip("NOT CHECKED: the demo model's tokenizer; its checkpoint is not in this tree")
        file = tmp_path_factory.mktemp("demo") / "demo.gguf"
        convert(folder, file, "q8_0")
    library = Library.from_file(str(folder / "tokenizer.json"))
    return library, Tokenizer(GgufFile(str(file)).metadata)


def strings(n: int) -> list[str]:
    """Varied texts: scripts, emoji with joiners, code, white space, control tokens, rare planes."""
    rng = random.Random(20261120)
    words = [w for line in CORPUS for w in line.split(" ")] + CONTROL + VISIBLE
    words += [
        "<|turn",
        "turn|>",
        "<0x41>",
        "▁",
        "\u2581\u2581",
        "<|",
        "|>",
        "<unk",
        "<|turn><|turn>",
        "<|think|>",
    ]
    words += [
        "🙂",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "🇩🇪",
        "漢字",
        "한국어",
        "العربية",
        "עברית",
        "हिन्दी",
        "ไทย",
        "e\u0301",
        "\u200b",
    ]
    words += [
        "for (int i = 0; i < n; ++i) {",
        "\t",
        "\r\n",
        "\n\n",
        "  ",
        "     ",
        "\0",
        "\x1b[31m",
        "\ufeff",
        "\xa0",
    ]
    words += ["𝔘𝔫𝔦", "\U0010fffd", "\ufffd", "\ue000", '{"a": [1, 2]}', "x86_64", "1e-6", "http://a.b/c?d=e"]
    texts = ["", " ", "  ", "\n", "a"]
    while len(texts) < n:
        parts = rng.choices(words, k=rng.randint(1, 12))
        if rng.random() < 0.3:
            parts += [
                chr(rng.choice([rng.randrange(0x20, 0x250), rng.randrange(0x3000, 0xD000)])) for _ in range(5)
            ]
        texts.append(rng.choice([" ", "", "\n"]).join(parts))
    return texts


def test_encoding_equals_the_checkpoints_tokenizer(pair: tuple[Library, Tokenizer]) -> None:
    library, ours = pair
    texts = strings(1000)
    assert len(set(texts)) > 900
    for text in texts:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.tokenize(text, add_bos=False, parse_special=True) == expected, repr(text)


def test_decoding_restores_the_text(pair: tuple[Library, Tokenizer]) -> None:
    library, ours = pair
    for text in strings(1000):
        ids = ours.tokenize(text, add_bos=False, parse_special=True)
        assert ours.detokenize(ids, keep_control=True) == library.decode(ids, skip_special_tokens=False)
        plain = ours.tokenize(text, add_bos=False, parse_special=False)
        if "▁" not in text:  # U+2581 itself decodes to a space, in this kind of tokenizer
            assert ours.detokenize(plain) == text


def test_decoding_any_ids_equals_the_checkpoints_tokenizer(pair: tuple[Library, Tokenizer]) -> None:
    """Also bytes that are not UTF-8: alone, in runs, between text, among control tokens."""
    library, ours = pair
    rng = random.Random(7)
    byte_ids = [ours.token_id(f"<0x{byte:02X}>") for byte in range(256)]
    emoji = [byte_ids[byte] for byte in "🙂".encode()]
    for _ in range(1000):
        ids = []
        for _ in range(rng.randint(0, 12)):
            ids += rng.choice([[rng.randrange(ours.n_vocab)], rng.choices(byte_ids, k=2), emoji, emoji[:2]])
        assert ours.detokenize(ids, keep_control=True) == library.decode(ids, skip_special_tokens=False)


def test_control_tokens_in_text_stay_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = "<|turn>user hi<turn|>"
    control = [i for i in range(tokenizer.n_vocab) if tokenizer.is_control(i)]
    plain = tokenizer.tokenize(text, add_bos=False, parse_special=False)
    assert not set(plain) & set(control)
    assert tokenizer.detokenize(plain) == text
    parsed = tokenizer.tokenize(text, add_bos=False, parse_special=True)
    assert parsed[0] == tokenizer.token_id("<|turn>")
    assert parsed[-1] == tokenizer.token_id("<turn|>")
    assert tokenizer.detokenize(parsed) == "user hi"
    assert tokenizer.detokenize(parsed, keep_control=True) == text
    # and the one after must not depend on the one before
    assert tokenizer.tokenize(text, add_bos=False, parse_special=False) == plain


def test_user_defined_tokens_are_visible(tokenizer: Tokenizer) -> None:
    ids = tokenizer.tokenize("a<|channel>b", add_bos=False)
    assert tokenizer.token_id("<|channel>") in ids
    assert tokenizer.detokenize(ids) == "a<|channel>b"


def test_bos_as_the_file_asks(metadata: dict[str, Any]) -> None:
    bos = metadata["tokenizer.ggml.bos_token_id"]
    asks, asks_not = (Tokenizer(metadata | {"tokenizer.ggml.add_bos_token": flag}) for flag in (True, False))
    assert asks.tokenize("x")[0] == bos
    assert asks.tokenize("x", add_bos=False)[0] != bos
    assert asks_not.tokenize("x")[0] != bos
    assert asks_not.tokenize("x", add_bos=True)[0] == bos


def test_a_character_split_over_parts_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.tokenize("a🙂b漢", add_bos=False)
    for cut in range(len(ids) + 1):
        stream = TextStream(tokenizer)
        first = stream.feed(ids[:cut])
        assert "\ufffd" not in first
        assert first + stream.feed(ids[cut:], last=True) == "a🙂b漢"
    stream = TextStream(tokenizer)
    assert "".join(stream.feed([i]) for i in ids) == "a🙂b漢"


def test_an_unfinished_character_ends_as_replacements(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🙂".encode()[:3]]
    stream = TextStream(tokenizer)
    assert stream.feed(ids) == ""
    assert stream.feed([], last=True) == "\ufffd" * 3


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.tokenize(text)


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=str(token_id)):
        tokenizer.detokenize([token_id])


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no tokens": (lambda m: m.pop("tokenizer.ggml.tokens"), "tokens"),
    "empty tokens": (lambda m: m.update({"tokenizer.ggml.tokens": []}), "tokens"),
    "tokens of numbers": (lambda m: m.update({"tokenizer.ggml.tokens": [1, 2]}), r"tokens\[0\]"),
    "a token twice": (lambda m: m["tokenizer.ggml.tokens"].__setitem__(300, "<pad>"), "twice"),
    "a token of no text": (lambda m: m["tokenizer.ggml.tokens"].__setitem__(300, "\ud800"), "."),
    "no merges": (lambda m: m.pop("tokenizer.ggml.merges"), "merges"),
    "a merge of no two": (lambda m: m["tokenizer.ggml.merges"].append("ab"), "merges"),
    "a merge of nothing": (lambda m: m["tokenizer.ggml.merges"].append("a "), "merges"),
    "a merge of spaces": (lambda m: m["tokenizer.ggml.merges"].append("  "), "merges"),
    "an empty merge": (lambda m: m["tokenizer.ggml.merges"].append(""), "merges"),
    "a merge of no tokens": (lambda m: m["tokenizer.ggml.merges"].append("zq qz"), "is not a token"),
    "a merge into no token": (lambda m: m["tokenizer.ggml.merges"].append("<pad> <pad>"), "is not a token"),
    "a merge of a number": (lambda m: m["tokenizer.ggml.merges"].append(3), "merges"),
    "types too few": (lambda m: m["tokenizer.ggml.token_type"].pop(), "token_type"),
    "a type unknown": (lambda m: m["tokenizer.ggml.token_type"].__setitem__(9, 7), "token_type"),
    "an invalid byte token": (lambda m: m["tokenizer.ggml.token_type"].__setitem__(9, 6), "byte"),
    "scores too few": (lambda m: m.update({"tokenizer.ggml.scores": [0.0]}), "scores"),
    "bos out of range": (lambda m: m.update({"tokenizer.ggml.bos_token_id": 10**6}), "bos_token_id"),
    "bos negative": (lambda m: m.update({"tokenizer.ggml.bos_token_id": -1}), "bos_token_id"),
    "eos not a number": (lambda m: m.update({"tokenizer.ggml.eos_token_id": "x"}), "eos_token_id"),
    "no model": (lambda m: m.pop("tokenizer.ggml.model"), "tokenizer.ggml.model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_arrays_are_refused_by_name(metadata: dict[str, Any], damage: str) -> None:
    damaged = json.loads(json.dumps(metadata))
    break_it, named = DAMAGES[damage]
    break_it(damaged)
    with pytest.raises(ModelFormatError, match=named):
        Tokenizer(damaged)


def test_lengths_must_match_the_model(metadata: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match="embedding has 7 rows"):
        Tokenizer(metadata, n_vocab=7)


@pytest.mark.parametrize(
    ("key", "value"), [("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.add_space_prefix", True)]
)
def test_another_kind_of_tokenizer_is_refused(metadata: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        Tokenizer(metadata | {key: value})


def test_panics_of_the_library_are_caught(metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("range end index 2 out of range")

    monkeypatch.setattr(models, "BPE", panic)
    with pytest.raises(PyDiffusionError, match="range end index"):
        Tokenizer(metadata)
