"""Tables of the stacks that models are made of: GPT-NeoX, Llama and RoBERTa."""

from blocktx.config import EncoderConfig, StackConfig
from blocktx.convert.mapping import Entry, linear, norm, table


def neox_stack(ours: str, theirs: str, stack: StackConfig) -> list[Entry]:
    """Return the entries of GPT-NeoX layers and their final norm.

    Queries, keys and values are fused head by head.
    """
    width, heads, size, hidden = stack.width, stack.heads, stack.head_size, stack.mlp_size
    attention_bias = stack.biases == "all"
    entries = norm(f"{ours}/final_norm", f"{theirs}.final_layer_norm", width)
    for i in range(stack.layers):
        o, t = f"{ours}/layers_{i}", f"{theirs}.layers.{i}"
        qkv, dense = f"{t}.attention.query_key_value", f"{t}.attention.dense"
        split = dict(out_order=(1, 0, 2), bias=attention_bias)
        entries += [
            *linear(f"{o}/attention/qkv", qkv, (heads, 3, size), (width,), **split),
            *linear(f"{o}/attention/out", dense, (width,), (heads, size), bias=attention_bias),
            *norm(f"{o}/attention_norm", f"{t}.input_layernorm", width),
            *norm(f"{o}/mlp_norm", f"{t}.post_attention_layernorm", width),
            *linear(f"{o}/mlp/up", f"{t}.mlp.dense_h_to_4h", (hidden,), (width,)),
            *linear(f"{o}/mlp/down", f"{t}.mlp.dense_4h_to_h", (width,), (hidden,)),
        ]
    return entries


def llama_stack(ours: str, theirs: str, stack: StackConfig) -> list[Entry]:
    """Return the entries of Llama layers and their final norm; also of Qwen2 and Qwen3."""
    width, heads, size, hidden = stack.width, stack.heads, stack.head_size, stack.mlp_size
    qkv_bias = stack.biases == "qkv"
    entries = norm(f"{ours}/final_norm", f"{theirs}.norm", width, bias=False)
    for i in range(stack.layers):
        o, t = f"{ours}/layers_{i}", f"{theirs}.layers.{i}"
        attention = f"{t}.self_attn"
        q, k, v = (f"{attention}.{name}_proj" for name in "qkv")
        if stack.kv_heads == heads:
            entries += linear(
                f"{o}/attention/qkv", (q, k, v), (3, heads, size), (width,), bias=qkv_bias
            )
        else:
            kv = (2, stack.kv_heads, size)
            entries += linear(f"{o}/attention/q", q, (heads, size), (width,), bias=qkv_bias)
            entries += linear(f"{o}/attention/kv", (k, v), kv, (width,), bias=qkv_bias)
        for name in ("q_norm", "k_norm") if stack.qk_norm else ():
            entries += norm(f"{o}/attention/{name}", f"{attention}.{name}", size, bias=False)
        entries += [
            *linear(
                f"{o}/attention/out", f"{attention}.o_proj", (width,), (heads, size), bias=False
            ),
            *norm(f"{o}/attention_norm", f"{t}.input_layernorm", width, bias=False),
            *norm(f"{o}/mlp_norm", f"{t}.post_attention_layernorm", width, bias=False),
            *linear(f"{o}/mlp/gate", f"{t}.mlp.gate_proj", (hidden,), (width,), bias=False),
            *linear(f"{o}/mlp/up", f"{t}.mlp.up_proj", (hidden,), (width,), bias=False),
            *linear(f"{o}/mlp/down", f"{t}.mlp.down_proj", (width,), (hidden,), bias=False),
        ]
    return entries


def roberta(ours: str, theirs: str, encoder: EncoderConfig, vocab: int, rows: int) -> list[Entry]:
    """Return the entries of an encoder with `rows` positions."""
    width, heads, hidden = encoder.width, encoder.heads, encoder.mlp_size
    size = width // heads
    embeddings = f"{theirs}.embeddings"
    entries = [
        table(f"{ours}/tokens", f"{embeddings}.word_embeddings", vocab, width),
        table(f"{ours}/positions", f"{embeddings}.position_embeddings", rows, width),
        table(f"{ours}/type", f"{embeddings}.token_type_embeddings", 1, width),
        *norm(f"{ours}/embedding_norm", f"{embeddings}.LayerNorm", width),
    ]
    for i in range(encoder.layers):
        o, t = f"{ours}/layer_{i}", f"{theirs}.encoder.layer.{i}"
        qkv = tuple(f"{t}.attention.self.{name}" for name in ("query", "key", "value"))
        entries += [
            *linear(f"{o}/qkv", qkv, (3, heads, size), (width,)),
            *linear(f"{o}/out", f"{t}.attention.output.dense", (width,), (heads, size)),
            *norm(f"{o}/attention_norm", f"{t}.attention.output.LayerNorm", width),
            *linear(f"{o}/mlp/up", f"{t}.intermediate.dense", (hidden,), (width,)),
            *linear(f"{o}/mlp/down", f"{t}.output.dense", (width,), (hidden,)),
            *norm(f"{o}/mlp_norm", f"{t}.output.LayerNorm", width),
        ]
    return entries
