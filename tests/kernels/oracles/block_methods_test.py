"""Dense, window and block top-k methods against PyTorch's attention and the papers' scores."""

import numpy as np
import pytest
import runner
import torch
from attention import mean_rows, tokens_of_blocks, top

DENSE = {"branches": [{"selection": {"kind": "all"}}]}


def sdpa(problem, row, head, tokens):
    """(out, lse) of one head over the tokens named, by PyTorch in double precision."""
    kv_head = head // problem.group
    query = torch.tensor(problem.query[row, head], dtype=torch.float64)[None, None, None]
    keys = torch.tensor(problem.keys[tokens][:, kv_head], dtype=torch.float64)[None, None]
    values = torch.tensor(problem.values[tokens][:, kv_head], dtype=torch.float64)[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=problem.logit_scale)
    lse = torch.logsumexp(problem.logit_scale * (query @ keys.transpose(-1, -2)), -1)
    return out[0, 0, 0].numpy(), float(lse)


def check(problem, tokens_of):
    """`tokens_of(row, head)` are the tokens that the method must attend to, in one softmax."""
    answer = runner.run(problem)
    for row in range(len(problem.positions)):
        for head in range(problem.query.shape[1]):
            tokens = tokens_of(row, head)
            attended = [t for begin, end in answer.tokens[row][head][0] for t in range(begin, end)]
            assert attended == tokens, f"seed {runner.SEED}, row {row}, head {head}"
            out, lse = sdpa(problem, row, head, tokens)
            runner.assert_close(answer.out[row, head], out)
            assert abs(answer.lse[row, head] - lse) < 1e-9
    return answer


def round_bf16(array):
    return torch.tensor(array).to(torch.bfloat16).to(torch.float32).numpy()


BORDERS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 500, 999]


@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (192, 128), (1, 1)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (9, 3), (4, 4)])
def test_dense(dims, heads):
    problem = runner.random_problem(
        DENSE, 300, [0, 63, 64, 299], runner.generator(1), heads[0], heads[1], dims[0], dims[1]
    )
    check(problem, lambda row, head: list(range(problem.positions[row] + 1)))


def test_dense_prefill_equals_causal_attention():
    problem = runner.random_problem(DENSE, 200, list(range(200)), runner.generator(2), phase="prefill")
    answer = runner.run(problem)
    query, keys, values = (
        torch.tensor(x, dtype=torch.float64).transpose(0, 1)[None]
        for x in (problem.query, problem.keys, problem.values)
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        keys.repeat_interleave(problem.group, 1),
        values.repeat_interleave(problem.group, 1),
        is_causal=True,
        scale=problem.logit_scale,
    )
    runner.assert_close(answer.out, out[0].transpose(0, 1).numpy())


def test_soft_cap():
    problem = runner.random_problem(DENSE, 150, [149], runner.generator(3), soft_cap=2.5, scale=1.0)
    answer = runner.run(problem)
    for head in range(4):
        logits = problem.keys[:, head // 2].astype(np.float64) @ problem.query[0, head].astype(np.float64)
        capped = torch.tensor(2.5 * np.tanh(logits / 2.5))
        out = torch.softmax(capped, 0).numpy() @ problem.values[:, head // 2]
        runner.assert_close(answer.out[0, head], out)
        assert abs(answer.lse[0, head] - float(torch.logsumexp(capped, 0))) < 1e-9


def test_sink_logits_join_the_softmax_with_a_zero_value():
    rng = runner.generator(4)
    problem = runner.random_problem(DENSE, 150, [0, 149], rng)
    problem.sink_logits = rng.standard_normal(4).astype(np.float32)
    answer = runner.run(problem)
    for row in range(2):
        for head in range(4):
            out, lse = sdpa(problem, row, head, list(range(problem.positions[row] + 1)))
            with_sink = np.logaddexp(lse, float(problem.sink_logits[head]))
            runner.assert_close(answer.out[row, head], out * np.exp(lse - with_sink))
            assert abs(answer.lse[row, head] - with_sink) < 1e-9


@pytest.mark.parametrize("window, sinks", [(1, 0), (64, 4), (100, 70), (5000, 3), (0, 10)])
def test_window_and_sinks_count_a_token_once(window, sinks):
    method = {"branches": [{"window_tokens": window, "sink_tokens": sinks}]}
    problem = runner.random_problem(method, 1000, BORDERS, runner.generator(5))

    def tokens_of(row, head):
        position = problem.positions[row]
        return [t for t in range(position + 1) if t < sinks or t > position - window]

    check(problem, tokens_of)


def top_k_method(summary, search, block_tokens, blocks, within_budget, window=0, sinks=0, **selection):
    return {
        "branches": [
            {
                "summary": summary,
                "search": search,
                "selection": {
                    "kind": "top_k",
                    "block_tokens": block_tokens,
                    "forced_within_budget": within_budget,
                    **selection,
                },
                "window_tokens": window,
                "sink_tokens": sinks,
                "prefill": {"value": blocks},
                "decode": {"value": blocks},
            }
        ]
    }


def moba_blocks(problem, row, head, block_tokens, blocks):
    """MoBA: the query against the mean key of every full block before its own, its own with +inf; the best k."""
    own = problem.positions[row] // block_tokens
    keys, query = problem.keys[:, head // problem.group], problem.query[row, head].astype(np.float64)
    scores = {
        b: float(mean_rows(keys[b * block_tokens : (b + 1) * block_tokens]).astype(np.float64) @ query)
        for b in range(own)
    }
    return sorted(top(scores | {own: np.inf}, blocks))


@pytest.mark.parametrize("block_tokens, blocks", [(16, 4), (64, 3), (128, 1), (64, 1000)])
def test_moba(block_tokens, blocks):
    method = top_k_method({"kind": "mean", "block_tokens": block_tokens}, {}, block_tokens, blocks, True)
    problem = runner.random_problem(method, 1010, BORDERS, runner.generator(6))
    answer = check(
        problem,
        lambda row, head: tokens_of_blocks(
            moba_blocks(problem, row, head, block_tokens, blocks), block_tokens, problem.positions[row]
        ),
    )
    for row, position in enumerate(problem.positions):
        assert len(answer.blocks(row, 0, 0)) == min(blocks, position // block_tokens + 1)


def test_quest():
    """The bound over a page's minima and maxima; the current page always; the budget in pages."""
    page, budget = 16, 5
    method = top_k_method({"kind": "min_max", "block_tokens": page}, {"score": "bound"}, page, budget, True)
    problem = runner.random_problem(method, 1010, BORDERS, runner.generator(7))

    def tokens_of(row, head):
        own = problem.positions[row] // page
        keys, query = problem.keys[:, head // 2], problem.query[row, head].astype(np.float64)
        scores = {own: np.inf}
        for b in range(own):
            rows = keys[b * page : (b + 1) * page].astype(np.float64)
            bound = np.maximum(query * rows.min(0), query * rows.max(0)).sum()
            assert bound >= (rows @ query).max() - 1e-9, "no key of the page scores higher"
            scores[b] = float(bound)
        return tokens_of_blocks(top(scores, budget), page, problem.positions[row])

    check(problem, tokens_of)


def test_kinetics():
    """The group's mean query against mean keys; sinks and a window on top; the own page beside the budget."""
    page, budget = 16, 3
    method = top_k_method(
        {"kind": "mean", "block_tokens": page}, {"query_reduce": "group_mean"}, page, budget, False, 40, 4
    )
    problem = runner.random_problem(method, 1010, BORDERS, runner.generator(8))

    def tokens_of(row, head):
        position, kv_head = problem.positions[row], head // problem.group
        own = position // page
        group = problem.query[row, kv_head * problem.group : (kv_head + 1) * problem.group]
        query = group.astype(np.float64).mean(0)
        keys = problem.keys[:, kv_head]
        scores = {b: float(mean_rows(keys[b * page : (b + 1) * page]).astype(np.float64) @ query) for b in range(own)}
        chosen = set(tokens_of_blocks(top(scores, budget) + [own], page, position))
        return [t for t in range(position + 1) if t in chosen or t < 4 or t > position - 40]

    check(problem, tokens_of)


@pytest.mark.parametrize("reduce", ["group_sum", "group_mean", "group_max", "all_sum", "all_mean", "all_max"])
def test_head_reductions(reduce):
    method = top_k_method({"kind": "mean", "block_tokens": 32}, {"head_reduce": reduce}, 32, 4, True)
    problem = runner.random_problem(method, 1000, [999, 500], runner.generator(9), query_heads=6)

    def tokens_of(row, head):
        own = problem.positions[row] // 32
        heads = range(6) if reduce.startswith("all") else range(head // 3 * 3, head // 3 * 3 + 3)
        combine = {"sum": np.sum, "ean": np.mean, "max": np.max}[reduce[-3:]]
        scores = {own: np.inf}
        for b in range(own):
            scores[b] = combine(
                [
                    mean_rows(problem.keys[b * 32 : b * 32 + 32, h // 3]).astype(np.float64)
                    @ problem.query[row, h].astype(np.float64)
                    for h in heads
                ]
            )
        return tokens_of_blocks(top(scores, 4), 32, problem.positions[row])

    check(problem, tokens_of)


def test_all_mean_query_scores_every_kv_head():
    """DHSA's workshop form: one mean query, the scaled mean keys averaged over heads, one choice for all."""
    method = top_k_method(
        {"kind": "mean", "block_tokens": 32, "scale_by_sqrt_length": True},
        {"query_reduce": "all_mean", "head_reduce": "all_mean"},
        32,
        4,
        True,
    )
    problem = runner.random_problem(method, 1000, [999], runner.generator(10))
    query = problem.query[0].astype(np.float64).mean(0)
    scores = {31: np.inf}
    for b in range(31):
        mean = mean_rows(problem.keys[b * 32 : b * 32 + 32]) * np.float32(np.sqrt(32))
        scores[b] = float(mean.astype(np.float64).mean(0) @ query)
    check(problem, lambda row, head: tokens_of_blocks(top(scores, 4), 32, 999))


def test_forced_blocks_and_budgets_by_phase():
    method = top_k_method(
        {"kind": "mean", "block_tokens": 16}, {}, 16, 0, False, forced_first_blocks=2, forced_last_blocks=3
    )
    method["branches"][0]["prefill"] = {"kind": "tokens", "value": 100}
    method["branches"][0]["decode"] = {"kind": "ratio", "value": 0.1, "min_blocks": 2, "max_blocks": 5}
    for phase in ("prefill", "decode"):
        problem = runner.random_problem(method, 1000, BORDERS, runner.generator(11), phase=phase)
        answer = runner.run(problem)
        for row, position in enumerate(problem.positions):
            own = position // 16
            forced = {b for b in range(own + 1) if b < 2 or b > own - 3}
            share = min(5, max(2, -((own + 1) // -10)))
            budget = 100 // 16 if phase == "prefill" else share
            for head in range(4):
                chosen = answer.selected[row][head][0]
                assert {item.id for item in chosen if item.forced} == forced
                scored = min(budget, own + 1 - len(forced))
                assert len(chosen) == len(forced) + scored, f"{phase} at {position}"


def test_ties_go_to_the_lower_block():
    method = top_k_method({"kind": "mean", "block_tokens": 16}, {}, 16, 4, True)
    problem = runner.random_problem(method, 320, [319], runner.generator(12))
    problem.keys[:] = np.tile(problem.keys[:16], (20, 1, 1))
    answer = runner.run(problem)
    assert answer.blocks(0, 0, 0) == [0, 1, 2, 19]


def test_scores_that_are_not_numbers_come_last():
    method = top_k_method({"kind": "mean", "block_tokens": 16}, {}, 16, 3, True)
    problem = runner.random_problem(method, 96, [95], runner.generator(13), kv_heads=1)
    problem.query = np.abs(problem.query)
    problem.keys[:16] = np.nan  # block 0
    problem.keys[16:32] = -np.inf  # block 1
    problem.keys[32:80] = np.repeat([1.0, 3.0, 2.0], 16)[:, None, None]  # blocks 2, 3, 4
    answer = runner.run(problem)
    assert answer.blocks(0, 0, 0) == [3, 4, 5]
    assert np.isfinite(answer.out).all()
    method["branches"][0]["decode"]["value"] = 5
    assert runner.run(problem).blocks(0, 0, 0) == [0, 2, 3, 4, 5], "equally low, so the lower block"
    assert np.isnan(runner.run(problem).out).all(), "attended to, a NaN shows"


def test_summaries_are_rounded_to_the_cache():
    method = top_k_method({"kind": "mean", "block_tokens": 16}, {}, 16, 4, True)
    problem = runner.random_problem(method, 1000, [999], runner.generator(14), kv_dtype="bf16")
    problem.keys, problem.values = round_bf16(problem.keys), round_bf16(problem.values)

    def blocks_of(head, round_mean):
        keys, query = problem.keys[:, head // 2], problem.query[0, head].astype(np.float64)
        scores = {62: np.inf}
        for b in range(62):
            scores[b] = float(round_mean(mean_rows(keys[b * 16 : b * 16 + 16])).astype(np.float64) @ query)
        return top(scores, 4)

    check(problem, lambda row, head: tokens_of_blocks(blocks_of(head, round_bf16), 16, 999))


@pytest.mark.parametrize(
    "roles, dense",
    [
        ({"dense_layers": [1]}, False),
        ({"dense_layers": [0, 2]}, True),
        ({"dense_decode": True}, True),
        ({"dense_prefill": True}, False),
        ({"dense_below_tokens": 1000}, False),
        ({"dense_below_tokens": 1001}, True),
    ],
)
def test_roles(roles, dense):
    method = top_k_method({"kind": "mean", "block_tokens": 16}, {}, 16, 4, True) | roles
    problem = runner.random_problem(method, 1000, [999], runner.generator(15), layer=2)
    answer = runner.run(problem)
    assert (answer.tokens[0][0][0] == [(0, 1000)]) == dense


def test_supplied_search_query_for_blocks():
    method = top_k_method({"kind": "mean", "block_tokens": 16}, {"query": "supplied"}, 16, 4, True)
    problem = runner.random_problem(method, 1000, [999], runner.generator(16))
    swapped = runner.Problem(**{**vars(problem), "query": problem.search_query})
    check(problem, lambda row, head: tokens_of_blocks(moba_blocks(swapped, row, head, 16, 4), 16, 999))
