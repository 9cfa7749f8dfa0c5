"""All studies, by name: what each of the paper's findings needs, at any scale."""

from collections.abc import Callable

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import (
    allocation,
    block_length,
    conditioning,
    embedder,
    equal_flops,
    first_phase,
    frontier,
    growth,
    long_context,
    long_prompt,
    megabyte,
    position_loss,
    regime,
    uptraining,
)
from blocktx.reproduce.study import Study

# In the order in which `all` makes them: the main findings first.
STUDIES: dict[str, Callable[[Base], Study]] = {
    "regime": regime.study,
    "learning_curve": regime.learning_curve,
    "growth": growth.study,
    "block_length": block_length.study,
    "allocation": allocation.study,
    "position_loss": position_loss.study,
    "conditioning": conditioning.study,
    "embedder": embedder.study,
    "frontier": frontier.study,
    "uptraining": uptraining.study,
    "megabyte": megabyte.study,
    "long_context": long_context.study,
    "long_prompt": long_prompt.study,
    "equal_flops": equal_flops.study,
    "allocation_by_length": allocation.by_length,
    "learning_rate": frontier.learning_rate,
}

# What the paper leaves open; not part of `all`.
FURTHER: dict[str, Callable[[Base], Study]] = {
    "mean_embedder": embedder.mean_study,
    "first_phase": first_phase.study,
}
