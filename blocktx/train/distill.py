"""Losses of distillation: a block model (student) against a frozen vanilla model (teacher).

Alignment. The teacher reads the rows of the student's batch as they are, N * K tokens with padding
masked. The student's logits of a token are compared with the teacher's logits at the last real
token before it. Inside a document that is the position before the token; for the first token of a
document it is the end of the document before, because padding stands between them. Both have then
seen the same real tokens. Context embedding i is compared with the teacher's hidden state at the
last real token of blocks 0..i, for all blocks i before a block with a scored token.

The target of a context embedding is the hidden state after `hidden_layer` layers, normalized by the
block decoder's kind of norm with unit scale and zero bias. The final norm of a block decoder that
starts from the teacher's layers (`blocktx.convert.uptrain`) has these weights. Its loss is then 0
for blocks of one token.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from blocktx.config import BlockConfig, DistillConfig, ModelConfig, StackConfig, StageConfig
from blocktx.model import BlockTransformer, Vanilla, classifier_kernel, loss_mask
from blocktx.parallel import batch_parts, constrain

_TOKENS = 4096  # per device whose logits exist at the same time


@flax.struct.dataclass
class Teacher:
    """A frozen vanilla model."""

    params: dict[str, Any]
    model: Vanilla = flax.struct.field(pytree_node=False)


def distillation_weights(config: DistillConfig, stage: int) -> dict[str, float]:
    """Return the weights of a stage's losses by name, without those of weight 0."""
    settings = config.stages[stage]
    weights = {
        "loss": settings.cross_entropy_weight,
        # Gradients of softened distributions shrink with the square of the temperature.
        "kl_loss": settings.kl_weight * config.temperature**2,
        "hidden_loss": settings.hidden_weight,
    }
    return {name: weight for name, weight in weights.items() if weight > 0}


def uses_teacher(stage: StageConfig) -> bool:
    """Return whether a stage compares with the teacher at all."""
    return stage.kl_weight > 0 or stage.hidden_weight > 0


def hidden_layer(config: DistillConfig, student: BlockConfig) -> int:
    """Return the number of teacher layers after which hidden states are compared."""
    return config.hidden_layer or student.block_decoder.layers


def distillation_sums(
    model: BlockTransformer,
    params: dict[str, Any],
    teacher: Teacher | None,
    part: dict[str, jax.Array],
    config: DistillConfig,
    stage: int,
) -> dict[str, jax.Array]:
    """Return the sums of a stage's losses by name, in float32.

    loss: cross-entropy of the scored tokens in nats; always computed, for the metrics.
    kl_loss: KL(teacher || student) of the same tokens in nats, both at `config.temperature`. From
      cached top-k probabilities it is the divergence between the k tokens and all others as one, a
      lower bound that is exact for k = V.
    hidden_loss: over blocks, the mean square of the difference between context embedding and
      target. See the module's docstring.

    Logits exist for a slice of the tokens at a time and are recomputed for the gradient. No
    gradient flows into the teacher.

    Args:
      model: the student.
      params: its parameters.
      teacher: the teacher; None if `part` holds its cached probabilities, or the stage has no use
        for it.
      part: `tokens` int32 and `mask` bool `[B, N, K]`; from a cache also `teacher_tokens` int32 and
        `teacher_log_probs` float `[B, N-1, K, k]`.
      config: the run's.
      stage: the index of the stage.
    """
    teacher = jax.lax.stop_gradient(teacher)
    tokens_BxNxK, mask_BxNxK = part["tokens"], part["mask"].astype(bool)
    weights = distillation_weights(config, stage)
    # A last block that predicts nothing keeps slices and tiles whole.
    next_BxNxK, real_BxNxK = (jnp.roll(x, -1, axis=1) for x in (tokens_BxNxK, mask_BxNxK))
    scored_BxNxK = jnp.pad(loss_mask(mask_BxNxK), ((0, 0), (0, 1), (0, 0)))

    def student(net: BlockTransformer) -> tuple[jax.Array, jax.Array]:
        contexts_BxNxnD = net.contexts(tokens_BxNxK, mask_BxNxK)
        return contexts_BxNxnD, net.hidden_blocks(contexts_BxNxnD, next_BxNxK, real_BxNxK)

    contexts_BxNxD, hidden_BxNxKxE = model.apply({"params": params}, method=student)
    sums, reference = {}, {}
    if teacher is not None and uses_teacher(config.stages[stage]):
        layer = hidden_layer(config, model.config) if "hidden_loss" in weights else None
        before_BxNxKxD, target_BxNxD = _run_teacher(
            teacher, tokens_BxNxK, mask_BxNxK, layer, model.config.block_decoder
        )
        if target_BxNxD is not None:
            square_BxN = jnp.square(contexts_BxNxD.astype(jnp.float32) - target_BxNxD).mean(-1)
            sums["hidden_loss"] = jnp.where(scored_BxNxK.any(-1), square_BxN, 0).sum()
        if "kl_loss" in weights:
            reference["hidden"] = before_BxNxKxD
    if teacher is None and "kl_loss" in weights:
        for name in ("teacher_tokens", "teacher_log_probs"):
            reference[name] = jnp.pad(part[name], ((0, 0), (0, 1), (0, 0), (0, 0)))
    slices = {"x": hidden_BxNxKxE, "labels": next_BxNxK, "scored": scored_BxNxK} | reference
    kernel = _classifier(model.config, params)
    teacher_kernel = _classifier(teacher.model.config, teacher.params) if teacher else None

    def token_sums(part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return _token_sums(part, kernel, teacher_kernel, model, config.temperature)

    return sums | _over_slices(token_sums, slices)


def distillation_counts(mask_BxNxK: jax.Array, weights: dict[str, float]) -> dict[str, jax.Array]:
    """Return the numbers of tokens or blocks that `distillation_sums` are over; at least 1."""
    scored_BxMxK = loss_mask(mask_BxNxK.astype(bool))
    tokens = scored_BxMxK.sum(dtype=jnp.float32)
    blocks = scored_BxMxK.any(-1).sum(dtype=jnp.float32)
    counts = {"loss": tokens, "kl_loss": tokens, "hidden_loss": blocks}
    return {n: jnp.maximum(x, 1) for n, x in counts.items() if n == "loss" or n in weights}


def top_log_probs(
    teacher: Teacher, tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array, k: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Return the k most probable next tokens of the teacher and their log-probabilities.

    Returns:
      int32 and float32 `[B, N-1, K, k]`, for the tokens of blocks 1 to N-1.
    """
    hidden_BxNxKxD, _ = _run_teacher(teacher, tokens_BxNxK, mask_BxNxK.astype(bool), None, None)
    kernel = _classifier(teacher.model.config, teacher.params)

    def best(part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = _logits(part["hidden"], kernel, teacher.model.config) / temperature
        return jax.lax.top_k(jax.nn.log_softmax(logits), k)

    found = _map_slices(best, {"hidden": hidden_BxNxKxD})
    log_probs, tokens = (x[:, :-1] for x in found)
    return tokens, log_probs


def _run_teacher(
    teacher: Teacher,
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    layer: int | None,
    student: StackConfig | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the teacher's final hidden states for the student's tokens, and targets.

    Entry (j, k) of the first, `[B, N, K, D]`, is at the last real token before token k of block
    j + 1. The last block has none after it, and its entries mean nothing. The targets `[B, N, D]`
    are normalized.
    """
    batch, blocks, length = tokens_BxNxK.shape
    mask_BxT = mask_BxNxK.reshape(batch, -1)
    hidden_BxTxD, layer_BxTxD = teacher.model.apply(
        {"params": teacher.params},
        tokens_BxNxK.reshape(batch, -1),
        mask_BxT,
        layer,
        method="hidden_and_layer",
    )
    places_T = jnp.arange(mask_BxT.shape[1])
    last_BxT = jax.lax.cummax(jnp.where(mask_BxT, places_T, 0), axis=1)  # real token at or before
    before_BxT = jnp.take(last_BxT, places_T + length - 1, axis=1, mode="clip")
    hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, before_BxT[..., None], axis=1)
    hidden_BxNxKxD = hidden_BxTxD.reshape(batch, blocks, length, -1)
    if layer_BxTxD is None:
        return hidden_BxNxKxD, None
    end_BxN = last_BxT[:, length - 1 :: length]
    target_BxNxD = jnp.take_along_axis(layer_BxTxD, end_BxN[..., None], axis=1)
    return hidden_BxNxKxD, _unit_norm(target_BxNxD, student)


def _unit_norm(x: jax.Array, stack: StackConfig) -> jax.Array:
    """Return `x` by the norm of a stack with unit scale and zero bias, in float32."""
    x = x.astype(jnp.float32)
    if stack.norm == "layer":
        x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + stack.norm_epsilon)


def _classifier(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """Return the classifier `[E, V]`, gathered over the mesh's fsdp axis."""
    return constrain(classifier_kernel(config, params), "features", "vocab")


def _logits(x: jax.Array, kernel: jax.Array, config: ModelConfig) -> jax.Array:
    dtype = config.compute_dtype
    logits = jnp.einsum(
        "bnke,ev->bnkv", x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32
    )
    return constrain(logits, "batch", "positions", "positions", "vocab")


def _token_sums(
    part: dict[str, jax.Array],
    kernel_ExV: jax.Array,
    teacher_kernel_DxV: jax.Array | None,
    model: BlockTransformer,
    temperature: float,
) -> dict[str, jax.Array]:
    """Return the sums of the losses of some tokens."""
    logits = _logits(part["x"], kernel_ExV, model.config)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, part["labels"])
    sums = {"loss": nats}
    if "hidden" in part:
        theirs = _logits(part["hidden"], teacher_kernel_DxV, model.config) / temperature
        log_p, log_q = jax.nn.log_softmax(theirs), jax.nn.log_softmax(logits / temperature)
        sums["kl_loss"] = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    elif "teacher_tokens" in part:
        sums["kl_loss"] = _top_divergence(
            logits / temperature, part["teacher_tokens"], part["teacher_log_probs"]
        )
    return {name: jnp.where(part["scored"], x, 0).sum() for name, x in sums.items()}


def _top_divergence(logits: jax.Array, tokens: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Return the KL divergence between k tokens and all others together as one."""
    log_p = log_probs.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(logits, tokens, axis=-1) - normalizer
    inside = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    if tokens.shape[-1] == logits.shape[-1]:
        return inside
    is_top = jnp.put_along_axis(jnp.zeros(logits.shape, bool), tokens, True, -1, inplace=False)
    others = jax.nn.logsumexp(jnp.where(is_top, -jnp.inf, logits), axis=-1)
    rest = jnp.maximum(1 - jnp.exp(log_p).sum(-1), 0)  # rounding of the cache may pass 1
    outside = jax.scipy.special.xlogy(rest, rest) - rest * (others - normalizer[..., 0])
    return inside + outside


def _over_slices(function: Any, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the sum of `function` over slices of `[B, N, ...]` arrays along N."""
    count = _slice_count(*arrays["x"].shape[:3])
    if count == 1:
        return function(arrays)

    def add(total: dict[str, jax.Array], part: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(function)(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[:, :1], arrays))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, _cut(arrays, count))[0]


def _map_slices(function: Any, arrays: dict[str, jax.Array]) -> Any:
    """Return `function` of `[B, N, ...]` arrays, computed for a slice along N at a time."""
    count = _slice_count(*arrays["hidden"].shape[:3])
    found = jax.lax.map(function, _cut(arrays, count))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), found)


def _cut(arrays: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], count, -1, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _slice_count(rows: int, blocks: int, length: int) -> int:
    """Return the least divisor of `blocks` that makes slices of at most `_TOKENS` per device."""
    mesh = jax.sharding.get_abstract_mesh()
    rows_here = rows if mesh.empty else max(rows // batch_parts(mesh), 1)
    most = max(_TOKENS // (rows_here * length), 1)
    return next(n for n in range(1, blocks + 1) if blocks % n == 0 and blocks // n <= most)
