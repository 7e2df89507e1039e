"""Hessians of correlated inputs, for tests of GPTQ."""

import numpy as np
import torch


def correlated(columns, parts=1, seed=0, rank=None):
    """Hessians of inputs whose channels are correlated and of very different sizes: (parts, columns, columns)."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(parts):
        mix = rng.normal(size=(rank or 4 * columns, columns)) * np.exp(rng.normal(size=columns))
        x = mix @ (np.eye(columns) + 0.3 * rng.normal(size=(columns, columns)))
        result.append(x.T @ x / len(x))
    return torch.tensor(np.stack(result), dtype=torch.float32)


def matrix(rows, columns, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_t(5, size=(rows, columns)), dtype=torch.float32)


LAYOUTS = {
    "channel": {},
    "tensor": {"granularity": "tensor", "choice": "tensor"},
    "group": {"granularity": "group", "group_size": 8, "choice": "group"},
    "uneven group": {"granularity": "group", "group_size": 10, "choice": "group"},
    "group, choice a channel": {"granularity": "group", "group_size": 8, "choice": "channel"},
    "channel, choice a tensor": {"choice": "tensor"},
}
