"""OBQ's step written out: invert the moments of the columns left, spread the error over them."""

from __future__ import annotations

import numpy as np


def compensate(w, moment, scale, high, damping=0.01):
    """Round one channel ``w`` (d,) in falling order of the moment's diagonal."""
    moment = moment + damping * np.mean(np.diag(moment)) * np.eye(len(w))
    w, rounded = w.astype(np.float64).copy(), np.zeros(len(w))
    left = list(np.argsort(-np.diag(moment), kind="stable"))
    while left:
        inverse = np.linalg.inv(moment[np.ix_(left, left)])
        j = left[0]
        rounded[j] = np.clip(np.round(w[j] / scale), -high, high) * scale
        w[left] -= (w[j] - rounded[j]) / inverse[0, 0] * inverse[:, 0]
        left = left[1:]
    return rounded
