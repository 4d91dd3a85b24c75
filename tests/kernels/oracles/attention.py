"""What the oracles share: softmax attention and pooling, written the plainest way."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def attend(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, tokens: list[int], scale: float
) -> np.ndarray:
    """softmax(scale K q) V over the tokens named, of one head; zero without tokens."""
    if not len(tokens):
        return np.zeros(values.shape[1])
    logits = scale * (keys[tokens].astype(np.float64) @ query.astype(np.float64))
    return softmax(logits) @ values[tokens].astype(np.float64)


def mean_rows(rows: np.ndarray) -> np.ndarray:
    """Mean in single precision, first row first, as the service keeps summaries."""
    total = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total / np.float32(len(rows))


def top(scores: dict[int, float], count: int) -> list[int]:
    """Keys of the highest scores, compared in single precision; among equals the lower key."""
    return sorted(scores, key=lambda key: (-np.float32(scores[key]), key))[:count]


def tokens_of_blocks(blocks: list[int], block_tokens: int, position: int) -> list[int]:
    tokens = [t for b in sorted(blocks) for t in range(b * block_tokens, (b + 1) * block_tokens)]
    return [t for t in tokens if t <= position]
