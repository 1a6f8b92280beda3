"""The messages of a chat request, as a chat template takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from polarjax.numeric import shown
from polarjax.serving.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles, and what the templates of open models call them."""


def conversation(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Messages with the texts `role` and `content`; raises `ApiError` for anything that a template would drop."""
    return [_message(each, f"messages[{i}]") for i, each in enumerate(messages)]


def _message(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise ApiError(f"{where}: not a message; got {shown(given)}", param="messages")
    fields: Mapping[str, Any] = {name: value for name, value in given.items() if value not in (None, [])}
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        expected = ", ".join(ROLES)
        raise ApiError(
            f"{where}: role isn't supported; got {shown(role)}, expected {expected}", param="messages"
        )
    if unknown := fields.keys() - {"role", "content", "name"}:
        raise ApiError(f"{where}: unsupported field: {shown(min(unknown))}", param="messages")
    made = {"role": ROLES[role], "content": _content(fields.get("content"), where)}
    if "name" in fields:
        if not isinstance(fields["name"], str):
            raise ApiError(f"{where}: name is not a text; got {shown(fields['name'])}", param="messages")
        made["name"] = fields["name"]
    return made


def _content(content: Any, where: str) -> str:
    """A text, or the texts of its parts, one after the other."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "\n".join(each["text"] for each in content)
    expected = 'a text, or parts such as {"type": "text", "text": "…"}'
    raise ApiError(f"{where}: content: got {shown(content)}, expected {expected}", param="messages")


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )
