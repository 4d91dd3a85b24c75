"""A method that the code never heard of: written as a text file, served, and equal to its formula."""

import os
import pathlib
import sys

import longspan
import numpy
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
from server import Server  # noqa: E402

BLOCK, SINKS, WINDOW = 32, 10, 100
BUDGET = {"prefill": 3, "decode": 2}
QUERY_HEADS, KV_HEADS, DIM, TOKENS = 6, 2, 64, 1500

# Blocks of half a page, other sinks and another window than any shipped file, another budget for each phase.
METHOD = f"""
name: "never_heard_of"
description: "Written by a test"
branches {{
  name: "only"
  summary {{ kind: KIND_MEAN block_tokens: {BLOCK} }}
  search {{ head_reduce: HEAD_REDUCE_GROUP_MAX }}
  selection {{ kind: KIND_TOP_K block_tokens: {BLOCK} }}
  mask {{ window_tokens: {WINDOW} sink_tokens: {SINKS} }}
  budget {{ prefill {{ blocks: {BUDGET["prefill"]} }} decode {{ blocks: {BUDGET["decode"]} }} }}
}}
"""


def formula(query, key, value, positions, num_blocks):
    """The method as it reads, in double precision. query [rows, heads, dim] -> output, tokens read."""
    query, key, value = (array.astype(numpy.float64) for array in (query, key, value))
    group = QUERY_HEADS // KV_HEADS
    output = numpy.full((len(positions), QUERY_HEADS, DIM), numpy.nan)
    tokens_read = numpy.zeros((len(positions), QUERY_HEADS), int)
    for row, position in enumerate(positions):
        own = position // BLOCK
        for kv_head in range(KV_HEADS):
            heads = range(kv_head * group, (kv_head + 1) * group)
            means = key[: own * BLOCK, kv_head].reshape(own, BLOCK, DIM).mean(axis=1)
            scores = (query[row, heads] @ means.T).max(axis=0)
            best = sorted(range(own), key=lambda block: (-scores[block], block))[:num_blocks]
            read = {*range(min(SINKS, position + 1)), *range(max(0, position + 1 - WINDOW), position + 1)}
            for block in [*best, own]:
                read |= set(range(block * BLOCK, min((block + 1) * BLOCK, position + 1)))
            tokens = sorted(read)
            for head in heads:
                logits = key[tokens, kv_head] @ query[row, head] / numpy.sqrt(DIM)
                weights = numpy.exp(logits - logits.max())
                output[row, head] = weights @ value[tokens, kv_head] / weights.sum()
                tokens_read[row, head] = len(tokens)
    return output, tokens_read


@pytest.fixture(scope="module")
def seed():
    value = int(os.environ.get("LONGSPAN_TEST_SEED", numpy.random.SeedSequence().entropy % 2**32))
    print(f"LONGSPAN_TEST_SEED={value}")
    return value


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    (folder / "never_heard_of.txtpb").write_text(METHOD)
    with Server("--ranks", 3, "--methods-dir", folder) as server, longspan.Client(server.address) as client:
        yield client


def test_the_server_lists_it(served):
    assert "never_heard_of" in served.methods


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_is_its_formula(served, seed, phase):
    random = numpy.random.default_rng(seed)
    key, value = random.standard_normal((2, TOKENS, KV_HEADS, DIM), dtype=numpy.float32)
    # Rows at the edges of blocks, before the first block ends, and at the end.
    starts = [0, BLOCK - 1, BLOCK, 777, TOKENS - 5] if phase == "prefill" else [TOKENS - 1]
    context = served.create_context(
        num_layers=1,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        kv_dtype="fp32",
        methods=["never_heard_of"],
    )
    context.append(0, key, value, start_pos=0)
    for start in starts:
        rows = 5 if phase == "prefill" and start + 5 <= TOKENS else 1
        query = random.standard_normal((rows, QUERY_HEADS, DIM), dtype=numpy.float32)
        call = getattr(context, phase)
        result = call(0, query, start_pos=start, return_selection=True)
        positions = range(start, start + rows)
        expected, tokens_read = formula(query, key, value, positions, BUDGET[phase])
        error = numpy.linalg.norm(result.output - expected) / numpy.linalg.norm(expected)
        assert error < 1e-5, f"{phase} at {start}: {error}"
        for selection in result.selections:
            wanted = tokens_read[selection.position - start, selection.query_head]
            assert selection.num_tokens == wanted, selection
        assert len(result.selections) == rows * QUERY_HEADS
    context.delete()


def test_the_phases_differ(seed):
    """Otherwise the test above could not tell one budget from the other."""
    random = numpy.random.default_rng(seed)
    key, value = random.standard_normal((2, TOKENS, KV_HEADS, DIM), dtype=numpy.float32)
    query = random.standard_normal((1, QUERY_HEADS, DIM), dtype=numpy.float32)
    one, _ = formula(query, key, value, [TOKENS - 1], BUDGET["prefill"])
    other, _ = formula(query, key, value, [TOKENS - 1], BUDGET["decode"])
    assert numpy.linalg.norm(one - other) / numpy.linalg.norm(one) > 1e-3
