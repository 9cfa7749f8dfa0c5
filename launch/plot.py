"""Draw the held-out losses of several runs into one picture.

python launch/plot.py --run=runs/one --run=runs/other --output=curves.png
"""

import sys

from absl import app, flags

from blocktx.metrics import plot_runs

_RUNS = flags.DEFINE_multi_string("run", None, "A run's folder; may be repeated.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The PNG file to write.", required=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        print(plot_runs(_RUNS.value, _OUTPUT.value))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
