"""Shared code of the scripts in `launch/`: flags, exit codes, one-line error messages."""

import difflib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from blocktx.config import RunConfig, UserError, from_config_dict, is_storage_full
from blocktx.files import check_picture
from blocktx.parallel import choose_backend, exit_process

_NO_FUNCTION = "the file has no function get_config()"

# Errors that only a person can correct: code 1. Other errors may be gone at the next try: code 70.
_FOR_A_PERSON = (
    UserError,
    FloatingPointError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def run(
    main: Callable[[], None],
    required: tuple[str, ...],
    *,
    restarted: bool = False,
    flag_of: Mapping[str, str] | None = None,
    picture: str | None = None,
) -> None:
    """Parse the flags and run `main`. Exit with a code that says what happened.

    2: a mistake in the flags, or a ValueError whose message begins with the name of a flag that was
       given or with two dashes.
    1: an error that a person must look at. Only its message is printed; --verbosity=debug adds
       the traceback. This is a UserError, a missing or forbidden file, a full disk, or a loss that
       is not finite. In a program that is not `restarted` it is also any ValueError or OSError.
    130: Ctrl-C.
    70: any other error, with its traceback. Another try may succeed.

    Args:
      main: the program.
      required: names of flags that must be given.
      restarted: whether something like launch/restart.sh starts the program again unless it ends
        with 0, 1, 2 or 130. Unexpected ValueErrors and OSErrors, such as those of a network, are
        then no reason to stop.
      flag_of: flags, such as --data, by the field of the configuration that they stand for. An
        error message that begins with the field begins with the flag instead.
      picture: the flag that names a picture to write; its value is checked with the others.
    """
    expected = _FOR_A_PERSON if restarted else (*_FOR_A_PERSON, ValueError, OSError)

    def checked(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs every phase of a save
            _hide_repeated_errors()
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        for name in required:
            if flags.FLAGS[name].value is None:
                fail(f"--{name} is missing; see --help")
        choose_backend()
        try:
            main()
        except KeyboardInterrupt:
            fail("interrupted", code=130)
        except Exception as error:
            if isinstance(error, expected) or is_storage_full(error):
                logging.debug("%s", traceback.format_exc())
                field, colon, problem = str(error).partition(":")
                field = (flag_of or {}).get(field, field)
                field = f"--{field}" if _is_given(field) else field
                fail(field + colon + problem, code=2 if field.startswith("--") else 1)
            fail(traceback.format_exc(), code=70)

    if picture:
        flags.register_validator(picture, _is_picture)
    if "jax_debug_nans" not in flags.FLAGS:
        jax.config.config_with_absl()  # flags of JAX, such as --jax_debug_nans
    try:
        app.run(checked, flags_parser=_parse)
    except _Failure as failure:
        if not is_storage_full(failure):
            raise
        # Other writes that are under way would delay the end and print their errors after it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.code)


def _is_given(field: str) -> bool:
    """Return whether a flag of this name, or of a field of it, is on the command line."""
    given = (arg.lstrip("-").partition("=")[0] for arg in sys.argv[1:] if arg.startswith("-"))
    return any(name == field or name.startswith(f"{field}.") for name in given)


class _Failure(SystemExit):
    """The end of a program that has printed its error message."""


def _hide_repeated_errors() -> None:
    """Hide reports of errors in the background that are also raised.

    Orbax logs the error of a save. asyncio logs the errors of all other writes to a full disk.
    TensorStore reports reads and writes that end later to an event loop that Orbax has closed.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    logging.get_absl_logger().addFilter(_is_no_traceback_of_orbax)
    logging.get_absl_handler().addFilter(_is_no_full_disk_of_asyncio)


def _is_no_traceback_of_orbax(record: Any) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _is_no_full_disk_of_asyncio(record: Any) -> bool:
    return not (
        record.name == "asyncio" and record.exc_info and is_storage_full(record.exc_info[1])
    )


def _is_picture(path: str | None) -> bool:
    """The check of a flag, for absl."""
    try:
        if path is not None:
            check_picture(path)
    except ValueError as error:
        raise flags.ValidationError(str(error)) from None
    return True


def enable_compilation_cache(folder: str) -> None:
    """Keep compiled programs in `folder` and reuse them. An empty name disables the cache."""
    if folder and "://" not in folder:
        folder = os.path.expanduser(folder)
    jax.config.update("jax_compilation_cache_dir", folder or None)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error message and exit."""
    print(f"error: {message}", file=sys.stderr)
    try:
        exit_process(code)
    except SystemExit as end:
        raise _Failure(code) from end


def run_config(config: Mapping[str, Any]) -> RunConfig:
    """Return the RunConfig of the flag --config, or exit with code 2 if a field is invalid."""
    try:
        return from_config_dict(config)
    except UserError as error:
        fail(str(error))


def read_config(spec: str, flag: str = "--config") -> RunConfig:
    """Return the RunConfig of `FILE.py` or `FILE.py:NAME`, for scripts without a config flag.

    Raises:
      UserError: the file is missing or fails; the message begins with `flag`.
    """
    path, _, name = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(_no_file(path, flag))
    loader = importlib.machinery.SourceFileLoader("config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("config", loader))
    try:
        loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(_NO_FUNCTION)
        return from_config_dict(module.get_config(name) if name else module.get_config())
    except Exception as error:  # the file can raise anything
        raise UserError(_config_problem(error, flag)) from error


def _no_file(path: str, flag: str = "--config") -> str:
    return f"{flag}: there is no file {path!r}"


def _config_problem(error: Exception, flag: str = "--config") -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{flag}: {kind}{error}"


def _parse(argv: list[str]) -> list[str]:
    for position, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-config"):
            continue
        if not equals:  # --config FILE
            value = argv[position + 1] if position + 1 < len(argv) else ""
        path = value.partition(":")[0]
        if not pathlib.Path(path).is_file():
            fail(_no_file(path))
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl has printed the help, and ends with 1
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        fail(f"{error}{_similar_flag(error)}; see --help")
    except (AttributeError, KeyError) as error:  # an override of an unknown field
        fail(_unknown_field(argv, str(error)))
    except (flags.Error, OSError, ValueError, TypeError) as error:
        if "Traceback" in str(error):  # config_flags adds that of a config file that raises
            last = str(error).rstrip().splitlines()[-1]
            fail(f"--config: {last.removeprefix('ValueError: ')}")
        fail(str(error))
    except Exception as error:  # the config file is not Python, or raises
        fail(_config_problem(error))


def _similar_flag(error: flags.UnrecognizedFlagError) -> str:
    """Return a suggestion for --confg.a.b, of which absl compares the whole name with flags."""
    first, dot, rest = error.flagname.partition(".")
    close = difflib.get_close_matches(first, flags.FLAGS, n=1)
    return f". Did you mean: {close[0]}.{rest} ?" if dot and close and close[0] != first else ""


def _unknown_field(argv: list[str], problem: str) -> str:
    if "get_config" in problem:
        return f"--config: {_NO_FUNCTION}"
    # All that config_flags says is "'stepz'" and perhaps "Did you mean "steps" ...".
    name, close = re.search(r"\w+", problem), re.search(r'Did you mean "(\w+)"', problem)
    for arg in argv:
        if name and name[0] in arg.partition("=")[0].split("."):
            hint = f"; did you mean {close[1]}?" if close else ""
            return f"{arg}: the configuration has no field {name[0]}{hint}"
    return problem
