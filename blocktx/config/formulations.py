"""Formulations: how each operation is computed on a backend.

They change speed, memory and rounding only.

This is the one place where a backend is turned into choices. Each choice can be made by hand, to
bisect a NaN or to compare speeds: `--config.model.formulations.norm=plain`.
"""

import dataclasses
from typing import Any, Literal

from blocktx.config.fields import check_fields, not_negative


@dataclasses.dataclass(frozen=True)
class Formulations:
    """The formulation of each operation. "auto" and 0: the backend's default.

    Attributes:
      self_attention: over a whole sequence. plain: all scores at once. splash: a Pallas kernel for
        TPU that stores no scores; for 128 positions and more. cudnn: NVIDIA's flash attention, for
        bfloat16, whole sequences and heads of 8 to 128 channels; real positions must be contiguous.
      token_attention: over the positions of one block. pallas: a kernel for TPU. products: without
        matrix products, by channel, then summed.
      cached_attention: over a cache of many slots. by_head: one product a head. head_by_head: the
        heads in a loop, so that no copy of the cache is larger than one head. block_diagonal: all
        heads in two products, for few queries.
      token_cached_attention: over the few slots of a block. elementwise: products by channel.
      cache_dtype: of keys and values of blocks, or of a vanilla model's tokens, while decoding.
        int8: with a float32 scale for each head of a slot. It rounds more than other formulations,
        so no backend has it by default.
      cache_write: of one slot of a cache in int8. tile: with all 32 slots of its tile on a TPU. For
        a write at one of them XLA copies the whole cache to other tiles and back. If rows write at
        slots of their own, up to 1,024 slots are written whole.
      cached_rotary: rotary positions while decoding. product: by a matrix of 0, 1 and -1.
      scores: of plain self-attention. recomputed: for its gradient, instead of saved.
      norm: lean: the gradient saves only the input.
      loss: logits: from the logits of all tokens. fused: its gradient is formed beside the logits,
        a chunk of tokens at a time. scattered: fused, with a scatter for the labels.
      narrow_layers: stacks of width below 1024. unrolled: no loop over layers.
      kernels: weights of a wider dtype than the computation's. cast_first: once, before products.
      sampler: chunked: argmax and categorical draws by sums of chunks.
      pallas: interpreted: kernels run without their hardware, slowly, and cudnn as XLA.
      prefill_positions: positions of prompts that a device reads at once.
      loss_tokens: tokens of a device whose logits the fused loss forms at once.
    """

    self_attention: Literal["auto", "plain", "splash", "cudnn"] = "auto"
    token_attention: Literal["auto", "plain", "pallas", "products"] = "auto"
    cached_attention: Literal["auto", "by_head", "head_by_head", "block_diagonal"] = "auto"
    token_cached_attention: Literal["auto", "by_head", "elementwise"] = "auto"
    cache_dtype: Literal["auto", "compute_dtype", "int8"] = "auto"
    cache_write: Literal["auto", "slot", "tile"] = "auto"
    cached_rotary: Literal["auto", "by_head", "product"] = "auto"
    scores: Literal["auto", "saved", "recomputed"] = "auto"
    norm: Literal["auto", "plain", "lean"] = "auto"
    loss: Literal["auto", "logits", "fused", "scattered"] = "auto"
    narrow_layers: Literal["auto", "loop", "unrolled"] = "auto"
    kernels: Literal["auto", "cast_in_product", "cast_first"] = "auto"
    sampler: Literal["auto", "plain", "chunked"] = "auto"
    pallas: Literal["auto", "compiled", "interpreted"] = "auto"
    prefill_positions: int = 0
    loss_tokens: int = 0

    def __post_init__(self):
        check_fields(self)
        not_negative(self, "prefill_positions", "loss_tokens")

    @staticmethod
    def plain() -> "Formulations":
        """Return the formulations that any backend can run, the reference of all others."""
        return Formulations(**_PLAIN)

    def resolved(self, platform: str) -> "Formulations":
        """Return the formulations on a backend, with no "auto" left.

        Args:
          platform: of `jax.default_backend()`. An unknown one gets the plain ones.
        """
        defaults = _DEFAULTS.get(platform, _PLAIN)
        chosen = {name: value for name, value in vars(self).items() if value not in ("auto", 0)}
        return Formulations(**{**defaults, **chosen})


AUTO = Formulations()

_PLAIN: dict[str, Any] = dict(
    self_attention="plain",
    token_attention="plain",
    cached_attention="by_head",
    token_cached_attention="by_head",
    cache_dtype="compute_dtype",
    cache_write="slot",
    cached_rotary="by_head",
    scores="saved",
    norm="plain",
    loss="logits",
    narrow_layers="loop",
    kernels="cast_in_product",
    sampler="plain",
    pallas="compiled",
    prefill_positions=1024,
    loss_tokens=4096,
)

_GPU = _PLAIN | dict(
    self_attention="cudnn",
    token_attention="products",
    norm="lean",
    loss="scattered",
    narrow_layers="unrolled",
    prefill_positions=16_384,
    loss_tokens=2048,
)

_DEFAULTS: dict[str, dict[str, Any]] = {
    # The prefill keeps within a CPU's cache.
    "cpu": _PLAIN | dict(cached_attention="head_by_head", sampler="chunked", pallas="interpreted"),
    "gpu": _GPU,
    # At 1024 positions the matrix units are busy; the scores of 2048 are 200 MB.
    "tpu": _PLAIN
    | dict(
        self_attention="splash",
        token_attention="pallas",
        cached_attention="block_diagonal",
        token_cached_attention="elementwise",
        cache_write="tile",
        cached_rotary="product",
        scores="recomputed",
        norm="lean",
        loss="fused",
        narrow_layers="unrolled",
        kernels="cast_first",
        loss_tokens=16_384,
    ),
}
