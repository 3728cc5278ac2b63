"""Names that other libraries give the options of a generation."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_SAMPLER = "a diffusion sampler has t_min, t_max and entropy_bound instead"
# Another library's name -> what to give instead.
_INSTEAD = {
    **dict.fromkeys(
        ("max_new_tokens", "max_length", "max_completion_tokens", "max_output_tokens", "num_predict",
         "n_predict"),
        "here it is max_tokens",
    ),
    **dict.fromkeys(
        ("num_inference_steps", "num_steps", "diffusion_steps", "max_denoising_steps"), "here it is steps"
    ),
    **dict.fromkeys(("stop_sequences", "stop_strings", "stop_words"), "here it is stop"),
    **dict.fromkeys(("random_seed", "random_state", "manual_seed"), "here it is seed"),
    **dict.fromkeys(("eos_token_id", "stop_token_ids"), "here it is eos"),
    **dict.fromkeys(("guided_json", "schema"), "here it is json_schema"),
    **dict.fromkeys(("guided_regex", "pattern"), "here it is regex"),
    **dict.fromkeys(
        ("temperature", "temp", "top_p", "top_k", "min_p", "typical_p", "do_sample", "num_beams"), _SAMPLER
    ),
    **dict.fromkeys(
        ("repeat_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        "stop_on_repetition=True ends a text that loops",
    ),
    "response_format": "here it is json_schema; create_completion and create_chat_completion take both",
    "stream": "call stream or stream_chat for the events",
    "n": "call generate_batch, or once per seed; create_completion takes n",
    "callback": "here it is on_event",
    "streamer": "call stream or stream_chat for the events",
}  # fmt: skip


def unknown_option(name: str, known: Collection[str]) -> str:
    """The message about an option that doesn't exist: what it is called here, or all that exist."""
    if name in _INSTEAD:
        return f"unknown option {name!r}: {_INSTEAD[name]}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if close:
        return f"unknown option {name!r}; did you mean {close[0]}?"
    return f"unknown option {name!r}; the options are {', '.join(known)}"
