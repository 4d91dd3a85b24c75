"""Native sparse attention (arXiv 2502.11089), equations 5 and 7 to 12, written with the paper's indices."""

import numpy as np
import pytest
import runner
from attention import attend, mean_rows, softmax, tokens_of_blocks, top

PAPER = dict(window=32, stride=16, block=64)
POOLED = dict(window=64, stride=64, block=64)
# A window inside its predecessor's block, one as long as a block, and small sizes.
SHAPES = [PAPER, POOLED, dict(window=16, stride=4, block=16), dict(window=8, stride=8, block=32)]


def nsa_method(window, stride, block, blocks=6, local=100, key_weights=None, value_weights=None):
    summary = {"kind": "compressed", "window_tokens": window, "stride_tokens": stride}
    if key_weights is not None:
        summary |= {"key_weights": key_weights, "value_weights": value_weights}
    return {
        "merge": "gates",
        "branches": [
            {"source": "summaries", "summary": summary},
            {
                "summary": summary,
                "search": {"normalise": "softmax", "head_reduce": "group_sum"},
                "selection": {
                    "kind": "top_k",
                    "block_tokens": block,
                    "forced_first_blocks": 1,
                    "forced_last_blocks": 2,
                    "forced_within_budget": True,
                },
                "prefill": {"value": blocks},
                "decode": {"value": blocks},
            },
            {"window_tokens": local},
        ],
    }


def compress(rows, window, stride, position):
    """The compressed rows that a query at `position` sees: phi(rows[di .. di + l - 1]) with di + l - 1 <= t."""
    count = (position + 1 - window) // stride + 1 if position + 1 >= window else 0
    return [mean_rows(rows[stride * i : stride * i + window]) for i in range(count)]


def importance_of_equation_9(p, window, stride, block, num_blocks, first_index=1):
    """p_slc[j] = sum over m < l'/d, n < l/d of p_cmp[l'/d j - m - n], indices from `first_index`."""
    scores = {}
    for j in range(first_index, num_blocks + first_index):
        total = 0.0
        for m in range(block // stride):
            for n in range(window // stride):
                i = block // stride * j - m - n
                if first_index <= i < len(p) + first_index:
                    total += p[i - first_index]
        scores[j - first_index] = total
    return scores


def importance_by_overlap(p, window, stride, block, num_blocks):
    scores = {}
    for j in range(num_blocks):
        scores[j] = 0.0
        for i, probability in enumerate(p):
            shared = len(set(range(stride * i, stride * i + window)) & set(range(block * j, block * (j + 1))))
            scores[j] += shared / stride * probability
    return scores


def nsa(problem, row, head, window, stride, block, blocks=6, local=100, first_index=1, normalise=True):
    """(out, selected blocks) of one query head."""
    position, kv_head = problem.positions[row], head // problem.group
    keys, values = problem.keys[:, kv_head], problem.values[:, kv_head]
    scale = problem.logit_scale
    compressed_keys = np.array(compress(keys, window, stride, position))
    compressed_values = compress(values, window, stride, position)
    own = position // block

    scores = dict.fromkeys(range(own + 1), 0.0)
    for group_head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
        if not len(compressed_keys):
            break
        logits = scale * (compressed_keys.astype(np.float64) @ problem.query[row, group_head].astype(np.float64))
        p = softmax(logits) if normalise else np.exp(logits)
        of_head = importance_of_equation_9(p, window, stride, block, own + 1, first_index)
        scores = {j: scores[j] + of_head[j] for j in scores}
    forced = {0, own, max(0, own - 1)}
    chosen = top({j: s for j, s in scores.items() if j not in forced}, max(0, blocks - len(forced)))
    selected = sorted(forced | set(chosen))

    query = problem.query[row, head]
    out = np.zeros(values.shape[1])
    if len(compressed_keys):
        out += problem.gates[row, head, 0] * attend(
            query, compressed_keys, np.array(compressed_values), range(len(compressed_keys)), scale
        )
    out += problem.gates[row, head, 1] * attend(
        query, keys, values, tokens_of_blocks(selected, block, position), scale
    )
    recent = list(range(max(0, position + 1 - local), position + 1))
    out += problem.gates[row, head, 2] * attend(query, keys, values, recent, scale)
    return out, selected


def check(problem, **shape):
    answer = runner.run(problem)
    assert answer.lse is None, "a gated mixture has no log-sum-exp"
    for row in range(len(problem.positions)):
        for head in range(problem.query.shape[1]):
            out, selected = nsa(problem, row, head, **shape)
            assert answer.blocks(row, head, 1) == selected, f"seed {runner.SEED}, row {row}, head {head}"
            runner.assert_close(answer.out[row, head], out)
    return answer


def boundary_positions(window, stride, block):
    """Around the first windows' ends and the blocks' borders."""
    ends = [window, window + stride, window + 2 * stride, block, 2 * block, 3 * block]
    return sorted({end + shift for end in ends for shift in (-2, -1, 0, 1)} | {0, 1, 11 * block + 5})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_paper(shape):
    rng = runner.generator(1)
    positions = boundary_positions(**shape)
    problem = runner.random_problem(nsa_method(**shape), max(positions) + 20, positions, rng)
    check(problem, **shape)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 1), (3, 3)])
def test_the_group_shares_its_selection(heads):
    rng = runner.generator(2)
    problem = runner.random_problem(
        nsa_method(**PAPER), 1200, [1199, 700], rng, query_heads=heads[0], kv_heads=heads[1]
    )
    answer = check(problem, **PAPER)
    for row in range(2):
        for head in range(heads[0]):
            first_of_group = head // problem.group * problem.group
            assert answer.blocks(row, head, 1) == answer.blocks(row, first_of_group, 1)


def test_equation_9_counts_from_one():
    """Read from one it is the overlap divided by the stride; read from zero it is a block off."""
    rng = runner.generator(3)
    p = rng.random(200)
    for shape in SHAPES:
        num_blocks = 200 * shape["stride"] // shape["block"] - 1
        overlap = importance_by_overlap(p, num_blocks=num_blocks, **shape)
        from_one = importance_of_equation_9(p, num_blocks=num_blocks, **shape)
        from_zero = importance_of_equation_9(p, num_blocks=num_blocks, first_index=0, **shape)
        assert list(from_one.values()) == pytest.approx(list(overlap.values()))
        if shape != POOLED:  # one window a block has only itself to be mistaken for
            assert list(from_zero.values()) != pytest.approx(list(overlap.values()))


def test_default_weights_are_1_2_2_2_1():
    for i, weight in zip(range(12 - 1, 12 + 4), (1, 2, 2, 2, 1)):
        p = np.zeros(40)
        p[i] = 1
        assert importance_by_overlap(p, num_blocks=9, **PAPER)[3] == weight
        assert importance_of_equation_9(p, num_blocks=9, **PAPER)[3] == weight


def separating_problem(salt):
    """Rows enough that another reading of the formulas selects something else somewhere."""
    rng = runner.generator(salt)
    problem = runner.random_problem(nsa_method(**PAPER), 1500, list(range(900, 1500, 20)), rng)
    problem.query *= 3
    return problem


@pytest.mark.parametrize(
    "reading", [dict(first_index=0), dict(normalise=False)], ids=["indices from 0", "no normaliser"]
)
def test_other_readings_select_otherwise(reading):
    """The test data would show an index from zero, or probabilities that are not normalised per head before the sum."""
    problem = separating_problem(4)
    answer = check(problem, **PAPER)
    others = [
        nsa(problem, row, head, **PAPER, **reading)[1] != answer.blocks(row, head, 1)
        for row in range(len(problem.positions))
        for head in range(problem.query.shape[1])
    ]
    assert any(others)


def test_without_windows_the_compressed_branch_is_zero():
    rng = runner.generator(5)
    problem = runner.random_problem(nsa_method(**PAPER), 40, [0, 17, 30, 31], rng)
    problem.gates[:] = [1, 0, 0]
    answer = runner.run(problem)
    assert not answer.out[:3].any(), "t + 1 < l"
    assert answer.out[3].any(), "the window ends at t"
    assert all(answer.blocks(row, 0, 1) == [0] for row in range(3)), "forced blocks only"


def test_scale_matters_to_the_selection():
    """Equation 8 prints no scale; with it the softmax is flatter, and heads weigh otherwise in the sum."""
    problem = separating_problem(6)
    scaled = check(problem, **PAPER)
    problem.scale = 1.0
    unscaled = check(problem, **PAPER)
    rows, heads = problem.query.shape[:2]
    assert any(scaled.blocks(r, h, 1) != unscaled.blocks(r, h, 1) for r in range(rows) for h in range(heads))


def test_forced_blocks_use_up_the_budget():
    rng = runner.generator(7)
    for blocks in (1, 3, 4, 16):
        problem = runner.random_problem(nsa_method(**PAPER, blocks=blocks), 700, [5, 64, 130, 200, 699], rng)
        answer = check(problem, **PAPER, blocks=blocks)
        for row, position in enumerate(problem.positions):
            own = position // 64
            chosen = answer.blocks(row, 0, 1)
            assert {0, own, max(0, own - 1)} <= set(chosen)
            assert len(chosen) == min(max(blocks, len({0, own, max(0, own - 1)})), own + 1)


def test_ties_go_to_the_lower_block():
    """Keys that repeat every block make all inner blocks equal but for the first window's neighbour."""
    rng = runner.generator(8)
    problem = runner.random_problem(nsa_method(**PAPER, blocks=5), 64 * 9, [64 * 9 - 1], rng)
    problem.keys[:] = np.tile(problem.keys[:64], (9, 1, 1))
    answer = runner.run(problem)
    for head in range(4):
        assert answer.blocks(0, head, 1) == [0, 1, 2, 7, 8]


def test_supplied_weights():
    rng = runner.generator(9)
    weights = rng.random((2, 32)).astype(np.float32)
    method = nsa_method(**PAPER, key_weights=weights[0].tolist(), value_weights=weights[1].tolist())
    problem = runner.random_problem(method, 500, [499], rng)
    problem.gates[:] = [1, 0, 0]
    answer = runner.run(problem)
    for head in range(4):
        keys, values = problem.keys[:, head // 2], problem.values[:, head // 2]
        count = (500 - 32) // 16 + 1
        pooled = [
            np.array([weights[which] @ rows[16 * i : 16 * i + 32] for i in range(count)])
            for which, rows in ((0, keys), (1, values))
        ]
        out = attend(problem.query[0, head], *pooled, range(count), problem.logit_scale)
        runner.assert_close(answer.out[0, head], out)


def test_gates_are_not_normalised():
    rng = runner.generator(10)
    problem = runner.random_problem(nsa_method(**PAPER), 300, [299], rng)
    once = runner.run(problem).out
    problem.gates = problem.gates * 3
    runner.assert_close(runner.run(problem).out, 3 * once)
