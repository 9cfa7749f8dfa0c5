"""Flags that make a program fit."""

from jax.sharding import Mesh

from blocktx.config import RunConfig
from blocktx.parallel import batch_parts


def training_advice(kinds: dict[str, float], limit: float, config: RunConfig, mesh: Mesh) -> str:
    """Return the flags that reduce what takes the most memory in training."""
    state = kinds["parameters"] + kinds["optimizer"]
    others = sum(kinds.values()) - state
    parts = config.training.microbatches
    rows = config.training.batch_size // batch_parts(mesh) // parts
    enough = [n for n in range(2, rows + 1) if rows % n == 0 and state + others / n < 0.9 * limit]
    knobs = []
    if enough:
        knobs.append(f"--config.training.microbatches={parts * enough[0]}")
    elif rows > 1:
        knobs.append(f"--config.training.microbatches={parts * rows}, and what follows here")
    if config.model.remat != "full":
        knobs.append("--config.model.remat=full")
    if mesh.shape["data"] > 1:
        knobs.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    if not enough:
        knobs.append(f"--config.mesh.tensor={2 * mesh.shape['tensor']}")
        knobs.append("a topology of more chips")
    return ", or ".join(knobs)


def decoding_advice(batch_size: int, parts: int, context: int) -> str:
    """Return the flags that reduce the memory of decoding."""
    knobs = []
    if batch_size > parts:
        knobs.append(f"--batch_size={max(parts, batch_size // 2 // parts * parts)}")
    knobs += [f"--context below {context}", "--quantize=int8"]
    knobs += ["--config.model.formulations.cache_dtype=int8", "--config.mesh.tensor=2"]
    return ", or ".join(knobs)
