"""How a plain prompt becomes tokens: as a user message through the chat template, or as raw text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel

Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Pass a prompt as a user message through the chat template, or as raw text."
        " [default: --chat if the file has a template]",
    ),
]
System = Annotated[str | None, typer.Option("-sys", "--system", help="System message; not with --raw.")]
Special = Annotated[bool, typer.Option("--special", help="Parse control tokens in a raw prompt.")]


def check(
    chat: bool | None,
    system: str | None,
    special: bool,
    chat_template: str | None,
    has_images: bool = False,
) -> None:
    """Report options that exclude each other, before the model is loaded."""
    if chat is False and chat_template is not None:
        raise typer.BadParameter("--chat-template needs --chat")
    if chat is False and system is not None:
        raise typer.BadParameter("--system needs --chat")
    if chat is False and has_images:
        raise typer.BadParameter("--image needs --chat")
    if chat and special:
        raise typer.BadParameter("--special needs --raw")


def uses_chat(
    model: DiffusionModel,
    chat: bool | None,
    system: str | None,
    special: bool,
    has_images: bool = False,
) -> bool:
    """Whether prompts are user messages: as chosen, else if the model has a template."""
    chosen = model.has_chat_template if chat is None else chat
    check(chosen, system, special, None, has_images)
    return chosen
