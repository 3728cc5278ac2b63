"""Check a constraint before a model is loaded."""

from __future__ import annotations

from pydiffusion.constrained import expression_of
from pydiffusion.options import GenerationOptions


def check_constraint(options: GenerationOptions) -> None:
    """Raise OptionError if the options' constraint is invalid or not supported. What depends on a vocabulary
    or a budget shows only with a model.
    """
    if options.is_structured and options.function_calls is None:
        expression_of(options)
