"""Draw the held-out losses of several runs into one picture.

python launch/plot.py --run=runs/one --run=runs/other --output=curves.png
"""

from absl import flags

from blocktx import command_line
from blocktx.train import plot_runs

_RUNS = flags.DEFINE_multi_string("run", None, "A run's folder; may be repeated.")
_OUTPUT = flags.DEFINE_string("output", None, "The PNG, SVG or PDF file to write.")


def main() -> None:
    print(plot_runs(_RUNS.value, _OUTPUT.value))


if __name__ == "__main__":
    command_line.run(main, required=("run", "output"), picture="output")
