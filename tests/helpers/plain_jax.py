"""What a blocktx checkpoint computes, in jax.numpy: read by Orbax, without blocktx. Copy freely.

`python tests/helpers/plain_jax.py runs/quickstart` prints the parameters' names, dtypes and shapes.

Models are block (lookup, prefix) and vanilla. Shapes: N blocks of K tokens, P prefix embeddings,
T positions, D width (E the token decoder's), H heads of size C, F MLP width, V vocabulary.
"""

import json
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath


def restore(run):
    """Configuration and newest parameters of a run, whatever devices they were saved from."""
    run = epath.Path(run).absolute()
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    folder = run / "checkpoints" / str(max(steps)) / "params"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder, here)
    return json.loads((run / "config.json").read_text()), params


def linear(p, x, equation):
    return jnp.einsum(equation, x, p["kernel"]) + p["bias"]


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def rotary(x_TxHxC, dims, base):
    """The first `dims` of each head turned by position; i is paired with i + dims/2."""
    angle = jnp.arange(len(x_TxHxC))[:, None, None] * base ** (-jnp.arange(0, dims, 2) / dims)
    a, b, rest = jnp.split(x_TxHxC, [dims // 2, dims], axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def layer(config, p, x_TxD, mask_TxT):
    """GPT-NeoX: attention and MLP side by side, each on its own norm of the input."""
    qkv = linear(p["attention"]["qkv"], norm(p["attention_norm"], x_TxD), "td,dqhc->tqhc")
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]  # [T, H, C]
    dims = int(q.shape[-1] * config["rotary_fraction"])
    q, k = (rotary(x, dims, config["rotary_base"]) for x in (q, k))
    scores_HxTxT = jnp.einsum("thc,shc->hts", q, k) / q.shape[-1] ** 0.5
    weights_HxTxT = jax.nn.softmax(jnp.where(mask_TxT, scores_HxTxT, -jnp.inf), axis=-1)
    attended_TxHxC = jnp.einsum("hts,shc->thc", weights_HxTxT, v)
    hidden_TxF = linear(p["mlp"]["up"], norm(p["mlp_norm"], x_TxD), "td,df->tf")
    mlp_TxD = linear(p["mlp"]["down"], jax.nn.gelu(hidden_TxF, approximate=False), "tf,fd->td")
    return x_TxD + linear(p["attention"]["out"], attended_TxHxC, "thc,hcd->td") + mlp_TxD


def stack(config, p, x_TxD, real_T):
    """All layers, causal; no position sees one that is not real, but for lack of any other."""
    mask_TxT = jnp.tri(len(x_TxD), dtype=bool) & real_T
    mask_TxT |= jnp.eye(len(x_TxD), dtype=bool) & ~mask_TxT.any(-1, keepdims=True)
    for i in range(config["layers"]):
        layer_i = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        x_TxD = layer(config, layer_i, x_TxD, mask_TxT)
    return norm(p["final_norm"], x_TxD)


def vanilla_logits(model, params, tokens_T, real_T):
    """Logits `[T, V]`; entry t predicts token t+1. `real_T` is False for padding."""
    x_TxD = params["embed"]["embedding"][tokens_T]
    x_TxD = stack(model["decoder"], params["decoder"]["stack"], x_TxD, real_T)
    return x_TxD @ params["classifier"]["kernel"]


def block_logits(model, params, tokens_NxK, real_NxK):
    """Logits `[N-1, K, V]`; entry (i, k) predicts token k of block i+1."""
    rows_NxKxR = params["embedder"]["tokens"]["embedding"][tokens_NxK]
    blocks_NxD, p = rows_NxKxR.reshape(len(tokens_NxK), -1), params["block_decoder"]["stack"]
    context_NxD = stack(model["block_decoder"], p, blocks_NxD, real_NxK.any(-1))
    p = params["token_decoder"]

    def decode(context_D, tokens_K, real_K):
        prefix_PxE = linear(p["expansion"], context_D, "d,dpe->pe")
        x_TxE = jnp.concatenate([prefix_PxE, p["embed"]["embedding"][tokens_K[:-1]]])
        real_T = jnp.concatenate([jnp.ones(len(prefix_PxE), bool), real_K[:-1]])
        x_TxE = stack(model["token_decoder"], p["stack"], x_TxE, real_T)
        return x_TxE[len(prefix_PxE) - 1 :] @ p["classifier"]["kernel"]  # the last prefix first

    return jax.vmap(decode)(context_NxD[:-1], tokens_NxK[1:], real_NxK[1:])


if __name__ == "__main__":
    config, params = restore(sys.argv[1])
    print(json.dumps(jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", params), indent=2))
