"""All studies, by name: what each of the paper's findings asks to be run, at any scale."""

from collections.abc import Callable

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import (
    allocation,
    block_length,
    conditioning,
    embedder,
    equal_flops,
    long_context,
    long_prompt,
    megabyte,
    position_loss,
    uptraining,
)
from blocktx.reproduce.study import Study

STUDIES: dict[str, Callable[[Base], Study]] = {
    "allocation": allocation.study,
    "position_loss": position_loss.study,
    "block_length": block_length.study,
    "embedder": embedder.study,
    "conditioning": conditioning.study,
    "long_context": long_context.study,
    "long_prompt": long_prompt.study,
    "equal_flops": equal_flops.study,
    "uptraining": uptraining.study,
    "megabyte": megabyte.study,
}
