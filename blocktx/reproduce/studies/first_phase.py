"""What the paper leaves open: a first phase with the bag-of-next-block loss."""

import dataclasses

from blocktx.config import RunConfig
from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Found, Results, Run, Study, lower, spread

_PARTS = (8, 4)  # the phase takes 1 / part of the steps


def study(base: Base) -> Study:
    """Return the study of block runs that begin with the bag-of-next-block loss."""
    ordinary = common.ordinary(base)
    steps = ordinary.config.training.steps
    phases = {part: steps // part for part in _PARTS}
    runs = {0: ordinary} | {
        length: Run(f"bag_{part}", _with_bag(ordinary, length)) for part, length in phases.items()
    }

    def find(results: Results) -> Found:
        losses = {length: results.values(run.name) for length, run in runs.items()}
        return Found(
            [
                lower(
                    losses[length],
                    losses[0],
                    f"the loss is lower with the bag loss in the first {length} of {steps} steps",
                    results.noise(),
                )
                for length in phases.values()
            ],
            ["steps with the bag loss first", "training FLOPs", "loss"],
            [
                [f"{length}", f"{results.values(run.name, 'flops')[0]:.2g}", spread(losses[length])]
                for length, run in runs.items()
            ],
            [],
        )

    return Study(
        "first_phase",
        "A first phase with the bag-of-next-block loss makes better use of as many steps.",
        list(runs.values()),
        [],
        find,
    )


def _with_bag(run: Run, steps: int) -> RunConfig:
    loss = dataclasses.replace(run.config.loss, bag_steps=steps)
    return dataclasses.replace(run.config, loss=loss)
