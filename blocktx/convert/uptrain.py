"""A vanilla model turned into a block model that goes on from what it knows (appendix P).

Nothing is drawn at random: the block model's layers are the vanilla model's, a block embedding is
the mean of its tokens' embeddings, and a prefix repeats the context embedding. `lengthen` then
makes blocks longer step by step (appendix B.4: 1 -> 2 -> 4), with some training between the steps.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np

from blocktx.config import BlockConfig, EmbedderConfig, StackConfig, VanillaConfig
from blocktx.model import stack_layers, unstack_layers

Method = Literal["partition", "skip", "duplicate"]


def uptrain(
    vanilla: VanillaConfig,
    params: dict[str, Any],
    *,
    method: Method,
    block_length: int,
    block_layers: int | None = None,
    prefix_length: int = 2,
) -> tuple[BlockConfig, dict[str, Any]]:
    """The authors' initialisation of a block model from a vanilla one.

    The table of the (projection) embedder and that of the token decoder, and the token decoder's
    final norm and classifier, are the vanilla model's. The block decoder's final norm is new.

    Args:
      vanilla: what `params` are parameters of.
      params: arrays of numpy or JAX; those that are taken over are not copied.
      method: which layers become those of block decoder and token decoder. partition: the first
        ones and the rest; skip: every second one, from the first on, for both; duplicate: all of
        them for both.
      block_length: K of the block model.
      block_layers: how many layers partition gives to the block decoder; None: half of them.
      prefix_length: P of the block model.

    Returns:
      The block model's configuration, execution fields as `vanilla` has them, and its parameters.

    Raises:
      ValueError: if the model is not a vanilla one, `method` is unknown, the layers cannot be
        divided so, or `block_length` or `prefix_length` cannot be; all that is wrong is listed.
    """
    if vanilla.kind != "vanilla":
        raise ValueError("a block model is what uptrain makes; lengthen makes its blocks longer")
    problems = []
    try:
        for_blocks, for_tokens = _division(vanilla.decoder.layers, method, block_layers)
    except ValueError as error:
        problems.append(str(error))
    if block_length < 1:
        problems.append(f"block_length: got {block_length}, must be greater than 0")
    else:
        problems += _undivided(f"block_length: {block_length}", block_length, vanilla)
    if prefix_length < 1:
        problems.append(f"prefix_length: got {prefix_length}, must be greater than 0")
    _raise_all(problems)
    config = BlockConfig(
        **_common_fields(vanilla),
        block_length=block_length,
        embedder=EmbedderConfig(kind="projection"),
        block_decoder=_with_layers(vanilla.decoder, for_blocks),
        token_decoder=_with_layers(vanilla.decoder, for_tokens),
        prefix_length=prefix_length,
    )
    if not vanilla.scan_layers:
        params = stack_layers(params)
    stack, table = params["decoder"]["stack"], params["embed"]["embedding"]
    eye_DxD = np.eye(vanilla.decoder.width, dtype=table.dtype)
    zeros_D = np.zeros_like(eye_DxD[0])

    def layers(taken: slice) -> Any:
        return jax.tree.map(lambda leaf: leaf[taken], stack["layers"])

    block_params = {
        "embedder": {
            "tokens": {"embedding": table},
            "projection": {
                "kernel": np.stack([eye_DxD / block_length] * block_length),  # [K, D, D]
                "bias": zeros_D,
            },
        },
        "block_decoder": {
            "stack": {
                "layers": layers(for_blocks),
                "final_norm": {"scale": np.ones_like(zeros_D), "bias": zeros_D},
            },
        },
        "token_decoder": {
            "embed": {"embedding": table},
            "expansion": {
                "kernel": np.stack([eye_DxD] * prefix_length, axis=1),  # [D, P, D]
                "bias": np.stack([zeros_D] * prefix_length),
            },
            "stack": {"layers": layers(for_tokens), "final_norm": stack["final_norm"]},
            "classifier": params["classifier"],
        },
    }
    return config, block_params if config.scan_layers else unstack_layers(block_params)


def lengthen(
    config: BlockConfig, params: dict[str, Any], factor: int = 2
) -> tuple[BlockConfig, dict[str, Any]]:
    """The same model with blocks `factor` times as long (appendix B.4).

    The embedding of a new block is the mean of the embeddings of the blocks that it is made of. All
    other parameters are those given, not copied.

    Args:
      config: of a block model with projection embedder and conditioning by a prefix.
      params: its parameters, arrays of numpy or JAX.
      factor: 1 or more.

    Raises:
      ValueError: if the model is of another kind, `factor` is below 1, or the context is not two
        or more whole blocks of the new length; all that is wrong is listed.
    """
    if config.kind != "block":
        raise ValueError("a vanilla model has no blocks to lengthen; uptrain makes a block model")
    problems = []
    if factor < 1:
        problems.append(f"factor: got {factor}; use 2 or more")
    else:
        problems += _undivided(f"factor: {factor}", factor, config)
    if config.embedder.kind != "projection":
        problems.append(
            f"embedder.kind: {config.embedder.kind} embeddings of a longer block are not the mean "
            "of those of its parts; lengthen takes models with a projection embedder"
        )
    if config.conditioning != "prefix":
        problems.append(
            f"conditioning: {config.conditioning} makes one vector of the context for each token "
            "of a block, and knows none for more tokens; lengthen takes models with a prefix"
        )
    _raise_all(problems)
    config = dataclasses.replace(config, block_length=config.block_length * factor)
    projection = params["embedder"]["projection"]
    kernel = np.tile(np.asarray(projection["kernel"]) / factor, (factor, 1, 1))
    kernel = kernel.astype(projection["kernel"].dtype)
    embedder = params["embedder"] | {"projection": projection | {"kernel": kernel}}
    return config, params | {"embedder": embedder}


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _undivided(given: str, factor: int, config: BlockConfig | VanillaConfig) -> list[str]:
    """The problem, if there is one, with blocks `factor` times as long as those of `config`."""
    usable = [f for f in range(1, config.blocks // 2 + 1) if config.blocks % f == 0]
    if factor in usable:
        return []
    longer = config.block_length * factor
    made = "" if longer == factor else f" makes blocks of {longer}, and that"
    return [
        f"{given}{made} does not divide context_length {config.context_length} into two or more "
        f"blocks; use {'one of ' * (len(usable) > 1)}{', '.join(map(str, usable))}"
    ]


def _division(layers: int, method: str, block_layers: int | None) -> tuple[slice, slice]:
    """The layers that become those of the block decoder, and of the token decoder."""
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}; use one of {', '.join(get_args(Method))}")
    if method != "partition":
        if block_layers is not None:
            raise ValueError(f"block_layers: is for partition only, got {block_layers}")
        if method == "skip" and layers % 2 == 1:
            raise ValueError(
                f"method: skip cannot give every second one of {layers} layers to both decoders; "
                "use an even number of layers, or duplicate"
                + (f", or partition with block_layers 1 to {layers - 1}" if layers > 1 else "")
            )
        both = slice(None, None, 2 if method == "skip" else 1)
        return both, both
    if layers == 1:
        raise ValueError("method: partition cannot divide 1 layer in two; use duplicate")
    if block_layers is None:
        if layers % 2 == 1:
            raise ValueError(
                f"method: partition cannot divide {layers} layers into halves; say how many go to "
                f"the block decoder with block_layers {layers // 2} or {layers // 2 + 1}"
            )
        block_layers = layers // 2
    if not 1 <= block_layers < layers:
        raise ValueError(
            f"block_layers: got {block_layers} of {layers} layers, which leaves a decoder without "
            f"any; use 1 to {layers - 1}"
        )
    return slice(None, block_layers), slice(block_layers, None)


def _with_layers(stack: StackConfig, taken: slice) -> StackConfig:
    return dataclasses.replace(stack, layers=len(range(stack.layers)[taken]))


def _common_fields(vanilla: VanillaConfig) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(BlockConfig)} - {"kind"}
    return {name: value for name, value in vars(vanilla).items() if name in names}
