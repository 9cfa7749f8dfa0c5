"""Run the harness's command line with the model `blocktx` registered."""

from lm_eval.__main__ import cli_evaluate

import blocktx.lm_eval  # noqa: F401  registers the model
from blocktx.parallel import choose_backend

if __name__ == "__main__":
    choose_backend()
    cli_evaluate()
