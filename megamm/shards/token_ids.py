"""Token ids as the bytes of a token cache: `.npy` arrays `[T]`, uint16 where the codec's ids fit, else uint32."""

import io
import re

import numpy as np

from megamm.common.sample import IntArray

_PLAIN = re.compile(
    rb"\x93NUMPY\x01\x00\x76\x00\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n"
)
"""The header that numpy writes for such an array; numpy's general parser takes ten times as long as all the rest."""


def tokens_to_bytes(ids: IntArray, vocabulary_size: int) -> bytes:
    """Token ids `[T]` in [0, vocabulary_size) as `.npy` bytes, uint16 if they fit, else uint32."""
    assert ids.ndim == 1 and (ids.size == 0 or 0 <= ids.min() <= ids.max() < vocabulary_size), "token id out of range"
    file = io.BytesIO()
    np.save(file, ids.astype(np.uint16 if vocabulary_size <= 2**16 else np.uint32), allow_pickle=False)
    return file.getvalue()


def tokens_from_bytes(data: bytes) -> IntArray:
    """The inverse of tokens_to_bytes: int64 `[T]`. Raises ValueError if the bytes are not such an array."""
    plain = _PLAIN.match(data)
    if plain and len(data) == plain.end() + int(plain[1]) * int(plain[2]):
        return np.frombuffer(data, f"<u{int(plain[1])}", offset=plain.end()).astype(np.int64)
    ids = np.load(io.BytesIO(data), allow_pickle=False)
    if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"not token ids: {ids.dtype} {list(ids.shape)}")
    return ids.astype(np.int64)
