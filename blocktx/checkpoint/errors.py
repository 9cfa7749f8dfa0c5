"""Damage in storage, told apart from errors that another try may overcome."""

import errno
import re

import jax

from blocktx.config import UserError

_TRANSIENT_TYPES = (
    ConnectionError,
    InterruptedError,
    MemoryError,
    TimeoutError,
    jax.errors.JaxRuntimeError,
)
_TRANSIENT_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# Libraries whose errors are those of a network, and status codes as TensorStore writes them.
_NETWORK_LIBRARIES = {"aiohttp", "gcsfs", "google", "requests", "urllib3"}
_TRANSIENT_TEXT = re.compile(
    r"\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b"
)


class DamagedError(UserError):
    """A checkpoint that is not what was written. An older one may be whole."""


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, may be gone at the next try."""
    while error is not None:
        if isinstance(error, _TRANSIENT_TYPES):
            return True
        if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
            return True
        library = type(error).__module__.partition(".")[0]
        if library in _NETWORK_LIBRARIES and not isinstance(error, FileNotFoundError):
            return True
        if _TRANSIENT_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
