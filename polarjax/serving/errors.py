"""Errors as clients see them: a status and OpenAI's JSON."""

from collections.abc import Callable, Mapping
from typing import Any

from polarjax.errors import PolarjaxError

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """A request that gets an error as its answer.

    Args:
      message: one line for people.
      status: of the HTTP response.
      param: the field of the body at fault.
      code: a word for programs, where OpenAI has one.
      headers: further ones of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @classmethod
    def of(cls, error: PolarjaxError, param: str | None = None) -> "ApiError":
        """From a refusal of the library; its hint, which is for Python, is left out."""
        text = PolarjaxError(error.what, where=param, got=error.got, expected=error.expected)
        return cls(str(text), param=param)

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ClientLeftError(Exception):
    """The client closed its connection, so nobody waits for an answer."""


def checked[T](param: str, check: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `check` returns; its refusal becomes an error that names the field."""
    try:
        return check(*args, **kwargs)
    except PolarjaxError as error:
        raise ApiError.of(error, param) from error
