"""Runs, measurements and charts that studies have in common."""

from collections.abc import Mapping, Sequence

from blocktx.config import EmbedderConfig, ModelConfig, RunConfig
from blocktx.reproduce.scale import Base, with_steps
from blocktx.reproduce.study import Chart, Run, Series, Speed

RATIOS = [(5, 1), (2, 1), (1, 1), (1, 2), (1, 5)]  # of layers in block and token decoder
LENGTHS = (1, 2, 4, 8)  # tokens in a block
LOSS = "held-out loss (nats per token)"


def vanilla(base: Base) -> Run:
    return Run("vanilla", base.vanilla)


def of_length(base: Base, length: int) -> Run:
    """The block run with blocks of another length, and no more prefixes than tokens."""
    prefix = min(length, base.block.model.prefix_length)
    return Run(f"length_{length}", base.vary(block_length=length, prefix_length=prefix))


def ordinary(base: Base) -> Run:
    """The block run as it is."""
    return of_length(base, base.block.model.block_length)


def allocated(base: Base, ratio: tuple[int, int], length: int) -> Run:
    """The run of that block length with its layers divided as `ratio`."""
    run = of_length(base, length)
    if ratio == (1, 1):
        return run
    name = f"ratio_{ratio[0]}_{ratio[1]}_{run.name}"
    prefix = run.config.model.prefix_length
    divided = base.divided(*ratio)
    return Run(name, base.vary(**divided, block_length=length, prefix_length=prefix))


def halved(run: Run) -> Run:
    """The run over half the steps, with a schedule of its own."""
    return Run(f"{run.name}_half_steps", shortened(run.config, 2))


def shortened(config: RunConfig, part: int) -> RunConfig:
    """The run over 1 / `part` of the steps."""
    return with_steps(config, config.training.steps // part)


def prefix(base: Base, length: int) -> Run:
    """The block run with a prefix of another length."""
    if length == base.block.model.prefix_length:
        return ordinary(base)
    return Run(f"prefix_{length}", base.vary(prefix_length=length))


def projection(base: Base) -> Run:
    """The block run with the embedder that uptraining needs."""
    width = base.block.model.block_decoder.width
    return Run("projection", base.vary(embedder=EmbedderConfig(kind="projection", width=width)))


def speed_of(name: str, base: Base, models: Mapping[str, ModelConfig]) -> Speed:
    """The models at the prompt, answer and batch that a scale has for most studies."""
    scale = base.scale
    prompts = dict.fromkeys(models, scale.prompt_tokens)
    return Speed(name, dict(models), prompts, scale.new_tokens, scale.batch_size)


def setting(speed: Speed) -> str:
    (prompt,) = set(speed.prompt_tokens.values())
    return f"batch {speed.batch_size}, {prompt:,} tokens in, {speed.new_tokens:,} out"


def compared(name: str, title: str, losses: Mapping[str, Sequence[float]]) -> Chart:
    """Losses, a value a seed, side by side."""
    points = Series("", range(len(losses)), list(losses.values()), joined=False)
    return Chart(name, title, "", LOSS, [points], ticks=dict(enumerate(losses)))


def describe(model: ModelConfig) -> str:
    """Return layers and width of a model, and the block length if it has one."""
    if model.kind == "vanilla":
        return f"vanilla, {model.decoder.layers} x {model.decoder.width}"
    block, token = model.block_decoder, model.token_decoder
    width = f"{block.width}" if block.width == token.width else f"{block.width}/{token.width}"
    return f"blocks of {model.block_length}, {block.layers}+{token.layers} x {width}"
