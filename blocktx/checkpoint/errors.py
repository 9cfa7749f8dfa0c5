"""Damage in storage, told apart from errors that another try may overcome; agreement on both."""

import errno
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

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


# Kinds of errors, the most serious last, and what processes that met none raise.
_KINDS = (
    (DamagedError, DamagedError),
    ((UserError, FileNotFoundError, PermissionError), UserError),
    (Exception, RuntimeError),
)


def raise_everywhere(error: Exception | None, what: object) -> None:
    """Raise in all processes if `error` is not None in one of them. All processes call this.

    The most serious error decides its type in all of them, so that they go on in the same way: to
    an older checkpoint only if nothing but damage was met.

    Args:
      error: the error of this process, if it met one.
      what: what was read, for the messages in other processes.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    mine = 0 if error is None else 1 + _kind(error)
    kinds = np.ravel(multihost_utils.process_allgather(np.int32(mine)))
    worst = int(kinds.max())
    if worst == 0:
        return
    if mine == worst:
        raise error
    _, raised = _KINDS[worst - 1]
    raise raised(
        f"{what}: process {kinds.argmax()} could not read it; its own message says why"
    ) from error


def _kind(error: Exception) -> int:
    return next(i for i, (types, _) in enumerate(_KINDS) if isinstance(error, types))
