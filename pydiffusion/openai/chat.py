"""Chats: messages and tools in, an answer with reasoning and tool calls apart.

What ``DiffusionModel.chat`` and ``create_chat_completion`` have in common.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.messages import template_variables
from pydiffusion.events import CanvasEvent, ChatCompletion, DraftEvent, EndEvent, Event
from pydiffusion.generation.completion import chat_completion_of
from pydiffusion.generation.prompt import session_for
from pydiffusion.generation.thinking_budget import can_think
from pydiffusion.options import GenerationOptions, ResolvedOptions

from .tool_choice import ToolUse, tool_use

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session
    from pydiffusion.vision.prompt import Prompt

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatSettings:
    """Parameters of a chat beside messages and generation options, as ``create_chat_completion`` has them."""

    tools: Tools | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def prepare(self, model: DiffusionModel, messages: Messages, options: GenerationOptions) -> PreparedChat:
        """Raises as ``DiffusionModel.chat_prompt``, OptionError for tools or options that don't fit."""
        if isinstance(messages, Sequence) and messages and isinstance(messages[0], (list, tuple)):
            raise ValueError(
                f"messages[0] is a {type(messages[0]).__name__}, not a message: call model.chat_batch for"
                ' several conversations; a message is {"role": ..., "content": ...}'
            )
        given = {} if self.chat_template_kwargs is None else self.chat_template_kwargs
        variables = template_variables(given)
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        use = self._use(options, variables.get("enable_thinking"))
        resolved = model.resolve(replace(options, **_changes(model, options, use, variables)))
        if resolved.constraint is not None:
            with use.naming_tools():
                model.automaton(resolved)
        return PreparedChat(model.chat_prompt(messages, tools=use.shown, **variables), resolved, use)

    def _use(self, options: GenerationOptions, thinking: Any) -> ToolUse:
        """Tools and the constraint of the options, which may be another one with tools."""
        constraint: dict[str, Any] = {}
        if options.constraint is not None:
            value = getattr(options, options.constraint)
            constraint[options.constraint] = (
                json.loads(value) if options.constraint == "json_schema" else value
            )
        return tool_use(
            self.tools,
            self.tool_choice,
            parallel=self.parallel_tool_calls,
            constraint=constraint,
            thinking=thinking if isinstance(thinking, bool) else None,
        )


def _changes(
    model: DiffusionModel, options: GenerationOptions, use: ToolUse, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that the settings of a chat imply: by default it runs to its end or the context's."""
    changes: dict[str, Any] = {} if options.constraint is None else {options.constraint: None}
    changes |= use.constraint
    if options.max_tokens is None:
        changes["max_tokens"] = model.n_ctx_train
    closes = variables.get("enable_thinking") is False and not use.constraint
    if closes and options.thinking_budget is None and can_think(model.tokenizer):
        changes["thinking_budget"] = 0  # closes reasoning that the model starts anyway
    return changes


@dataclass(frozen=True)
class PreparedChat:
    """A chat's prompt, with the options of the answer, and what its tools mean."""

    prompt: list[int] | Prompt
    options: ResolvedOptions
    use: ToolUse


class Chat:
    """An answer to messages, its prompt in the session's cache."""

    def __init__(
        self,
        model: DiffusionModel,
        messages: Messages,
        options: GenerationOptions,
        settings: ChatSettings,
        session: Session | None,
    ) -> None:
        """Raises as ``ChatSettings.prepare`` and ``generate``."""
        prepared = settings.prepare(model, messages, options)
        self._options = prepared.options
        self._session = session_for(model, session)
        self._n_prompt = len(prepared.prompt)
        self._n_cached = self._session.prefill(prepared.prompt, lora=prepared.options.lora)

    def events(self) -> Iterator[Event]:
        """Generate; see ``Session.generate_chat``."""
        return self._session.generate_chat(self._options)

    def complete(self, on_event: Callable[[Event], None] | None) -> ChatCompletion:
        """Generate to the end; on_event is called with every event."""
        kept: list[CanvasEvent | EndEvent] = []
        for event in self.events():
            if on_event is not None:
                on_event(event)
            if not isinstance(event, DraftEvent):
                kept.append(event)
        return chat_completion_of(self._n_prompt, self._n_cached, kept)
