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
    """Return the numbers of parameters of a model."""
    tables = (not config.tied_classifier) * config.vocab_size * _classified_width(config)
    if config.kind == "vanilla":
        stacks = _stack_params(config.decoder)
        tables += config.vocab_size * config.decoder.width
        return Parameters(tables + stacks, stacks, stacks)

    cross = config.conditioning == "cross_attention"
    stacks = _stack_params(config.block_decoder) + _stack_params(config.token_decoder, cross=cross)
    expanded = config.condition_vectors * config.token_decoder.width
    inner = _linear_params(config.context_width, expanded)
    rows, row_width = config.embedder_rows
    if config.embedder_projects:
        inner += _linear_params(rows * row_width, config.context_width)
    if config.embedder.kind == "mean_mlp":
        hidden = rows * row_width
        inner += _linear_params(hidden, hidden) + _linear_params(hidden, row_width)
    tables += config.vocab_size * (row_width + config.token_decoder.width)
    if config.embedder.kind in ("encoder", "cls"):
        inner += _encoder_params(config.embedder.encoder)
        tables += (config.encoder_positions + 1) * row_width
    return Parameters(tables + inner + stacks, inner + stacks, stacks)


def cache_bytes(config: ModelConfig, slots: int) -> int:
    """Return the bytes of keys and values of one sequence in a cache of `slots` blocks."""
    slots *= config.embeddings_per_block
    return slots * _cached(config).layers * _slot_bytes(config)


def logits_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of the float32 logits of `tokens` tokens."""
    return 4 * config.vocab_size * tokens


def training_run(config: RunConfig) -> Cost:
    """Return the cost of all updates of a run."""
    bags = config.loss.bag_steps
    return bags * train_step(config, bag=True) + (config.training.steps - bags) * train_step(config)


def train_step(config: RunConfig, bag: bool = False) -> Cost:
    """Return the cost of one update by a batch, all its microbatches.

    With `bag` it is one of `config.loss.bag_steps`. The backward pass multiplies twice for each
    product of the forward pass, and moves the same bytes for each. AdamW reads the gradient and
    reads and writes parameters and two moments.
    """
    model, parts = config.model, config.training.microbatches
    rows = config.training.batch_size // parts
    update = Cost(bytes=count_params(model).total * (4 + 2 * 4 + 2 * 2 * 4))
    cost = 3 * parts * forward(model, rows, bag) + update
    weights = {} if bag else config.loss.weights
    if "auto_encoding_loss" in weights:
        cost += 3 * parts * _decode_blocks(model, rows * (model.blocks - 1))
    if "block_decoding_loss" in weights and config.loss.block_decoding == "contrastive":
        compared = rows * (model.blocks - 1) * model.embeddings_per_block
        product = _product(compared, model.block_decoder.width, compared, 4)
        cost += 2 * parts * product  # no gradient flows into what is compared with
    return cost


def forward(config: ModelConfig, batch_size: int, bag: bool = False) -> Cost:
    """Return the cost of the teacher-forced forward pass over whole contexts, or over bags."""
    blocks = config.blocks
    if config.kind == "vanilla":
        run = _stack(config, config.decoder, batch_size, blocks, blocks)
        return run + _classifier(config, batch_size * blocks)
    slots, predicted = blocks * config.embeddings_per_block, batch_size * (blocks - 1)
    run = _stack(config, config.block_decoder, batch_size, slots, slots)
    run += _embed(config, batch_size * blocks)
    if bag:
        return run + _expand(config, predicted) + _classifier(config, predicted)
    return run + _decode_blocks(config, predicted)


def extend(config: ModelConfig, batch_size: int, blocks: int, slots: int) -> Cost:
    """Return the cost of a prefill of `blocks` blocks a row; with 1, of the block step."""
    group, each = config.embeddings_per_block, _slot_bytes(config)
    sizes = (batch_size, blocks * group, slots * group)
    embed = Cost() if config.kind == "vanilla" else _embed(config, batch_size * blocks)
    return embed + _stack(config, _cached(config), *sizes, slot_bytes=each)


def start_block(config: ModelConfig, batch_size: int) -> Cost:
    """Return the cost from a context embedding to the logits of its block's first token."""
    cost = _classifier(config, batch_size)
    if config.kind == "block":
        cost += _expand(config, batch_size)
        cost += _token_stack(config, batch_size, config.positions_before, _token_slots(config))
    return cost


def step_token(config: ModelConfig, batch_size: int) -> Cost:
    """Return the cost from a token to the logits of the next one in its block."""
    if config.kind == "vanilla":
        raise ValueError("config.kind: a vanilla model has no token decoder; use a block model")
    stack = _token_stack(config, batch_size, 1, _token_slots(config))
    return stack + _classifier(config, batch_size)


def decode_block(config: ModelConfig, batch_size: int, slots: int) -> Cost:
    """Return the cost of a block step and its K token steps: K new tokens a row."""
    cost = extend(config, batch_size, 1, slots) + start_block(config, batch_size)
    steps = config.block_length - 1
    return cost + steps * step_token(config, batch_size) if steps else cost


def generate(config: ModelConfig, batch_size: int, prompt_tokens: int, new_tokens: int) -> Cost:
    """Return the cost of `new_tokens` more tokens after prompts, in the smallest cache."""
    length = config.block_length
    prompt, new = -(-prompt_tokens // length), -(-new_tokens // length)
    slots = prompt + new - 1  # nobody continues the last block
    prefill = extend(config, batch_size, prompt, slots)
    return prefill + new * decode_block(config, batch_size, slots)


def _itemsize(config: ModelConfig) -> int:
    return 2 if config.compute_dtype == "bfloat16" else np.dtype(config.compute_dtype).itemsize


def _cached(config: ModelConfig) -> StackConfig:
    return config.decoder if config.kind == "vanilla" else config.block_decoder


def _slot_bytes(config: ModelConfig) -> int:
    """Return the bytes of the keys and values of one slot in the cache of one layer."""
    stack = _cached(config)
    if config.formulations.cache_dtype == "int8":
        return 2 * (stack.kv_width + 4 * stack.kv_heads)  # with a float32 scale for each head
    return 2 * stack.kv_width * _itemsize(config)


def _classified_width(config: ModelConfig) -> int:
    return (config.decoder if config.kind == "vanilla" else config.token_decoder).width


def _token_slots(config: ModelConfig) -> int:
    return config.positions_before + config.block_length - 1


def _stack_params(stack: StackConfig, *, cross: bool = False) -> int:
    """Return the parameters of layers, of two or with `cross` three norms, and one more norm.

    A stack without layers has no norm.
    """
    if stack.layers == 0:
        return 0
    width, queries, hidden = stack.width, stack.query_width, stack.mlp_size
    projections = 3 if stack.mlp == "swiglu" else 2
    mlp = projections * width * hidden + stack.mlp_bias * ((projections - 1) * hidden + width)
    attention = _linear_params(width, queries + 2 * stack.kv_width, stack.attention_bias)
    attention += _linear_params(queries, width, stack.biases == "all")
    head_norms = 2 * stack.head_size if stack.qk_norm else 0
    norm = width if stack.norm == "rms" else 2 * width
    norms, attentions = (3, 2) if cross else (2, 1)
    layer = mlp + attentions * attention + head_norms + norms * norm
    return stack.layers * layer + norm


def _encoder_params(encoder: EncoderConfig) -> int:
    """Return the parameters of layers of two norms, and of the norm before them."""
    width, hidden = encoder.width, encoder.mlp_size
    mlp = _linear_params(width, hidden) + _linear_params(hidden, width)
    attention = _linear_params(width, 3 * width) + _linear_params(width, width)
    return encoder.layers * (mlp + attention + 4 * width) + 2 * width


def _linear_params(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def _product(
    rows: int, inputs: int, outputs: int, itemsize: int, result_itemsize: int | None = None
) -> Cost:
    result = rows * outputs * (result_itemsize or itemsize)
    return Cost(2 * rows * inputs * outputs, (rows + outputs) * inputs * itemsize + result)


def _attend(
    sequences: int, queries: int, slots: int, query_width: int, slot_bytes: int, itemsize: int
) -> Cost:
    """Return scores and weighted sums. Queries, keys and values are read, outputs are written."""
    flops = 2 * (2 * sequences * queries * slots * query_width)
    return Cost(flops, sequences * (2 * queries * query_width * itemsize + slots * slot_bytes))


def _stack(
    config: ModelConfig,
    stack: StackConfig,
    sequences: int,
    queries: int,
    slots: int,
    *,
    memory: int = 0,
    slot_bytes: int | None = None,  # of its keys and values; None: at `compute_dtype`
) -> Cost:
    """Return layers over `queries` positions a sequence, which attend to `slots` and a memory."""
    size, width = _itemsize(config), stack.width
    wide, narrow, hidden = stack.query_width, stack.kv_width, stack.mlp_size
    rows = sequences * queries
    # One product for queries, keys and values, unless the queries are grouped.
    projected = [3 * wide] if wide == narrow else [wide, 2 * narrow]
    projected += [hidden] * (2 if stack.mlp == "swiglu" else 1)
    plain = 2 * narrow * size
    layer = _attend(sequences, queries, slots, wide, slot_bytes or plain, size)
    layer += _product(rows, wide, width, size) + _product(rows, hidden, width, size)
    for outputs in projected:
        layer += _product(rows, width, outputs, size)
    if memory:
        layer += (
            _product(rows, width, wide, size)
            + _product(sequences * memory, width, 2 * narrow, size)
            + _attend(sequences, queries, memory, wide, plain, size)
            + _product(rows, wide, width, size)
        )
    return stack.layers * layer


def _classifier(config: ModelConfig, rows: int) -> Cost:
    return _product(rows, _classified_width(config), config.vocab_size, _itemsize(config), 4)


def _embed(config: ModelConfig, blocks: int) -> Cost:
    rows, row_width = config.embedder_rows
    cost = Cost()
    if config.embedder.kind in ("encoder", "cls"):
        tokens = config.encoded_tokens
        encoder = config.embedder.encoder
        sizes = encoder.layers, encoder.width, encoder.heads, encoder.mlp_width
        cost += _stack(config, StackConfig(*sizes, rotary_fraction=0.0), blocks, tokens, tokens)
    if config.embedder_projects:
        cost += _product(blocks, rows * row_width, config.context_width, _itemsize(config))
    if config.embedder.kind == "mean_mlp":
        hidden, size = rows * row_width, _itemsize(config)
        cost += _product(blocks, hidden, hidden, size) + _product(blocks, hidden, row_width, size)
    return cost


def _expand(config: ModelConfig, blocks: int) -> Cost:
    outputs = config.condition_vectors * config.token_decoder.width
    return _product(blocks, config.context_width, outputs, _itemsize(config))


def _token_stack(config: ModelConfig, blocks: int, queries: int, slots: int) -> Cost:
    memory = config.block_length if config.conditioning == "cross_attention" else 0
    return _stack(config, config.token_decoder, blocks, queries, slots, memory=memory)


def _decode_blocks(config: ModelConfig, blocks: int) -> Cost:
    """Return the cost of the teacher-forced token decoder."""
    slots = _token_slots(config)
    return (
        _expand(config, blocks)
        + _token_stack(config, blocks, slots, slots)
        + _classifier(config, blocks * config.block_length)
    )
