"""Gemma 4's chat format.

<|channel>thought\\n ... <channel|> the answer <|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>
"""

from __future__ import annotations

from .chat_format import CallSyntax, ChatFormat
from .gemma_calls import QUOTE, parse_call
from .gemma_healing import heal_call

GEMMA = ChatFormat(
    reasoning=("<|channel>", "<channel|>"),
    channel_names=("thought", "final"),
    reasoning_tags=("<think>", "</think>"),
    call=("<|tool_call>", "<tool_call|>"),
    parse_call=parse_call,
    call_syntax=CallSyntax(before="call:{name}", bare_key=r"[\w.$@/\-]+", sorts_keys=True),
    heal_call=heal_call,
    quote=QUOTE,
    ends=("<|tool_response>", "<|turn>", "<turn|>"),
    # Converters type it as user-defined, so that output parsers see it; the model waits for a tool there.
    visible_ends=("<|tool_response>",),
    other_markers=("<tool_response|>", "<|tool>", "<tool|>", "<|think|>"),
)
