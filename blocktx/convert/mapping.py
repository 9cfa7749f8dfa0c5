"""Which of their tensors is which of our parameters: one table, used in both directions.

Shapes on our side are those of layers kept apart (`scan_layers` False).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from blocktx.config import EncoderConfig, ModelConfig, StackConfig
from blocktx.convert.tensors import DTYPES, TensorInfo
from blocktx.model import build, init_params, stack_layers, unstack_layers

# Buffers that some versions of transformers save. They are computed, not trained.
_BUFFERS = re.compile(
    r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq"
    r"|embeddings\.(position_ids|token_type_ids))"
)


_LAYER = re.compile(r".*\blayers?[._]\d+[./]")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our arrays: their tensors, joined on the first axis, taken apart and reordered."""

    ours: str  # a path such as embed/embedding
    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of each of theirs
    split: tuple[int, ...]  # all of theirs together, with every factor on an axis of its own
    axes: tuple[int, ...]  # the order of those axes in ours

    @property
    def our_shape(self) -> tuple[int, ...]:
        return tuple(self.split[axis] for axis in self.axes)

    def to_ours(self, theirs: list[np.ndarray]) -> np.ndarray:
        split = np.concatenate(theirs).reshape(self.split)
        return np.ascontiguousarray(split.transpose(self.axes))

    def to_theirs(self, ours: np.ndarray) -> list[np.ndarray]:
        split = ours.transpose(np.argsort(self.axes))
        return np.split(split.reshape(-1, *self.shape[1:]), len(self.theirs))


def table(ours: str, theirs: str, rows: int, width: int) -> Entry:
    shape = (rows, width)
    return Entry(f"{ours}/embedding", (f"{theirs}.weight",), shape, shape, (0, 1))


def norm(ours: str, theirs: str, width: int) -> list[Entry]:
    return [
        Entry(f"{ours}/{mine}", (f"{theirs}.{its}",), (width,), (width,), (0,))
        for mine, its in (("scale", "weight"), ("bias", "bias"))
    ]


def linear(
    ours: str,
    theirs: str | tuple[str, ...],
    outputs: tuple[int, ...],
    inputs: tuple[int, ...],
    *,
    out_order: tuple[int, ...] | None = None,
    in_order: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
    bias: bool = True,
) -> list[Entry]:
    """Their weight `[outputs, inputs]` and bias -> our kernel `[inputs, outputs]` and bias.

    `outputs` and `inputs` are factored as theirs are ordered; the orders say which factor stands
    where in ours. `shape` is that of their weight where it has axes of another kind (Conv1d).
    """
    names = (theirs,) if isinstance(theirs, str) else theirs
    out_axes = out_order or tuple(range(len(outputs)))
    in_axes = tuple(len(outputs) + axis for axis in in_order or range(len(inputs)))
    shape = shape or (math.prod(outputs) // len(names), math.prod(inputs))
    weights = tuple(f"{name}.weight" for name in names)
    entries = [Entry(f"{ours}/kernel", weights, shape, (*outputs, *inputs), (*in_axes, *out_axes))]
    if bias:
        biases = tuple(f"{name}.bias" for name in names)
        entries.append(Entry(f"{ours}/bias", biases, shape[:1], outputs, out_axes))
    return entries


def neox_stack(ours: str, theirs: str, stack: StackConfig) -> list[Entry]:
    """Layers and final norm; their queries, keys and values are fused head by head."""
    width, heads, size, hidden = stack.width, stack.heads, stack.head_size, stack.mlp_size
    entries = norm(f"{ours}/final_norm", f"{theirs}.final_layer_norm", width)
    for i in range(stack.layers):
        o, t = f"{ours}/layers_{i}", f"{theirs}.layers.{i}"
        qkv = f"{t}.attention.query_key_value"
        entries += [
            *linear(f"{o}/attention/qkv", qkv, (heads, 3, size), (width,), out_order=(1, 0, 2)),
            *linear(f"{o}/attention/out", f"{t}.attention.dense", (width,), (heads, size)),
            *norm(f"{o}/attention_norm", f"{t}.input_layernorm", width),
            *norm(f"{o}/mlp_norm", f"{t}.post_attention_layernorm", width),
            *linear(f"{o}/mlp/up", f"{t}.mlp.dense_h_to_4h", (hidden,), (width,)),
            *linear(f"{o}/mlp/down", f"{t}.mlp.dense_4h_to_h", (width,), (hidden,)),
        ]
    return entries


def roberta(ours: str, theirs: str, encoder: EncoderConfig, vocab: int, rows: int) -> list[Entry]:
    """The encoder, with `rows` positions; queries, keys and values are separate tensors."""
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


def check_tensors(
    entries: Iterable[Entry],
    found: Mapping[str, TensorInfo],
    optional: Mapping[str, tuple[int, ...]] | None = None,
    lost: Collection[str] = (),
) -> list[str]:
    """Everything that keeps `found` from being the tensors of `entries` and any of `optional`.

    Of those that are `lost`, it is known already that they are missing.
    """
    expected = {name: e.shape for e in entries for name in e.theirs if name not in lost}
    shapes = {name: info.shape for name, info in found.items() if not _BUFFERS.fullmatch(name)}
    problems = _differences("tensor", expected, shapes, optional or {})
    for name in sorted(expected.keys() & found.keys()):
        if found[name].dtype not in DTYPES:
            problems.append(f"{name}: dtype {found[name].dtype}, must be {', '.join(DTYPES)}")
    return problems


def check_names(
    entries: Iterable[Entry],
    found: Mapping[str, TensorInfo],
    optional: Collection[str] = (),
    lost: Collection[str] = (),
) -> list[str]:
    """The same where the shapes of `entries` mean nothing, because sizes cannot be told."""
    entries = [dataclasses.replace(entry, shape=()) for entry in entries]
    infos = {name: dataclasses.replace(info, shape=()) for name, info in found.items()}
    problems = check_tensors(entries, infos, dict.fromkeys(optional, ()), lost)
    return [problem.removesuffix(" ()") for problem in problems]


def check_ours(entries: Iterable[Entry], config: ModelConfig) -> None:
    """Asserts that `entries` are the parameters of the model (else this table is wrong)."""
    model = build(dataclasses.replace(config, scan_layers=False))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shapes = {path: leaf.shape for path, leaf in _by_path(params).items()}
    problems = _differences("parameter", shapes, {e.ours: e.our_shape for e in entries}, {})
    if problems:
        raise AssertionError("\n".join(["a bug in blocktx.convert:", *problems]))


def to_params(
    entries: Iterable[Entry], read: Callable[[str], np.ndarray], *, stacked: bool, dtype: str
) -> dict[str, Any]:
    """Our nested parameters, numpy arrays of `dtype`; `read` gives the tensor of a name."""
    params: dict[str, Any] = {}
    for entry in entries:
        *parents, leaf = entry.ours.split("/")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = entry.to_ours([read(name) for name in entry.theirs]).astype(dtype, copy=False)
    return jax.tree.map(np.asarray, stack_layers(params)) if stacked else params


def to_tensors(
    entries: list[Entry], params: Mapping[str, Any], *, stacked: bool, dtype: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Their tensors, in `dtype`, and everything that keeps `params` from being these `entries`."""
    if dtype not in DTYPES.values():
        return {}, [f"dtype: got {dtype!r}; use one of {', '.join(DTYPES.values())}"]
    whole = jax.tree.map(np.asarray, dict(params))
    arrays = _by_path(unstack_layers(whole) if stacked else whole)
    expected = {entry.ours: entry.our_shape for entry in entries}
    shapes = {name: array.shape for name, array in arrays.items()}
    problems = _differences("parameter", expected, shapes, {})
    if problems:
        return {}, problems
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        for name, array in zip(entry.theirs, entry.to_theirs(arrays[entry.ours]), strict=True):
            with np.errstate(over="ignore"):
                tensors[name] = np.ascontiguousarray(array.astype(dtype))
            lost = np.isfinite(array) & ~np.isfinite(tensors[name])
            if lost.any():
                largest = float(np.abs(array[lost]).max())
                problems.append(f"{name}: up to {largest:.4g}, too large for {dtype}")
    return tensors, problems


def _by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _differences(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
) -> list[str]:
    problems = []
    allowed = {**optional, **expected}
    layers: dict[str, list[str]] = {}  # of which nothing is there
    for name in expected:
        if match := _LAYER.match(name):
            layers.setdefault(match[0], []).append(name)
    for name in found:
        if match := _LAYER.match(name):
            layers.pop(match[0], None)
    absent = {name: layer for layer, names in layers.items() for name in names}
    for name in sorted(expected.keys() | found.keys()):
        if name in absent:
            names = layers.pop(absent[name], [])
            if names:
                layer = absent[name].rstrip("./")
                problems.append(f"missing layer {layer}, all {len(names)} {what}s of it")
        elif name not in found:
            problems.append(f"missing {what} {name} {expected[name]}")
        elif name not in allowed:
            problems.append(f"extra {what} {name} {found[name]}")
        elif found[name] != allowed[name]:
            problems.append(f"{name}: shape {found[name]}, expected {allowed[name]}")
    return problems
