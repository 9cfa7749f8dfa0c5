"""Digests of arrays, JSON values and files, which detect changes in storage.

The digest of an array is a 64-bit sum of hashes of its elements and their indices, modulo 2^32 in
each half. It does not depend on sharding, and devices compute it in one pass without communication
but for the sum. Every change of a single element changes it.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

_ON_HOST = 64 << 20  # bytes up to which a CPU hashes with NumPy: compilation would take longer
_CHUNK = 1 << 20  # elements


def path_name(path: Any) -> str:
    """Return the name of an array in a tree, such as `embedder/tokens/embedding`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def measure(tree: Any) -> tuple[dict[str, str], list[str]]:
    """Return the digest of every array by name, and the names of arrays with NaN or infinity.

    Args:
      tree: NumPy or JAX arrays. With several processes all of them call this.
    """
    named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    arrays = [x if isinstance(x, jax.Array) else np.asarray(x) for x in named.values()]
    if _measured_on_host(arrays):
        rows = [_host_row(np.asarray(x)) for x in arrays]
    else:
        rows = np.asarray(_device_rows(arrays)).tolist()
    digests = {
        name: f"{x.dtype}{list(x.shape)}:{a:08x}{b:08x}"
        for name, x, (a, b, _) in zip(named, arrays, rows, strict=True)
    }
    return digests, [name for name, row in zip(named, rows, strict=True) if row[2]]


def _measured_on_host(arrays: list[Any]) -> bool:
    if all(isinstance(x, np.ndarray) for x in arrays):
        return True
    on_cpu = jax.default_backend() == "cpu"
    here = all(isinstance(x, np.ndarray) or x.is_fully_addressable for x in arrays)
    return on_cpu and here and sum(x.nbytes for x in arrays) <= _ON_HOST


def _host_row(x: np.ndarray) -> tuple[int, int, int]:
    flat_T, sums = np.ascontiguousarray(x).reshape(-1), [0, 0, 0]
    words = max(x.dtype.itemsize // 4, 1)
    for start in range(0, flat_T.size, _CHUNK):
        chunk_T = flat_T[start : start + _CHUNK]
        bits_T = chunk_T.view(f"u{min(x.dtype.itemsize, 4)}").astype(np.uint32)
        index_T = np.arange(start * words, start * words + bits_T.size).astype(np.uint32)
        for lane, hashes_T in enumerate(_hashes(bits_T, index_T)):
            sums[lane] += int(hashes_T.sum(dtype=np.uint64))
        if _is_float(x.dtype):
            sums[2] += int((~np.isfinite(chunk_T)).sum())
    return sums[0] % 2**32, sums[1] % 2**32, sums[2] % 2**32


@jax.jit
def _device_rows(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_device_row(jnp.asarray(x)) for x in arrays])


def _device_row(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"u{min(x.dtype.itemsize, 4)}"))
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride)
    wrong = ~jnp.isfinite(x) if _is_float(x.dtype) else jnp.zeros(x.shape, jnp.bool)
    if wrong.ndim < bits.ndim:  # a wide dtype: two words an element
        wrong = jnp.stack([wrong, jnp.zeros_like(wrong)], axis=-1)
    # One reduction of three operands: on a CPU it takes a twelfth of the time of three.
    operands = [*_hashes(bits.astype(jnp.uint32), index), wrong.astype(jnp.uint32)]
    zeros = [np.uint32(0)] * len(operands)
    return jnp.stack(jax.lax.reduce(operands, zeros, _add, range(bits.ndim)))


def _add(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _hashes(bits: Any, index: Any) -> Iterator[Any]:
    """Yield two hashes of uint32 elements. For a given index each is a bijection of the bits."""
    yield _mix(bits ^ _mix(index))
    yield _mix(bits + index * np.uint32(0x9E3779B9) + np.uint32(0x7F4A7C15))


def _mix(x: Any) -> Any:
    """Return the finalizer of MurmurHash3 of uint32 elements."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever its whitespace and the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _text_digest(text: str) -> str:
    try:
        return json_digest(json.loads(text))
    except (ValueError, RecursionError):
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def file_digest(path: epath.PathLike) -> str | None:
    """Return the digest of the JSON value in a file, or None if there is no such file."""
    path = epath.Path(path)
    if not path.exists():
        return None
    return _text_digest(path.read_bytes().decode(errors="surrogateescape"))
