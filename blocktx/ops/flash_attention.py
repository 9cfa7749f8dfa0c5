"""Causal attention over long sequences on TPU: JAX's splash attention, which stores no scores."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from blocktx.ops.attention_kernels import SPLASH_TILE


def flash_attention(
    q_TxHxC: jax.Array,
    k_TxGxC: jax.Array,
    v_TxGxC: jax.Array,
    real_T: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Return causal attention `[T, H, C]` over one sequence; batch it with `vmap`.

    Sequences are padded to whole tiles. No query attends to that padding, which comes last.

    Args:
      q_TxHxC: queries, after rotary positions.
      k_TxGxC, v_TxGxC: keys, after rotary positions, and values. Each head serves H / G queries.
      real_T: bool, False for keys that are padding. The output of a query that attends to no key
        has no meaning.
      interpret: run without a TPU, slowly.
    """

    def attend(q_HxTxC, k_GxTxC, v_GxTxC, real_T):
        heads, length, size = q_HxTxC.shape
        mask = splash_attention.CausalMask((length, length))
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(length),
            interpret=interpret,
        )
        segments = splash_attention.SegmentIds(
            q=jnp.ones(length, jnp.int32), kv=real_T.astype(jnp.int32)
        )
        return kernel(q_HxTxC * size**-0.5, k_GxTxC, v_GxTxC, segment_ids=segments)

    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.are_all_axes_manual):  # XLA cannot divide a kernel
        heads = PartitionSpec("tensor")
        attend = jax.shard_map(
            attend,
            in_specs=(heads, heads, heads, PartitionSpec()),
            out_specs=heads,
            check_vma=False,
        )
    length = len(real_T)
    missing = -length % SPLASH_TILE
    q_k_v = (x.swapaxes(0, 1) for x in (q_TxHxC, k_TxGxC, v_TxGxC))
    if missing:
        q_k_v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in q_k_v)
        real_T = jnp.pad(real_T, (0, missing), constant_values=True)
    return attend(*q_k_v, real_T)[:, :length].swapaxes(0, 1)


def _block_sizes(length: int) -> splash_attention.BlockSizes:
    size = next(tile for tile in (512, 256, SPLASH_TILE) if length % tile == 0)
    return splash_attention.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        use_fused_bwd_kernel=True,
    )
