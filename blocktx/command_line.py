"""What the scripts in `launch/` share: flags, and a mistake as one line instead of a traceback."""

import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from blocktx.config import RunConfig, from_config_dict
from blocktx.parallel import end_with

_NO_FUNCTION = "the file has no function get_config()"


_EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError)


def run(main: Callable[[], None], required: tuple[str, ...]) -> None:
    """Parses flags, the `required` ones among them, and runs `main`.

    A mistake in the flags ends the program with code 2, an error of `main` that a user can do
    something about with code 1 (its traceback is shown with --verbosity=debug), Ctrl-C with 130,
    an error of a device or of the network between devices with 70: another try may do.
    """

    def checked(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        for name in required:
            if flags.FLAGS[name].value is None:
                fail(f"--{name} is missing; see --help")
        try:
            main()
        except _EXPECTED_ERRORS as error:
            logging.debug("%s", traceback.format_exc())
            fail(str(error), code=1)
        except jax.errors.JaxRuntimeError:
            fail(traceback.format_exc(), code=70)
        except KeyboardInterrupt:
            fail("interrupted", code=130)

    app.run(checked, flags_parser=_parse)


def keep_compiled(folder: str) -> None:
    """Makes JAX keep what it compiles in `folder`, and find it there; "" is no folder."""
    if folder and "://" not in folder:
        folder = os.path.expanduser(folder)
    jax.config.update("jax_compilation_cache_dir", folder or None)


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    end_with(code)


def read_config(spec: str) -> RunConfig:
    """The run that `FILE.py` or `FILE.py:NAME` describes, for scripts without absl's flags.

    Raises:
      ValueError: whatever is wrong with the file; the message begins with --config.
    """
    path, _, name = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(_no_file(path))
    loader = importlib.machinery.SourceFileLoader("config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("config", loader))
    try:
        loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(_NO_FUNCTION)
        return from_config_dict(module.get_config(name) if name else module.get_config())
    except Exception as error:  # a file of the user's can raise anything
        raise ValueError(_config_problem(error)) from error


def _no_file(path: str) -> str:
    return f"--config: there is no file {path!r}"


def _config_problem(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"--config: {kind}{error}"


def _parse(argv: list[str]) -> list[str]:
    for arg in argv:
        name, _, value = arg.partition("=")
        path = value.partition(":")[0]
        if name == "--config" and not pathlib.Path(path).is_file():
            fail(_no_file(path))
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an override of a field that there is not
        fail(_unknown_field(argv, str(error)))
    except (flags.Error, OSError, ValueError, TypeError) as error:
        lines = str(error).rstrip().splitlines()
        # config_flags puts a whole traceback into the message when a config file raises.
        fail(f"{lines[0].rstrip(':')}: {lines[-1]}" if "Traceback" in str(error) else str(error))
    except Exception as error:  # a config file that is not Python, or fails when it is run
        fail(_config_problem(error))


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
