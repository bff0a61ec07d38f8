"""Fake quantization value by value, in NumPy's single precision."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def code(value: np.float32, scale: np.float32, zero_point: int, low: int, high: int) -> int:
    """Return the integer of one value; ties go to the even integer before the zero point."""
    steps = np.float32(value * (np.float32(1) / scale))
    return min(max(int(np.rint(steps)) + zero_point, low), high)


def per_tensor(x: Float32, scale: float, zero_point: int, low: int, high: int) -> Float32:
    s = np.float32(scale)
    flat = [np.float32(code(v, s, zero_point, low, high) - zero_point) * s for v in x.reshape(-1)]
    return np.array(flat, dtype=np.float32).reshape(x.shape)


def per_channel(w: Float32, scales: Sequence[float], axis: int, low: int, high: int) -> Float32:
    out = np.empty_like(w)
    for channel, scale in enumerate(scales):
        index = (slice(None),) * axis + (channel,)
        out[index] = per_tensor(w[index], scale, 0, low, high)
    return out
