"""Counted FLOPs, bytes and parameters of a model's programs, from its configuration alone.

FLOPs are those of matrix products, a multiplication and an addition each, in the plain form:
attention is over all slots, masked or not, and nothing is recomputed. Bytes are what these products
must move if each reads its operands and writes its result once, at `compute_dtype` (logits are
float32), all other work is fused into them, and the scores of an attention stay on the chip.
Nothing is padded to the shape of a matrix unit.

The functions from `extend` on are named after the methods of `blocktx.model.BlockTransformer`. A
vanilla model is one whose blocks are one token long.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from blocktx.config import EncoderConfig, ModelConfig, RunConfig, StackConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of a program, over all chips together."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "Cost":
        return Cost(times * self.flops, times * self.bytes)


class Parameters(NamedTuple):
    """Numbers of parameters."""

    total: int
    non_embedding: int  # outside tables and classifier
    stacks: int  # of the decoders' layers and final norms: what the paper calls non-embedding


def count_params(config: ModelConfig) -> Parameters:
    """How many parameters a model has."""
    tables = config.vocab_size * _classified_width(config)  # the classifier
    if config.kind == "vanilla":
        stacks = _stack_params(config.decoder)
        tables += config.vocab_size * config.decoder.width
        return Parameters(tables + stacks, stacks, stacks)

    cross = config.conditioning == "cross_attention"
    stacks = _stack_params(config.block_decoder) + _stack_params(config.token_decoder, cross=cross)
    inner = _linear_params(config.context_width, _expanded(config) * config.token_decoder.width)
    rows, row_width, projected = _embedder_shape(config)
    if projected:
        inner += _linear_params(rows * row_width, config.context_width)
    if config.embedder.kind == "mean_mlp":
        hidden = rows * row_width
        inner += _linear_params(hidden, hidden) + _linear_params(hidden, row_width)
    tables += config.vocab_size * (row_width + config.token_decoder.width)
    if config.embedder.kind in ("encoder", "cls"):
        inner += _stack_params(config.embedder.encoder)  # its one norm more is before the layers
        tables += (config.encoder_positions + 1) * row_width
    return Parameters(tables + inner + stacks, inner + stacks, stacks)


def cache_bytes(config: ModelConfig, slots: int) -> int:
    """Bytes of keys and values for one sequence in a cache of `slots` blocks."""
    stack = config.decoder if config.kind == "vanilla" else config.block_decoder
    return 2 * stack.layers * slots * _group(config) * stack.width * _itemsize(config)


def logits_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the float32 logits of `tokens` tokens."""
    return 4 * config.vocab_size * tokens


def train_step(config: RunConfig) -> Cost:
    """One update by a batch, all microbatches of it.

    The backward pass multiplies twice for each product of the forward pass, and moves the same
    bytes for each. AdamW reads the gradient and reads and writes parameters and two moments.
    """
    model, parts = config.model, config.training.microbatches
    rows = config.training.batch_size // parts
    cost = 3 * parts * forward(model, rows)
    if "auto_encoding_loss" in config.loss.weights:
        cost += 3 * parts * _decode_blocks(model, rows * (model.blocks - 1))
    if "block_decoding_loss" in config.loss.weights and config.loss.block_decoding == "contrastive":
        compared = rows * (model.blocks - 1) * model.embeddings_per_block
        product = _product(compared, model.block_decoder.width, compared, 4)
        cost += 2 * parts * product  # no gradient flows into what is compared with
    update = count_params(model).total * (4 + 2 * 4 + 2 * 2 * 4)
    return cost + Cost(bytes=update)


def forward(config: ModelConfig, batch_size: int) -> Cost:
    """The teacher-forced forward pass over whole contexts."""
    blocks = config.blocks
    if config.kind == "vanilla":
        run = _stack(config, config.decoder, batch_size, blocks, blocks)
        return run + _classifier(config, batch_size * blocks)
    slots = blocks * config.embeddings_per_block
    return (
        _embed(config, batch_size * blocks)
        + _stack(config, config.block_decoder, batch_size, slots, slots)
        + _decode_blocks(config, batch_size * (blocks - 1))
    )


def extend(config: ModelConfig, batch_size: int, blocks: int, slots: int) -> Cost:
    """Prefill of `blocks` blocks a row, or with 1 the block step, in a cache of `slots` blocks."""
    group = _group(config)
    if config.kind == "vanilla":
        return _stack(config, config.decoder, batch_size, blocks, slots)
    return _embed(config, batch_size * blocks) + _stack(
        config, config.block_decoder, batch_size, blocks * group, slots * group
    )


def start_block(config: ModelConfig, batch_size: int) -> Cost:
    """From a context embedding to the logits of the first token of its block."""
    cost = _classifier(config, batch_size)
    if config.kind == "block":
        cost += _expand(config, batch_size)
        cost += _token_stack(config, batch_size, _before(config), _token_slots(config))
    return cost


def step_token(config: ModelConfig, batch_size: int) -> Cost:
    """From a token to the logits of the next one in its block."""
    if config.kind == "vanilla":
        raise ValueError("config.kind: a vanilla model has no token decoder; use a block model")
    stack = _token_stack(config, batch_size, 1, _token_slots(config))
    return stack + _classifier(config, batch_size)


def decode_block(config: ModelConfig, batch_size: int, slots: int) -> Cost:
    """A block step and its K token steps: K new tokens a row."""
    cost = extend(config, batch_size, 1, slots) + start_block(config, batch_size)
    if config.block_length > 1:
        cost += (config.block_length - 1) * step_token(config, batch_size)
    return cost


def generate(config: ModelConfig, batch_size: int, prompt_tokens: int, new_tokens: int) -> Cost:
    """Prompts to `new_tokens` tokens more, with a cache as large as they need."""
    length = config.block_length
    prompt, new = -(-prompt_tokens // length), -(-new_tokens // length)
    slots = prompt + new - 1  # nobody continues the last block
    prefill = extend(config, batch_size, prompt, slots)
    return prefill + new * decode_block(config, batch_size, slots)


def _group(config: ModelConfig) -> int:
    return config.embeddings_per_block


def _itemsize(config: ModelConfig) -> int:
    return 2 if config.compute_dtype == "bfloat16" else np.dtype(config.compute_dtype).itemsize


def _classified_width(config: ModelConfig) -> int:
    return (config.decoder if config.kind == "vanilla" else config.token_decoder).width


def _before(config: ModelConfig) -> int:
    """Positions of the token decoder before a block's tokens."""
    return config.prefix_length if config.conditioning == "prefix" else 1


def _token_slots(config: ModelConfig) -> int:
    return _before(config) + config.block_length - 1


def _expanded(config: ModelConfig) -> int:
    """Vectors that a context embedding is expanded to."""
    return config.prefix_length if config.conditioning == "prefix" else config.block_length


def _embedder_shape(config: ModelConfig) -> tuple[int, int, bool]:
    """Rows of the embedder that are put together, their width, and whether they are projected."""
    embedder, length = config.embedder, config.block_length
    if embedder.kind == "lookup":
        return length, config.context_width // length, False
    if embedder.kind in ("projection", "mean", "mean_mlp"):
        width = embedder.width or config.block_decoder.width
        return length, width, embedder.kind == "projection"
    rows = embedder.cls_tokens if embedder.kind == "cls" else length
    return rows, embedder.encoder.width, not embedder.concatenate


def _linear_params(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _stack_params(stack: StackConfig | EncoderConfig, *, cross: bool = False) -> int:
    """Layers, of two or with `cross` three norms, and one norm more; nothing without layers."""
    if stack.layers == 0:
        return 0
    width, hidden = stack.width, stack.mlp_size
    mlp = _linear_params(width, hidden) + _linear_params(hidden, width)
    attention = _linear_params(width, 3 * width) + _linear_params(width, width)
    norms = 3 if cross else 2
    attentions = 2 if cross else 1
    return stack.layers * (mlp + attentions * attention + norms * 2 * width) + 2 * width


def _product(
    rows: int, inputs: int, outputs: int, itemsize: int, result_itemsize: int | None = None
) -> Cost:
    result = rows * outputs * (result_itemsize or itemsize)
    return Cost(2 * rows * inputs * outputs, (rows + outputs) * inputs * itemsize + result)


def _attend(sequences: int, queries: int, slots: int, width: int, itemsize: int) -> Cost:
    """Scores and weighted sums. Queries and keys are read, values too; what they make is written.

    Of each product one side is the scores, which stay on the chip.
    """
    flops = 2 * (2 * sequences * queries * slots * width)
    return Cost(flops, 2 * sequences * (queries + slots) * width * itemsize)


def _stack(
    config: ModelConfig,
    stack: StackConfig | EncoderConfig,
    sequences: int,
    queries: int,
    slots: int,
    *,
    memory: int = 0,
) -> Cost:
    """Layers over `queries` positions of each sequence, which attend to `slots` and a memory."""
    size, width = _itemsize(config), stack.width
    rows = sequences * queries
    layer = (
        _product(rows, width, 3 * width, size)
        + _attend(sequences, queries, slots, width, size)
        + _product(rows, width, width, size)
        + _product(rows, width, stack.mlp_size, size)
        + _product(rows, stack.mlp_size, width, size)
    )
    if memory:
        layer += (
            _product(rows, width, width, size)
            + _product(sequences * memory, width, 2 * width, size)
            + _attend(sequences, queries, memory, width, size)
            + _product(rows, width, width, size)
        )
    return stack.layers * layer


def _classifier(config: ModelConfig, rows: int) -> Cost:
    width = _classified_width(config)
    return _product(rows, width, config.vocab_size, _itemsize(config), result_itemsize=4)


def _embed(config: ModelConfig, blocks: int) -> Cost:
    rows, row_width, projected = _embedder_shape(config)
    cost = Cost()
    if config.embedder.kind in ("encoder", "cls"):
        tokens = config.encoded_tokens
        cost += _stack(config, config.embedder.encoder, blocks, tokens, tokens)
    if projected:
        cost += _product(blocks, rows * row_width, config.context_width, _itemsize(config))
    if config.embedder.kind == "mean_mlp":
        hidden, size = rows * row_width, _itemsize(config)
        cost += _product(blocks, hidden, hidden, size) + _product(blocks, hidden, row_width, size)
    return cost


def _expand(config: ModelConfig, blocks: int) -> Cost:
    outputs = _expanded(config) * config.token_decoder.width
    return _product(blocks, config.context_width, outputs, _itemsize(config))


def _token_stack(config: ModelConfig, blocks: int, queries: int, slots: int) -> Cost:
    memory = config.block_length if config.conditioning == "cross_attention" else 0
    return _stack(config, config.token_decoder, blocks, queries, slots, memory=memory)


def _decode_blocks(config: ModelConfig, blocks: int) -> Cost:
    """The teacher-forced token decoder."""
    slots = _token_slots(config)
    return (
        _expand(config, blocks)
        + _token_stack(config, blocks, slots, slots)
        + _classifier(config, blocks * config.block_length)
    )
