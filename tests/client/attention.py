"""Attention written naively in double precision, and random rows for it."""

import numpy


def rows(rng, tokens, heads, dim, dtype=numpy.float32):
    """Normally distributed [tokens, heads, dim]."""
    return rng.standard_normal((tokens, heads, dim)).astype(dtype)


def attend(query, key, value, start_pos, scale=None, window=None):
    """(output, lse) of causal attention: query [tokens, heads, dim] at start_pos and up, over key
    and value [tokens, kv_heads, ...]; `window` keeps the last tokens only."""
    query, key, value = (array.astype(numpy.float64) for array in (query, key, value))
    tokens, heads, dim = query.shape
    group = heads // key.shape[1]
    output = numpy.empty((tokens, heads, value.shape[2]))
    lse = numpy.empty((tokens, heads))
    for row in range(tokens):
        end = start_pos + row + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(heads):
            scores = key[begin:end, head // group] @ query[row, head] * (scale or dim**-0.5)
            peak = scores.max()
            weights = numpy.exp(scores - peak)
            output[row, head] = weights @ value[begin:end, head // group] / weights.sum()
            lse[row, head] = peak + numpy.log(weights.sum())
    return output, lse


def error(actual, expected):
    """Relative to the expected norm; NaN never passes a comparison."""
    difference = numpy.asarray(actual, dtype=numpy.float64) - expected
    return numpy.linalg.norm(difference) / numpy.linalg.norm(expected)
