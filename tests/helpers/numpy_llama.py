"""Models of Llama type in float64 NumPy, from the tensors of a Hugging Face model.

Independent of blocktx: the model itself, and a partition of its layers (paper, appendix P), with
block embeddings that are means and a prefix that repeats the context embedding.
"""

import numpy as np


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * scale


def frequencies(rope, size, context):
    """Return rotary frequencies, and the factor of cosine and sine, of `rope_parameters`."""
    base, factor = rope["rope_theta"], rope.get("factor", 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    plain = [base ** (-2 * i / size) for i in range(size // 2)]
    original = rope.get("original_max_position_embeddings", context)
    if kind == "linear":
        return np.array(plain) / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = [(original * f / (2 * np.pi) - low) / (high - low) for f in plain]
        kept = np.clip(kept, 0, 1)
        return np.array(plain) * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":

        def place(rotations):
            return size * np.log(original / (2 * np.pi * rotations)) / (2 * np.log(base))

        first = max(np.floor(place(rope.get("beta_fast", 32.0))), 0)
        last = min(np.ceil(place(rope.get("beta_slow", 1.0))), size - 1)
        scaled = np.clip((np.arange(size // 2) - first) / max(last - first, 1e-3), 0, 1)
        scale = rope.get("attention_factor", 0.1 * np.log(factor) + 1)
        return np.array(plain) * (1 - scaled + scaled / factor), scale
    return np.array(plain), 1.0


def rotate(x_TxHxC, frequencies_F, scale):
    """Rotary positions 0, 1, ...: channel i is paired with i + C/2."""
    length, _, size = x_TxHxC.shape
    angle = np.arange(length)[:, None] * frequencies_F
    cos, sin = np.cos(angle)[:, None] * scale, np.sin(angle)[:, None] * scale
    a, b = x_TxHxC[..., : size // 2], x_TxHxC[..., size // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Llama:
    """Layers of a Llama, Mistral, Qwen2 or Qwen3 model."""

    def __init__(self, config, tensors):
        self.tensors = {name: array.astype(np.float64) for name, array in tensors.items()}
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.kv_heads, self.epsilon = config["num_key_value_heads"], config["rms_norm_eps"]
        self.rotary = frequencies(
            config["rope_parameters"], self.size, config["max_position_embeddings"]
        )
        self.table = self.tensors["model.embed_tokens.weight"]
        self.head = self.tensors.get("lm_head.weight", self.table)

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def norm(self, name, x):
        scale = self.tensors.get(f"{name}.weight")
        return x if scale is None else rms_norm(x, scale, self.epsilon)

    def layer(self, i, x_TxD):
        name = f"model.layers.{i}"
        x_TxD = x_TxD + self.attend(name, self.norm(f"{name}.input_layernorm", x_TxD))
        h_TxD = self.norm(f"{name}.post_attention_layernorm", x_TxD)
        gate, up = (self.linear(f"{name}.mlp.{part}_proj", h_TxD) for part in ("gate", "up"))
        return x_TxD + self.linear(f"{name}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)

    def attend(self, name, x_TxD):
        length = len(x_TxD)
        q, k, v = (
            self.linear(f"{name}.self_attn.{part}_proj", x_TxD).reshape(length, -1, self.size)
            for part in "qkv"
        )
        q, k = (
            self.norm(f"{name}.self_attn.{part}_norm", x)
            for part, x in zip("qk", (q, k), strict=True)
        )
        q, k = rotate(q, *self.rotary), rotate(k, *self.rotary)
        k, v = (np.repeat(x, self.heads // self.kv_heads, axis=1) for x in (k, v))
        scores = np.einsum("thc,shc->hts", q, k) / np.sqrt(self.size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hts,shc->thc", weights, v).reshape(length, -1)
        return self.linear(f"{name}.self_attn.o_proj", attended)

    def stack(self, layers, x_TxD):
        for i in layers:
            x_TxD = self.layer(i, x_TxD)
        return x_TxD

    def logits(self, tokens_T):
        """Return logits `[T, V]` of the model itself."""
        x_TxD = self.stack(range(self.layers), self.table[tokens_T])
        return self.norm("model.norm", x_TxD) @ self.head.T

    def partition_logits(self, tokens_NxK, prefix_length):
        """Return logits `[N-1, K, V]` of the block model that halves the layers."""
        half = self.layers // 2
        blocks_NxD = self.table[tokens_NxK].mean(1)
        context_NxD = rms_norm(self.stack(range(half), blocks_NxD), 1.0, self.epsilon)
        logits = []
        for context_D, tokens_K in zip(context_NxD[:-1], tokens_NxK[1:], strict=True):
            prefix_PxD = np.repeat(context_D[None], prefix_length, axis=0)
            x_TxD = np.concatenate([prefix_PxD, self.table[tokens_K[:-1]]])
            x_TxD = self.stack(range(half, self.layers), x_TxD)[prefix_length - 1 :]
            logits.append(self.norm("model.norm", x_TxD) @ self.head.T)
        return np.array(logits)
