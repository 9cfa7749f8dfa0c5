"""Errors that clients see, as OpenAI's error object."""

from typing import Any

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class ApiError(Exception):
    """An error with an HTTP status.

    Attributes:
      status: the HTTP status.
      headers: of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | int | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self._param, self._code = status, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "BadRequestError"),
                "param": self._param,
                "code": self.status if self._code is None else self._code,
            }
        }
