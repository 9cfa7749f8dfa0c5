"""At what size the studies are made: the runs that they vary, and how fast is measured."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from blocktx.config import BlockConfig, ModelConfig, RunConfig, StackConfig


class Scale(NamedTuple):
    """The runs are given by their `--config`: FILE.py:NAME, from the top of a clone."""

    block: str  # the run that all ablations vary; its two decoders have layers of one kind
    vanilla: str  # its equal in non-embedding parameters
    smaller_block: str  # smaller than `block` and `vanilla`, and trained on no more tokens
    smaller_vanilla: str
    megabyte: str
    equal_flops: tuple[str, tuple[str, ...]]  # a vanilla run, and block models trained like it
    fast_block: str  # of which decoding is measured, as of the next two
    fast_vanilla: str
    fast_megabyte: str
    seeds: tuple[int, ...]
    frontier: tuple[str, ...]  # vanilla and block runs of several sizes, on the same tokens
    frontier_settings: dict[str, tuple[int, int]]  # prompt and new tokens
    long_context: int  # tokens
    long_prompt: int  # of the block model in the study of prompts; vanilla's is a quarter
    prompt_tokens: int  # elsewhere
    new_tokens: int
    batch_size: int  # rows decoded at a time, elsewhere than with long prompts
    long_batch_size: int


SCALES = {
    "cpu": Scale(
        block="configs/reproduce.py:block",
        vanilla="configs/reproduce.py:vanilla",
        smaller_block="configs/reproduce.py:smaller_block",
        smaller_vanilla="configs/reproduce.py:smaller_vanilla",
        megabyte="configs/reproduce.py:megabyte",
        equal_flops=(
            "configs/reproduce.py:vanilla",
            ("configs/reproduce.py:flops_block", "configs/reproduce.py:flops_wide_block"),
        ),
        fast_block="configs/paper.py:block_170m",
        fast_vanilla="configs/paper.py:vanilla_160m",
        fast_megabyte="configs/paper.py:megabyte_85m",
        seeds=(0, 1),
        frontier=tuple(
            f"configs/reproduce.py:{name}"
            for name in (
                "frontier_vanilla_s",
                "frontier_vanilla_m",
                "vanilla",
                "frontier_block4_s",
                "block",
                "frontier_block4_l",
                "frontier_block2",
                "frontier_block8",
            )
        ),
        frontier_settings={"prefill_heavy": (2048, 128), "decode_heavy": (128, 2048)},
        long_context=1024,
        long_prompt=8192,
        prompt_tokens=512,
        new_tokens=64,
        batch_size=8,
        long_batch_size=2,
    ),
    "paper": Scale(
        block="configs/paper.py:block_170m",
        vanilla="configs/paper.py:vanilla_160m",
        smaller_block="configs/paper.py:block_77m",
        smaller_vanilla="configs/paper.py:vanilla_70m",
        megabyte="configs/paper.py:megabyte_85m",
        equal_flops=(
            "configs/paper.py:vanilla_70m",
            ("configs/paper.py:flops_70m_170m", "configs/paper.py:flops_70m_420m"),
        ),
        fast_block="configs/paper.py:block_170m",
        fast_vanilla="configs/paper.py:vanilla_160m",
        fast_megabyte="configs/paper.py:megabyte_85m",
        seeds=(0,),
        frontier=tuple(
            f"configs/paper.py:{name}"
            for name in (
                "vanilla_31m",
                "vanilla_70m",
                "vanilla_160m",
                "block_33m",
                "block_77m",
                "block_170m",
                "block_420m",
            )
        ),
        frontier_settings={"prefill_heavy": (2048, 128), "decode_heavy": (128, 2048)},
        long_context=8192,
        long_prompt=8192,
        prompt_tokens=2048,
        new_tokens=128,
        batch_size=256,
        long_batch_size=64,
    ),
}


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same run over fewer or more steps, and all that happens in them in proportion."""
    before, optimizer, training = config.training.steps, config.optimizer, config.training

    def scaled(number: int) -> int:
        return max(1, number * steps // before)

    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            optimizer, warmup_steps=optimizer.warmup_steps * steps // before
        ),
        training=dataclasses.replace(
            training,
            steps=steps,
            evaluate_every=scaled(training.evaluate_every),
            checkpoint_every=scaled(training.checkpoint_every),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Base:
    """The runs of a scale, read."""

    scale: Scale
    block: RunConfig
    vanilla: RunConfig
    smaller_block: RunConfig
    smaller_vanilla: RunConfig
    megabyte: RunConfig
    equal_flops_vanilla: RunConfig
    equal_flops_blocks: dict[str, RunConfig]
    frontier: dict[str, RunConfig]
    fast_block: BlockConfig
    fast_vanilla: ModelConfig
    fast_megabyte: ModelConfig

    @classmethod
    def read(
        cls, scale: Scale, read_config: Callable[[str], RunConfig], steps: int | None = None
    ) -> "Base":
        """All runs; with `steps`, the block run has as many, and the others in proportion."""
        usual = read_config(scale.block).training.steps

        def read(spec: str) -> RunConfig:
            config = read_config(spec)
            if steps is None:
                return config
            return with_steps(config, max(1, round(config.training.steps * steps / usual)))

        vanilla, blocks = scale.equal_flops
        return cls(
            scale=scale,
            block=read(scale.block),
            vanilla=read(scale.vanilla),
            smaller_block=read(scale.smaller_block),
            smaller_vanilla=read(scale.smaller_vanilla),
            megabyte=read(scale.megabyte),
            equal_flops_vanilla=read(vanilla),
            equal_flops_blocks={spec.rpartition(":")[2]: read(spec) for spec in blocks},
            frontier={spec.rpartition(":")[2]: read(spec) for spec in scale.frontier},
            fast_block=read_config(scale.fast_block).model,
            fast_vanilla=read_config(scale.fast_vanilla).model,
            fast_megabyte=read_config(scale.fast_megabyte).model,
        )

    def vary(self, **fields: Any) -> RunConfig:
        """The block run with other fields of the model."""
        return dataclasses.replace(
            self.block, model=dataclasses.replace(self.block.model, **fields)
        )

    def divided(self, block: int, token: int) -> dict[str, StackConfig]:
        """The layers of the block run, divided between the decoders as `block` to `token`."""
        model = self.block.model
        layers = model.block_decoder.layers + model.token_decoder.layers
        of_block = layers * block // (block + token)
        return {
            "block_decoder": dataclasses.replace(model.block_decoder, layers=of_block),
            "token_decoder": dataclasses.replace(model.token_decoder, layers=layers - of_block),
        }
