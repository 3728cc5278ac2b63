"""Grammars against llguidance, which other servers constrain their output with: both ways, on the same texts.

python tests/parity/grammars_against_llguidance.py, with llguidance installed; .ci/long runs it. Texts of our
automaton have to be accepted there, and mutations of members by both or by neither.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.automata import accepts, random_text
from support.grammars import GRAMMARS

from pydiffusion.constrained.grammar import parse_grammar
from pydiffusion.constrained.grammar_dfa import grammar_dfa

# llguidance splits a text into the longest lexemes first: where a rule's spaces take the line feed that the
# next one needs, it refuses texts of the grammar (a documented difference from llama.cpp).
LEXED = ("arithmetic",)
TOKENIZER = LLTokenizer("byte")


def accepted_there(compiled: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, compiled)
    assert not matcher.is_error(), matcher.get_error()
    tokens = TOKENIZER.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and _ends(matcher, tokens)


def _ends(matcher: LLMatcher, tokens: list[int]) -> bool:
    return bool(matcher.consume_tokens(tokens)) and bool(matcher.is_accepting())


def mutated(text: str, rng: random.Random) -> str:
    characters = list(text or "x")
    for _ in range(rng.randint(1, 2)):
        i, j = rng.randrange(len(characters)), rng.randrange(len(characters))
        characters[i] = rng.choice(["", characters[i] * 2, characters[j], "\n", "é"])
    return "".join(characters)


def main() -> None:
    n_wrong = 0
    for name, (grammar, members, others) in GRAMMARS.items():
        compiled = LLMatcher.grammar_from_lark(any_to_lark(grammar))
        machine, rng = grammar_dfa(parse_grammar(grammar)), random.Random(name)
        texts = [random_text(machine, rng, 40) for _ in range(200)]
        texts += [mutated(rng.choice(members), rng) for _ in range(400)] + [*members, *others]
        both = neither = only_there = only_here = 0
        for text in texts:
            here, there = accepts(machine, text), accepted_there(compiled, text)
            both += here and there
            neither += not here and not there
            only_there += there and not here
            only_here += here and not there
        here = 0 if name in LEXED else only_here
        print(f"{name}: {both} of both, {neither} of neither, only there {only_there}, only here {only_here}")
        n_wrong += only_there + here
    sys.exit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
