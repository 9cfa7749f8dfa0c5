"""Tables of tensors: which of theirs is which of our parameters, used in both directions.

Shapes on our side are those of separate layers (`scan_layers` False).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from blocktx.config import ModelConfig
from blocktx.convert.tensors import DTYPES, TensorInfo, raise_all, shortened
from blocktx.model import build, init_params, stack_layers, unstack_layers

# Buffers that some versions of transformers save. They are computed, not trained.
_BUFFERS = re.compile(
    r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq"
    r"|embeddings\.(position_ids|token_type_ids))"
)
_LAYER = re.compile(r".*\blayers?[._]\d+[./]")
AUTO = "auto"  # a dtype: the narrowest that represents all values exactly


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our arrays: their tensors concatenated on the first axis, reshaped and transposed."""

    ours: str  # a path such as embed/embedding
    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of each of theirs
    split: tuple[int, ...]  # of the concatenation, with every factor on an axis of its own
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
    """Return the entry of an embedding table."""
    shape = (rows, width)
    return Entry(f"{ours}/embedding", (f"{theirs}.weight",), shape, shape, (0, 1))


def norm(ours: str, theirs: str, width: int, *, bias: bool = True) -> list[Entry]:
    """Return the entries of a LayerNorm, or without `bias` of an RMSNorm."""
    names = [("scale", "weight"), ("bias", "bias")][: 1 + bias]
    return [
        Entry(f"{ours}/{mine}", (f"{theirs}.{its}",), (width,), (width,), (0,))
        for mine, its in names
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
    """Return the entries of a projection: weight `[outputs, inputs]` and bias.

    Args:
      ours: path of our projection, whose kernel is `[inputs, outputs]`.
      theirs: name of their projection, or of several that are concatenated.
      outputs, inputs: the factors of either axis, in their order.
      out_order, in_order: the order of those factors in our kernel; None: the same.
      shape: of their weight, if it has axes of another kind (Conv1d).
      bias: whether there is one.
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


def check_tensors(
    entries: Iterable[Entry],
    found: Mapping[str, TensorInfo],
    optional: Mapping[str, tuple[int, ...]] | None = None,
    lost: Collection[str] = (),
) -> list[str]:
    """Return all differences between `found` and the tensors of `entries`.

    Args:
      entries: the table.
      found: the tensors of the checkpoint.
      optional: shapes of tensors that may be there too.
      lost: names that are known to be missing, and reported already.
    """
    expected = {name: e.shape for e in entries for name in e.theirs if name not in lost}
    shapes = {name: info.shape for name, info in found.items() if not _BUFFERS.fullmatch(name)}
    problems = differences("tensor", expected, shapes, optional or {})
    wrong = [
        f"{name}: dtype {found[name].dtype}, must be {', '.join(DTYPES)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].dtype not in DTYPES
    ]
    return problems + shortened(wrong, "tensors of another dtype")


def check_ours(entries: Iterable[Entry], config: ModelConfig) -> None:
    """Assert that `entries` are the parameters of the model; otherwise the table is wrong."""
    model = build(dataclasses.replace(config, scan_layers=True))  # traces one layer of each stack
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    views = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), params)
    shapes = {path: view.shape for path, view in _by_path(unstack_layers(views)).items()}
    problems = differences("parameter", shapes, {e.ours: e.our_shape for e in entries}, {})
    if problems:
        raise AssertionError("\n".join(["a bug in blocktx.convert:", *problems]))


def read_params(
    path: Any,
    entries: Iterable[Entry],
    read: Callable[[str], np.ndarray],
    config: ModelConfig,
    *,
    allow_nonfinite: bool,
) -> dict[str, Any]:
    """Return our nested parameters, NumPy arrays of `param_dtype`.

    Args:
      path: of the checkpoint, for errors.
      entries: the table.
      read: returns the tensor of a name.
      config: of the model.
      allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
      ValueError: weights are not finite; all tensors that have such are listed.
    """
    check_ours(entries, config)
    params: dict[str, Any] = {}
    problems = []
    for entry in entries:
        *parents, leaf = entry.ours.split("/")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        tensors = [read(name) for name in entry.theirs]
        if not allow_nonfinite:
            problems += _nonfinite(zip(entry.theirs, tensors, strict=True))
        node[leaf] = entry.to_ours(tensors).astype(config.param_dtype, copy=False)
    raise_all(path, shortened(problems, "tensors that are not finite"))
    return stack_layers(params) if config.scan_layers else params


def to_tensors(
    entries: list[Entry],
    params: Mapping[str, Any],
    *,
    stacked: bool,
    dtype: str,
    allow_nonfinite: bool = False,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return their tensors in `dtype`, and all reasons why `params` are not these `entries`."""
    if dtype not in (AUTO, *DTYPES.values()):
        return {}, [f"dtype: got {dtype!r}; use one of {', '.join((*DTYPES.values(), AUTO))}"]
    whole = jax.tree.map(np.asarray, dict(params))
    arrays = _by_path(unstack_layers(whole) if stacked else whole)
    expected = {entry.ours: entry.our_shape for entry in entries}
    shapes = {name: array.shape for name, array in arrays.items()}
    problems = differences("parameter", expected, shapes, {})
    if problems:
        return {}, problems
    dtype = _narrowest(arrays.values()) if dtype == AUTO else dtype
    tensors: dict[str, np.ndarray] = {}
    infinite = []
    for entry in entries:
        for name, array in zip(entry.theirs, entry.to_theirs(arrays[entry.ours]), strict=True):
            with np.errstate(over="ignore"):
                tensors[name] = np.ascontiguousarray(array.astype(dtype))
            lost = np.isfinite(array) & ~np.isfinite(tensors[name])
            if lost.any():
                largest = float(np.abs(array[lost]).max())
                problems.append(f"{name}: up to {largest:.4g}, too large for {dtype}")
            elif not allow_nonfinite:
                infinite += _nonfinite([(name, array)])
    return tensors, problems + shortened(infinite, "tensors that are not finite")


def _nonfinite(tensors: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    counts = {name: int((~np.isfinite(tensor)).sum()) for name, tensor in tensors}
    return [
        f"{name}: {count} values are NaN or infinite" for name, count in counts.items() if count
    ]


def _narrowest(arrays: Iterable[np.ndarray]) -> str:
    """Return the first of bfloat16, float16 and float32 that represents all values exactly."""
    wide = [array.astype(np.float32, copy=False) for array in arrays]
    for dtype in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            if all(
                np.array_equal(array.astype(dtype).astype(np.float32), array, equal_nan=True)
                for array in wide
            ):
                return dtype
    return "float32"


def _by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def differences(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Return a line for everything that is missing, extra or of another shape.

    A layer that is missing as a whole is one line. Of a long list, ten lines and the count.
    """
    allowed = {**optional, **expected}
    layers: dict[str, list[str]] = {}  # the layers of which nothing is found
    for name in expected:
        if match := _LAYER.match(name):
            layers.setdefault(match[0], []).append(name)
    for name in found:
        if match := _LAYER.match(name):
            layers.pop(match[0], None)
    absent = {name for names in layers.values() for name in names}
    lines: dict[str, list[str]] = {"missing layers": [], "missing": [], "extra": [], "shapes": []}
    for layer, names in layers.items():
        lines["missing layers"].append(
            f"missing layer {layer.rstrip('./')}, all {len(names)} {what}s of it"
        )
    for name in sorted(expected.keys() | found.keys()):
        if name in absent:
            continue
        if name not in found:
            lines["missing"].append(f"missing {what} {name} {expected[name]}")
        elif name not in allowed:
            lines["extra"].append(f"extra {what} {name} {found[name]}")
        elif found[name] != allowed[name]:
            lines["shapes"].append(f"{name}: shape {found[name]}, expected {allowed[name]}")
    kinds = {
        "missing layers": "missing layers",
        "missing": f"missing {what}s",
        "extra": f"extra {what}s",
        "shapes": f"{what}s of another shape",
    }
    return [line for kind, name in kinds.items() for line in shortened(lines[kind], name)]
