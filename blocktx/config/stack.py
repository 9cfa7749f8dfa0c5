"""Frozen dataclasses of a stack of layers: GPT-NeoX, Llama, and mixtures."""

import dataclasses
from typing import Any, Literal

from blocktx.config.fields import check_fields, divisors, not_negative, positive, require


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Scaling of the rotary frequencies beyond the original context.

    Attributes:
      kind: none; linear: frequencies divided by `factor`; llama3: low frequencies divided, high
        ones kept, those between interpolated; yarn: likewise, by the rotations in the original
        context, and cosine and sine scaled (Peng et al., 2023).
      factor: of the longer context.
      low_frequency_factor, high_frequency_factor: of llama3.
      original_context: tokens; of llama3 and yarn.
      beta_fast, beta_slow: of yarn, rotations in the original context.
      attention_factor: of yarn, the scale of cosine and sine. None: 0.1 ln(factor) + 1.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        check_fields(self)
        positive(self, "factor", "low_frequency_factor", "original_context")
        positive(self, "beta_fast", "beta_slow")
        require(self.factor >= 1, "factor", f"got {self.factor}, must be at least 1")
        for low, high in (
            ("low_frequency_factor", "high_frequency_factor"),
            ("beta_slow", "beta_fast"),
        ):
            values = getattr(self, low), getattr(self, high)
            require(
                values[0] < values[1], high, f"{values[1]} must be greater than {low} {values[0]}"
            )
        if self.attention_factor is not None:
            positive(self, "attention_factor")
        for field in dataclasses.fields(self):
            known = _SCALING_FIELDS[self.kind]
            value = getattr(self, field.name)
            require(
                field.name in known or value == field.default,
                field.name,
                f"got {value}, is not used by {self.kind} scaling, which has {', '.join(known)}",
            )


_SCALING_FIELDS = {
    "none": ("kind",),
    "linear": ("kind", "factor"),
    "llama3": (
        "kind",
        "factor",
        "low_frequency_factor",
        "high_frequency_factor",
        "original_context",
    ),
    "yarn": ("kind", "factor", "original_context", "beta_fast", "beta_slow", "attention_factor"),
}


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A stack of transformer layers of the GPT-NeoX or Llama family.

    The defaults are GPT-NeoX (the backbone of Pythia and the paper); `StackConfig.llama` is Llama.

    Attributes:
      layers, width, heads: sizes. A token decoder may have 0 layers, and then no final norm.
      mlp_width: None: 4 * width.
      rotary_fraction: share of each head's channels that rotary positions rotate.
      rotary_base: base of the rotary frequencies.
      rotary_scaling: scaling of these frequencies.
      key_value_heads: heads of keys and values; each serves heads / key_value_heads consecutive
        query heads. None: heads.
      head_width: channels of a head. None: width // heads.
      norm: layer: LayerNorm; rms: RMSNorm, without bias.
      norm_epsilon: added to the variance or mean square.
      residual: parallel: attention and MLP both read the layer's input; sequential: the MLP reads
        the sum of input and attention.
      mlp: gelu: down(gelu(up(x))), exact; swiglu: down(silu(gate(x)) * up(x)).
      biases: which projections have one: all; qkv: queries, keys and values; mlp; or none.
      qk_norm: RMSNorm over each head of queries and keys, before rotary positions (Qwen3).
    """

    layers: int
    width: int
    heads: int
    mlp_width: int | None = None
    rotary_fraction: float = 0.25
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling = RotaryScaling()
    key_value_heads: int | None = None
    head_width: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    residual: Literal["parallel", "sequential"] = "parallel"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    biases: Literal["all", "qkv", "mlp", "none"] = "all"
    qk_norm: bool = False

    def __post_init__(self):
        check_fields(self)
        positive(self, "width", "heads", "rotary_base", "norm_epsilon")
        not_negative(self, "layers")
        for field in ("mlp_width", "key_value_heads", "head_width"):
            if getattr(self, field) is not None:
                positive(self, field)
        if self.head_width is None:
            heads_divide(self)
        require(
            self.heads % self.kv_heads == 0,
            "key_value_heads",
            f"{self.kv_heads} does not divide heads {self.heads}; use one of "
            f"{divisors(self.heads, self.kv_heads)}",
        )
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

    @classmethod
    def neox(cls, layers: int, width: int, heads: int, **fields: Any) -> "StackConfig":
        """Return a stack of GPT-NeoX layers (Black et al., 2022).

        Args:
          layers, width, heads: sizes.
          **fields: other fields; those that make the family cannot be changed.
        """
        return _preset(cls, "neox", (layers, width, heads), fields)

    @classmethod
    def llama(cls, layers: int, width: int, heads: int, **fields: Any) -> "StackConfig":
        """Return a stack of Llama layers: Llama 2 and 3, Mistral, SmolLM2, Qwen2.5, Qwen3.

        They have RMSNorm, sequential residuals, SwiGLU and fully rotated heads. By default they
        have no biases; Qwen2.5 has `biases="qkv"`.

        Args:
          layers, width, heads: sizes.
          **fields: other fields; those that make the family cannot be changed.
        """
        return _preset(cls, "llama", (layers, width, heads), fields)

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def query_width(self) -> int:
        """Channels of all heads of queries."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Channels of all heads of keys, or of values."""
        return self.kv_heads * self.head_size

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def rotary_dims(self) -> int:
        """Rotated channels of a head."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def attention_bias(self) -> bool:
        """Return whether queries, keys and values have a bias."""
        return self.biases in ("all", "qkv")

    @property
    def mlp_bias(self) -> bool:
        """Return whether the projections of the MLP have a bias."""
        return self.biases in ("all", "mlp")


# Family -> field -> its values, the first of which is the preset's.
_FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "neox": {
        "norm": ("layer",),
        "residual": ("parallel", "sequential"),
        "mlp": ("gelu",),
        "biases": ("all", "mlp"),
        "qk_norm": (False,),
    },
    "llama": {
        "norm": ("rms",),
        "residual": ("sequential",),
        "mlp": ("swiglu",),
        "biases": ("none", "qkv", "all", "mlp"),
        "rotary_fraction": (1.0,),
    },
}


def _preset(
    cls: type[StackConfig], family: str, sizes: tuple[int, int, int], fields: dict[str, Any]
) -> StackConfig:
    values = {}
    for name, choices in _FAMILIES[family].items():
        values[name] = fields.get(name, choices[0])
        require(
            values[name] in choices,
            name,
            f"got {values[name]!r}, {family} layers have {' or '.join(map(repr, choices))}; "
            "use StackConfig(...) for other mixtures",
        )
    return cls(*sizes, **(fields | values))


def require_layers(stack: StackConfig, name: str) -> None:
    """Require at least one layer of the stack in field `name`."""
    require(stack.layers > 0, f"{name}.layers", "got 0, must be greater than 0")


def heads_divide(config: Any) -> None:
    """Require a whole number of channels a head."""
    require(
        config.width % config.heads == 0,
        "heads",
        f"{config.heads} does not divide width {config.width}; use one of "
        f"{divisors(config.width, config.heads)}",
    )
