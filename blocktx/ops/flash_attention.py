"""Causal attention over long sequences on TPU: JAX's splash attention, which keeps no scores."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

_TILE = 128  # of queries and keys; sequences of whole tiles can be had


def is_long(x_TxD: jax.Array) -> bool:
    """Whether `flash_attention` can do it."""
    return x_TxD.shape[0] % _TILE == 0


def flash_attention(
    q_TxHxC: jax.Array,
    k_TxHxC: jax.Array,
    v_TxHxC: jax.Array,
    real_T: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Outputs `[T, H, C]` of causal attention over one sequence; lift by `vmap`.

    Args:
      q_TxHxC, k_TxHxC, v_TxHxC: after rotary positions.
      real_T: bool, False for keys that are padding. A query that sees no key has no meaning.
      interpret: run without a TPU, slowly: for tests.
    """

    def attend(q_HxTxC, k_HxTxC, v_HxTxC, real_T):
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
        return kernel(q_HxTxC * size**-0.5, k_HxTxC, v_HxTxC, segment_ids=segments)

    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.are_all_axes_manual):  # XLA cannot divide a kernel
        heads = PartitionSpec("tensor")
        attend = jax.shard_map(
            attend,
            in_specs=(heads, heads, heads, PartitionSpec()),
            out_specs=heads,
            check_vma=False,
        )
    q_k_v = (x.swapaxes(0, 1) for x in (q_TxHxC, k_TxHxC, v_TxHxC))
    return attend(*q_k_v, real_T).swapaxes(0, 1)


def _block_sizes(length: int) -> splash_attention.BlockSizes:
    size = next(tile for tile in (512, 256, _TILE) if length % tile == 0)
    return splash_attention.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        use_fused_bwd_kernel=True,
    )
