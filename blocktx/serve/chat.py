"""Conversations to prompts, by the tokenizer's chat template."""

from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blocktx.serve.body import show
from blocktx.serve.errors import ApiError


class ChatTemplate:
    """A Jinja template that renders messages to the text of a prompt."""

    def __init__(self, source: str, special_tokens: dict[str, str]):
        """Compile the template.

        Args:
          source: the template.
          special_tokens: variables such as `bos_token`.

        Raises:
          ValueError: the template has a syntax error.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from None
        self._variables = dict(special_tokens)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Return the prompt of a conversation, up to where the answer begins.

        Raises:
          ApiError: 400: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[{**m, "content": _text(m.get("content"))} for m in messages],
                add_generation_prompt=True,
                **self._variables,
            )
        except ApiError:
            raise
        except Exception as error:  # a template may fail in any way for odd messages
            raise ApiError(f"messages: the chat template refuses them: {error}"[:300]) from None


def _text(content: Any) -> str:
    """Return the text of a message's content, which may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ApiError(
        f"messages: got content {show(content)}, must be a string or a list of text parts",
        param="messages",
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
