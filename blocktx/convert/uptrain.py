"""A block model that starts from the knowledge of a vanilla model (paper, appendix P).

The block model's layers are the vanilla model's, a block embedding is the mean of its tokens'
embeddings, and a prefix repeats the context embedding. `lengthen` then makes blocks longer step by
step (appendix B.4: 1 -> 2 -> 4), with some training between the steps.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np

from blocktx.config import BlockConfig, EmbedderConfig, StackConfig, VanillaConfig
from blocktx.model import build, init_params, stack_layers, unstack_layers

Method = Literal["partition", "skip", "duplicate", "all"]
MeanEmbedder = Literal["projection", "mean", "mean_mlp"]  # embedders that can start as the mean


def uptrain(
    vanilla: VanillaConfig,
    params: dict[str, Any],
    *,
    method: Method,
    block_length: int,
    block_layers: int | None = None,
    prefix_length: int = 2,
    token_layers: int | None = None,
    embedder: MeanEmbedder = "projection",
    seed: int = 0,
) -> tuple[BlockConfig, dict[str, Any]]:
    """Initialise a block model from a vanilla one.

    The tables of the embedder and of the token decoder, and the token decoder's final norm and
    classifier, are the vanilla model's; a tied classifier stays tied. The block decoder's final
    norm is new. New layers start as the identity: their last projections are zero.

    Args:
      vanilla: the configuration of `params`.
      params: arrays of NumPy or JAX; those that are taken over are not copied.
      method: which layers become those of block decoder and token decoder. partition: the first
        ones and the rest; skip: every second one, from the first on, for both; duplicate: all of
        them for both; all: all of them for the block decoder, `token_layers` new ones for the token
        decoder.
      block_length: K of the block model.
      block_layers: how many layers partition gives to the block decoder; None: half of them.
      prefix_length: P of the block model.
      token_layers: number of new layers, for the method all; None: 2. Without any, the context
        embedding is classified directly, and blocks of length 1 give the vanilla model's logits.
      embedder: the kind of embedder, which starts exactly at the mean of the tokens' embeddings.
      seed: of new layers.

    Returns:
      The block model's configuration, execution fields as in `vanilla`, and its parameters.

    Raises:
      ValueError: the model is not a vanilla one, `method` or `embedder` is unknown, the layers
        cannot be divided in this way, or a number is out of range; all that is wrong is listed.
    """
    if vanilla.kind != "vanilla":
        raise ValueError("uptrain starts from a vanilla model; got a block model: see lengthen")
    problems = []
    try:
        for_blocks, for_tokens = _division(vanilla.decoder.layers, method, block_layers)
    except ValueError as error:
        problems.append(str(error))
    if method != "all" and token_layers is not None:
        problems.append(f"token_layers: is for the method all only, got {token_layers}")
    elif token_layers is not None and token_layers < 0:
        problems.append(f"token_layers: got {token_layers}, must be 0 or greater")
    if embedder not in get_args(MeanEmbedder):
        problems.append(
            f"embedder: got {embedder!r}; use one of {', '.join(get_args(MeanEmbedder))}"
        )
    if block_length < 1:
        problems.append(f"block_length: got {block_length}, must be greater than 0")
    else:
        problems += _undivided(f"block_length: {block_length}", block_length, vanilla)
    if prefix_length < 1:
        problems.append(f"prefix_length: got {prefix_length}, must be greater than 0")
    _raise_all(problems)
    token_decoder = _with_layers(vanilla.decoder, for_tokens)
    if method == "all":
        count = 2 if token_layers is None else token_layers
        token_decoder = dataclasses.replace(vanilla.decoder, layers=count)
    config = BlockConfig(
        **_common_fields(vanilla),
        block_length=block_length,
        embedder=EmbedderConfig(kind=embedder),
        block_decoder=_with_layers(vanilla.decoder, for_blocks),
        token_decoder=token_decoder,
        prefix_length=prefix_length,
    )
    if not vanilla.scan_layers:
        params = stack_layers(params)
    stack, table = params["decoder"]["stack"], params["embed"]["embedding"]
    eye_DxD = np.eye(vanilla.decoder.width, dtype=table.dtype)

    def layers(taken: slice) -> Any:
        return {"layers": jax.tree.map(lambda leaf: leaf[taken], stack["layers"])}

    block_norm, token_stack = _new_norm(stack["final_norm"]), layers(for_tokens)
    if method == "all":
        token_stack = _new_layers(config, seed)
        if not token_stack:  # nothing comes between the two final norms: there is one
            block_norm = stack["final_norm"]
    if token_stack:
        token_stack["final_norm"] = stack["final_norm"]
    token_params = {
        "embed": {"embedding": table},
        "expansion": {
            "kernel": np.stack([eye_DxD] * prefix_length, axis=1),  # [D, P, D]
            "bias": np.zeros((prefix_length, len(eye_DxD)), table.dtype),
        },
        "stack": token_stack,
        "classifier": params.get("classifier"),
    }
    block_params = {
        "embedder": _mean_embedder(embedder, block_length, table),
        "block_decoder": {"stack": layers(for_blocks) | {"final_norm": block_norm}},
        "token_decoder": {name: part for name, part in token_params.items() if part},
    }
    return config, block_params if config.scan_layers else unstack_layers(block_params)


def lengthen(
    config: BlockConfig, params: dict[str, Any], factor: int = 2
) -> tuple[BlockConfig, dict[str, Any]]:
    """Return the same model with blocks `factor` times as long (appendix B.4).

    The embedding of a new block is the mean of the embeddings of the blocks that it consists of.
    All other parameters are those given, not copied.

    Args:
      config: of a block model with a projection, mean or mean_mlp embedder and conditioning by a
        prefix.
      params: its parameters, arrays of NumPy or JAX.
      factor: 1 or more.

    Raises:
      ValueError: the model is of another kind, `factor` is below 1, or the context is not two or
        more whole blocks of the new length; all that is wrong is listed.
    """
    if config.kind != "block":
        raise ValueError("a vanilla model has no blocks to lengthen; uptrain makes a block model")
    problems = []
    if factor < 1:
        problems.append(f"factor: got {factor}; use 2 or more")
    else:
        problems += _undivided(f"factor: {factor}", factor, config)
    if config.embedder.kind not in get_args(MeanEmbedder):
        problems.append(
            f"embedder.kind: {config.embedder.kind} embeddings of a longer block are not the mean "
            "of those of its parts; lengthen takes models with a projection embedder, or one of "
            "the kinds mean and mean_mlp"
        )
    if config.conditioning != "prefix":
        problems.append(
            f"conditioning: {config.conditioning} makes one vector of the context for each token "
            "of a block, and knows none for more tokens; lengthen takes models with a prefix"
        )
    _raise_all(problems)
    longer = dataclasses.replace(config, block_length=config.block_length * factor)
    embedder = dict(params["embedder"])
    if config.embedder.kind == "projection":
        projection = embedder["projection"]
        kernel = np.asarray(projection["kernel"])
        tiled = np.tile(kernel / factor, (factor, 1, 1)).astype(kernel.dtype)
        embedder["projection"] = projection | {"kernel": tiled}
    if config.embedder.kind == "mean_mlp":
        embedder |= _lengthened_mlp(embedder, factor)
    return longer, params | {"embedder": embedder}


def _mean_embedder(kind: MeanEmbedder, block_length: int, table: Any) -> dict[str, Any]:
    """Return the parameters of an embedder that computes the mean of `block_length` rows."""
    tokens, width = {"embedding": table}, table.shape[1]
    if kind == "mean":
        return {"tokens": tokens}
    if kind == "projection":
        eye_DxD = np.eye(width, dtype=table.dtype)
        kernel = np.stack([eye_DxD / block_length] * block_length)  # [K, D, D]
        bias = np.zeros(width, table.dtype)
        return {"tokens": tokens, "projection": {"kernel": kernel, "bias": bias}}
    hidden = block_length * width
    # Any first projection will do: the second is zero. Blocks of it are the identity.
    up = np.eye(hidden, dtype=table.dtype).reshape(block_length, width, hidden)
    return {
        "tokens": tokens,
        "mlp_up": {"kernel": up, "bias": np.zeros(hidden, table.dtype)},
        "mlp_down": {
            "kernel": np.zeros((hidden, width), table.dtype),
            "bias": np.zeros(width, table.dtype),
        },
    }


def _lengthened_mlp(embedder: dict[str, Any], factor: int) -> dict[str, Any]:
    """Return the MLP that computes the mean of what the given one computes of each part."""
    up, down = ({k: np.asarray(v) for k, v in embedder[f"mlp_{n}"].items()} for n in ("up", "down"))
    length, width, hidden = up["kernel"].shape
    kernel = np.zeros((factor, length, width, factor, hidden), up["kernel"].dtype)
    for part in range(factor):
        kernel[part, :, :, part] = up["kernel"]
    return {
        "mlp_up": {
            "kernel": kernel.reshape(factor * length, width, factor * hidden),
            "bias": np.tile(up["bias"], factor),
        },
        "mlp_down": {
            "kernel": np.tile(down["kernel"] / factor, (factor, 1)).astype(down["kernel"].dtype),
            "bias": down["bias"],
        },
    }


def _new_norm(norm: dict[str, Any]) -> dict[str, Any]:
    """Return the initial values of a norm with the same parameters."""
    new = {"scale": np.ones, "bias": np.zeros}
    return {name: new[name](leaf.shape, leaf.dtype) for name, leaf in norm.items()}


def _new_layers(config: BlockConfig, seed: int) -> dict[str, Any]:
    """Return new layers of the token decoder, stacked, that start as the identity."""
    if config.token_decoder.layers == 0:
        return {}
    small = dataclasses.replace(config, vocab_size=1, bos_id=0, scan_layers=True)
    layers = init_params(build(small), jax.random.key(seed))["token_decoder"]["stack"]["layers"]
    layers = jax.tree.map(np.asarray, layers)
    for part, name in (("attention", "out"), ("mlp", "down")):
        last = layers[part][name]
        layers[part][name] = {leaf: np.zeros_like(array) for leaf, array in last.items()}
    return {"layers": layers}


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _undivided(given: str, factor: int, config: BlockConfig | VanillaConfig) -> list[str]:
    """Return the problem, if any, with blocks `factor` times as long as those of `config`."""
    blocks = config.blocks
    if blocks % factor == 0 and blocks // factor >= 2:
        return []
    usable = [f for f in range(1, min(blocks // 2, _MOST_TRIED) + 1) if blocks % f == 0]
    longer = config.block_length * factor
    made = "" if longer == factor else f" makes blocks of {longer}, and that"
    return [
        f"{given}{made} does not divide context_length {config.context_length} into two or more "
        f"blocks; use {'one of ' * (len(usable) > 1)}{', '.join(map(str, usable))}"
    ]


_MOST_TRIED = 64  # candidates for an error message


def _division(layers: int, method: str, block_layers: int | None) -> tuple[slice, slice]:
    """Return the layers that become those of the block decoder, and of the token decoder."""
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}; use one of {', '.join(get_args(Method))}")
    if method != "partition":
        if block_layers is not None:
            raise ValueError(f"block_layers: is for partition only, got {block_layers}")
        if method == "all":
            return slice(None), slice(0, 0)
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
