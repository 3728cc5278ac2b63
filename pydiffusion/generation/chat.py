"""Chat: messages in, an answer with reasoning and tool calls apart; see ``DiffusionModel.chat``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.messages import template_variables
from pydiffusion.events import CanvasEvent, ChatCompletion, DraftEvent, EndEvent, Event
from pydiffusion.options import GenerationOptions

from .completion import chat_completion_of
from .prompt import session_for
from .thinking_budget import can_think

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatSettings:
    """Variables of the chat template, beside the messages.

    enable_thinking: False also closes reasoning that the model starts anyway.
    """

    tools: Tools | None
    enable_thinking: bool | None
    chat_template_kwargs: Mapping[str, Any] | None

    def prompt(self, model: DiffusionModel, messages: Messages) -> list[int]:
        """The prompt's token ids. Raises as ``DiffusionModel.chat_prompt``."""
        if isinstance(messages, Sequence) and messages and isinstance(messages[0], (list, tuple)):
            raise ValueError(
                f"messages[0] is a {type(messages[0]).__name__}, not a message: call model.chat_batch for"
                ' several conversations; a message is {"role": ..., "content": ...}'
            )
        return model.chat_prompt(messages, tools=self.tools, **self._variables())

    def options(self, model: DiffusionModel, options: GenerationOptions) -> GenerationOptions:
        """The options of an answer: by default it runs to its end or that of the context."""
        chosen: dict[str, Any] = {}
        if options.max_tokens is None:
            chosen["max_tokens"] = model.n_ctx_train
        wanted = self._variables().get("enable_thinking")
        if wanted is False and options.thinking_budget is None and not options.is_structured:
            chosen["thinking_budget"] = 0 if can_think(model.tokenizer) else None
        return replace(options, **chosen)

    def _variables(self) -> dict[str, Any]:
        variables = template_variables(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        return variables


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
        """Raises as ``DiffusionModel.chat_prompt``, ``generate``."""
        prompt = settings.prompt(model, messages)
        self._options = settings.options(model, options)
        self._session = session_for(model, session)
        self._n_prompt = len(prompt)
        self._n_cached = self._session.prefill(prompt)

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
