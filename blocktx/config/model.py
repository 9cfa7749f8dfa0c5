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
from blocktx.config.formulations import AUTO, Formulations
from blocktx.config.stack import StackConfig, heads_divide, require_layers

Dtype = Literal["float32", "bfloat16"]
MEAN_KINDS = ("mean", "mean_mlp")  # of embedders


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The bidirectional encoder of `encoder` and `cls` embedders (RoBERTa)."""

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
        heads_divide(self)

    @property
    def mlp_size(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """Embedder of the tokens of a block (paper, section 2 and appendix).

    lookup: the rows of a table, concatenated.
    projection: the rows of a wider table, concatenated and projected.
    encoder: the outputs of an encoder over the tokens, concatenated and projected.
    cls: its outputs at `cls_tokens` CLS tokens before them, projected, or with `concatenate` not.
    mean: the mean of the rows of a table.
    mean_mlp: that mean, plus an MLP over the concatenated rows: K*D -> K*D -> D, with SiLU.
    """

    kind: Literal["lookup", "projection", "encoder", "cls", "mean", "mean_mlp"] = "lookup"
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
    """The fields of both kinds of models.

    Attributes:
      vocab_size: rows of the tables.
      context_length: tokens.
      initializer_range: standard deviation of new weights.
      tied_classifier: the classifier is the (token decoder's) embedding table, transposed.
      param_dtype, compute_dtype: of the parameters, and of matrix products and activations.
      scan_layers: parameters stacked over layers, for a scan; False: one subtree a layer.
      remat: activations recomputed for the gradient. none; full: all; dots: all but the outputs of
        matrix products; offload: as dots, these saved in the host's memory.
      platform: the backend whose formulations are used; auto: `jax.default_backend()`.
      formulations: formulations chosen by hand.
    """

    vocab_size: int
    context_length: int
    initializer_range: float = 0.02
    tied_classifier: bool = False
    # Execution options: they change speed, memory and rounding, not the function.
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "offload"] = "none"
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    formulations: Formulations = AUTO

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
        require_layers(self.block_decoder, "block_decoder")
        if self.token_decoder.layers == 0:
            require(
                self.conditioning == "prefix",
                "conditioning",
                f"{self.conditioning} needs a token decoder with layers; without any, use prefix",
            )
        if self.embedder.kind in MEAN_KINDS:
            require(
                self.embeddings_per_block == 1,
                "embeddings_per_block",
                f"got {self.embeddings_per_block}, a {self.embedder.kind} embedder makes 1",
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
    def positions_before(self) -> int:
        """Positions of the token decoder before a block's tokens: the prefix, or one BOS token."""
        return self.prefix_length if self.conditioning == "prefix" else 1

    @property
    def condition_vectors(self) -> int:
        """Vectors that a context embedding is expanded to."""
        return self.prefix_length if self.conditioning == "prefix" else self.block_length

    @property
    def embedder_rows(self) -> tuple[int, int]:
        """Number and width of the vectors that the embedder concatenates."""
        embedder, length = self.embedder, self.block_length
        if embedder.kind == "lookup":
            return length, self.context_width // length
        if embedder.kind in ("projection", *MEAN_KINDS):
            return length, embedder.width or self.block_decoder.width
        return embedder.cls_tokens if embedder.kind == "cls" else length, embedder.encoder.width

    @property
    def embedder_projects(self) -> bool:
        """Return whether the embedder projects the concatenated vectors."""
        return self.embedder.kind not in ("lookup", *MEAN_KINDS) and not self.embedder.concatenate

    @property
    def context_width(self) -> int:
        """Width of all embeddings of a block together."""
        return self.block_decoder.width * self.embeddings_per_block

    @property
    def pad_id(self) -> int:
        """The default token that fills blocks: the encoder's, or 0."""
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
    """The decoder-only baseline: one stack over tokens."""

    kind: Literal["vanilla"] = "vanilla"
    decoder: StackConfig

    # Class constants: to data and decoding, a token is a block of one.
    block_length = 1
    embeddings_per_block = 1
    pad_id = 0

    def __post_init__(self):
        super().__post_init__()
        _require_whole_blocks(self)
        require_layers(self.decoder, "decoder")


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


def with_cache_dtype(config: ModelConfig, dtype: Literal["int8"] | None) -> ModelConfig:
    """Return `config` with a cache in `dtype`, see `Formulations`; None: `config`.

    Raises:
      UserError: there is no such dtype.
    """
    if dtype is None:
        return config
    formulations = dataclasses.replace(config.formulations, cache_dtype=dtype)
    return dataclasses.replace(config, formulations=formulations)
