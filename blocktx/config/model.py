"""Frozen dataclasses of a model: block, with every variant of the paper, or vanilla."""

import dataclasses
from typing import Literal

from blocktx.config.fields import (
    check_fields,
    divisors,
    not_negative,
    positive,
    require,
)

Dtype = Literal["float32", "bfloat16"]


def _heads_divide(config: "StackConfig | EncoderConfig") -> None:
    require(
        config.width % config.heads == 0,
        "heads",
        f"{config.heads} does not divide width {config.width}; use one of "
        f"{divisors(config.width, config.heads)}",
    )


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A stack of GPT-NeoX layers (the backbone of Pythia and the paper)."""

    layers: int
    width: int
    heads: int
    mlp_width: int | None = None  # None: 4 * width
    rotary_fraction: float = 0.25  # the share of each head that is rotated
    rotary_base: float = 10_000.0

    def __post_init__(self):
        check_fields(self)
        positive(self, "layers", "width", "heads", "rotary_base")
        if self.mlp_width is not None:
            positive(self, "mlp_width")
        _heads_divide(self)
        require(
            0 <= self.rotary_fraction <= 1,
            "rotary_fraction",
            f"got {self.rotary_fraction}, must be between 0 and 1",
        )
        require(
            self.rotary_dims % 2 == 0,
            "rotary_fraction",
            f"{self.rotary_fraction} of head size {self.head_size} is {self.rotary_dims} rotated "
            "dimensions, which must be an even number; use 0.25, 0.5 or 1.0 of a head size that is "
            "a multiple of 8",
        )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def mlp_size(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def rotary_dims(self) -> int:
        return int(self.head_size * self.rotary_fraction)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The small bidirectional encoder in front of `encoder` and `cls` embedders (RoBERTa)."""

    layers: int = 3
    width: int = 256
    heads: int = 8
    mlp_width: int | None = None  # None: 4 * width
    positions: int | None = None  # rows of the table of positions; None: as many as are used
    pad_id: int = 1  # tokens that are not counted in positions
    cls_id: int = 0

    def __post_init__(self):
        check_fields(self)
        positive(self, "layers", "width", "heads")
        not_negative(self, "pad_id", "cls_id")
        for field in ("mlp_width", "positions"):
            if getattr(self, field) is not None:
                positive(self, field)
        _heads_divide(self)

    @property
    def mlp_size(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """How the tokens of a block become block embeddings (paper, section 2 and appendix).

    lookup: the rows of a table, concatenated.
    projection: the rows of a wider table, concatenated and projected.
    encoder: the outputs of an encoder over the tokens, concatenated and projected.
    cls: its outputs at `cls_tokens` CLS tokens before them, projected, or with `concatenate` not.
    """

    kind: Literal["lookup", "projection", "encoder", "cls"] = "lookup"
    width: int | None = None  # of a row, for projection; None: the block decoder's
    cls_tokens: int = 3
    concatenate: bool = False
    encoder: EncoderConfig = EncoderConfig()

    def __post_init__(self):
        check_fields(self)
        positive(self, "cls_tokens")
        if self.width is not None:
            require(
                self.kind == "projection",
                "width",
                f"got {self.width}, is for projection only; leave it unset for {self.kind}",
            )
            positive(self, "width")
        require(
            self.kind == "cls" or not self.concatenate,
            "concatenate",
            f"is for cls only, got True for {self.kind}; lookup concatenates anyway",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ModelConfig:
    """What block and vanilla models share."""

    vocab_size: int
    context_length: int  # tokens
    initializer_range: float = 0.02  # standard deviation of new weights
    # Execution: the same function, at another speed, in other memory, to other rounding.
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    scan_layers: bool = True  # parameters stacked under one scan; False: one subtree a layer
    # What of a layer's activations is computed again for its gradient: nothing, all, all but the
    # results of its matrix products, or nothing because those are kept in the host's memory.
    remat: Literal["none", "full", "dots", "offload"] = "none"
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # whose formulations; auto: JAX's own

    def __post_init__(self):
        check_fields(self)
        positive(self, "vocab_size", "context_length", "initializer_range")

    @property
    def blocks(self) -> int:
        """Blocks in a full context."""
        return self.context_length // self.block_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(_ModelConfig):
    """A Block Transformer: embedder, block decoder, token decoder (paper, section 2)."""

    kind: Literal["block"] = "block"
    block_length: int = 4
    embeddings_per_block: int = 1  # appendix B.2: attention is full inside a block
    embedder: EmbedderConfig = EmbedderConfig()
    block_decoder: StackConfig
    token_decoder: StackConfig
    conditioning: Literal["prefix", "summation", "cross_attention"] = "prefix"
    prefix_length: int = 2  # for conditioning by a prefix
    bos_id: int = 0  # stands before a block's tokens in the other conditionings

    def __post_init__(self):
        super().__post_init__()
        positive(self, "block_length", "embeddings_per_block", "prefix_length")
        _require_whole_blocks(self)
        require(
            0 <= self.bos_id < self.vocab_size,
            "bos_id",
            f"got {self.bos_id}, must be a token below vocab_size {self.vocab_size}",
        )
        width = self.context_width
        if self.embedder.kind == "lookup":
            require(
                width % self.block_length == 0,
                "block_length",
                f"{self.block_length} does not divide block_decoder.width x embeddings_per_block "
                f"{width} (the lookup embedder concatenates block_length rows); use one of "
                f"{divisors(width, self.block_length)}",
            )
        if self.embedder.kind == "cls" and self.embedder.concatenate:
            together = self.embedder.cls_tokens * self.embedder.encoder.width
            require(
                together == width,
                "embedder.encoder.width",
                f"{self.embedder.cls_tokens} cls_tokens of {self.embedder.encoder.width} make "
                f"{together}, which must be block_decoder.width x embeddings_per_block {width}; "
                + (
                    f"use {width // self.embedder.cls_tokens}"
                    if width % self.embedder.cls_tokens == 0
                    else f"use cls_tokens that divide {width}"
                ),
            )
        if self.embedder.kind in ("encoder", "cls"):
            tokens = self.encoded_tokens
            needed = tokens + self.embedder.encoder.pad_id + 1
            require(
                self.encoder_positions >= needed,
                "embedder.encoder.positions",
                f"{self.encoder_positions} are too few for {tokens} tokens; use {needed} or more",
            )

    @property
    def context_width(self) -> int:
        """Width of all embeddings of a block together."""
        return self.block_decoder.width * self.embeddings_per_block

    @property
    def pad_id(self) -> int:
        """The token that fills blocks where nobody says otherwise: the one the encoder knows."""
        return self.embedder.encoder.pad_id if self.embedder.kind in ("encoder", "cls") else 0

    @property
    def encoded_tokens(self) -> int:
        """Tokens that the embedder's encoder sees of a block."""
        return self.block_length + (self.embedder.cls_tokens if self.embedder.kind == "cls" else 0)

    @property
    def encoder_positions(self) -> int:
        """Rows of the table of positions of the embedder's encoder."""
        encoder = self.embedder.encoder
        return encoder.positions or self.encoded_tokens + encoder.pad_id + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class VanillaConfig(_ModelConfig):
    """The decoder-only baseline: one stack over tokens, GPT-NeoX."""

    kind: Literal["vanilla"] = "vanilla"
    decoder: StackConfig

    # Class constants: to data and decoding, a token is a block of one.
    block_length = 1
    embeddings_per_block = 1
    pad_id = 0

    def __post_init__(self):
        super().__post_init__()
        _require_whole_blocks(self)


def _require_whole_blocks(config: "ModelConfig") -> None:
    length, context = config.block_length, config.context_length
    below = max(context // length, 2) * length
    require(
        context % length == 0 and context >= 2 * length,
        "context_length",
        f"{context} is not two or more whole blocks of block_length {length} (the first block is "
        f"never predicted); use {below} or {below + length}",
    )


ModelConfig = BlockConfig | VanillaConfig
