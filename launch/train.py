"""Train a model.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the configuration can be overridden, as in --config.training.steps=50. Ctrl-C and
SIGTERM save before they stop; the same command with --resume goes on from there.
"""

import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from blocktx.config import from_config_dict
from blocktx.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A Python file whose get_config() describes the run (see configs/)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run: new, or to be resumed.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint in --workdir.")

_EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError)


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            _fail(f"--{flag.name} is missing; see --help")
    try:
        train(from_config_dict(_CONFIG.value.to_dict()), _WORKDIR.value, resume=_RESUME.value)
    except _EXPECTED_ERRORS as error:
        logging.debug("%s", traceback.format_exc())  # with --verbosity=debug
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        sys.exit(130)
    workdir = pathlib.Path(_WORKDIR.value)
    print(f"checkpoints in {workdir / 'checkpoints'}, loss curve in {workdir / 'loss.png'}")
    print(f"python launch/generate.py --checkpoint={workdir} --prompt='...'")


def _parse(argv: list[str]) -> list[str]:
    """Parses flags, with one line instead of a traceback for a wrong one."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an override of a field that there is not
        _fail(_unknown_field(argv, str(error)))
    except (flags.Error, OSError) as error:
        _fail(str(error))


def _unknown_field(argv: list[str], problem: str) -> str:
    # All that config_flags says is "'stepz'" and perhaps "Did you mean "steps" ...".
    name, close = re.search(r"\w+", problem), re.search(r'Did you mean "(\w+)"', problem)
    for arg in argv:
        if name and name[0] in arg.partition("=")[0].split("."):
            hint = f"; did you mean {close[1]}?" if close else ""
            return f"{arg}: the configuration has no field {name[0]}{hint}"
    return problem


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
