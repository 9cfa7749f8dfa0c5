"""The error for mistakes that only a person can correct."""

import contextlib
import errno
import os
from collections.abc import Iterator

# TensorStore raises a ValueError with the system's text.
_STORAGE_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class UserError(ValueError):
    """A mistake or a damaged file that somebody must look at.

    Raised on purpose, with a message that says what to do. Programs in `launch/` print the message
    alone and exit with code 1, at which nothing restarts them. Every other exception is a traceback
    and an exit code at which `launch/restart.sh` and `launch/slurm.sh` try again.
    """


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError of the block into a UserError with the same message.

    For code that checks its input and calls nothing that can fail for another reason.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def is_storage_full(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, says that a disk or quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in _STORAGE_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
