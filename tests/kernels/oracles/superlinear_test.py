"""Superlinear multi-step attention (arXiv 2601.18401), equations 4 to 6 and its authors' reference, in exact integers."""

import dataclasses
import fractions

import numpy as np
import pytest
import runner
from attention import attend, softmax


@dataclasses.dataclass
class Settings:
    power: fractions.Fraction = fractions.Fraction(1, 2)
    backward: int = 2
    forward: int = 0
    spans: int = 2
    first_stripe: int = 0


KERNEL_DEFAULT = Settings(spans=3)
EXTENDED = Settings(backward=4, forward=2, spans=2, first_stripe=3)
RELEASED = Settings(power=fractions.Fraction(11, 20), backward=3, forward=1, spans=3, first_stripe=5)
ALL = [Settings(), KERNEL_DEFAULT, EXTENDED, RELEASED, Settings(spans=1), Settings(spans=1000)]


def method(settings):
    power = float(settings.power)
    return {
        "merge": "span_scores",
        "branches": [
            {
                "search": {
                    "query": "supplied",
                    "anchors": {"power": power, "first_stripe": settings.first_stripe},
                },
                "selection": {
                    "kind": "top_k",
                    "spans": {"power": power, "backward": settings.backward, "forward": settings.forward},
                },
                "prefill": {"value": settings.spans},
                "decode": {"value": settings.spans},
            }
        ],
    }


def integer_root(number, degree):
    """floor(number^(1/degree)) by bisection over integers."""
    low, high = 0, 1
    while high**degree <= number:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle)
    return low


def stripe_distance(stripe, power):
    """floor(i^(1/p)) with p = a / b: the a-th root of i^b."""
    return integer_root(stripe**power.denominator, power.numerator)


def span_length(factor, num_tokens, power):
    """ceil(f N^(a/b)): the least L with L^b >= f^b N^a."""
    floor = integer_root(factor**power.denominator * num_tokens**power.numerator, power.denominator)
    exact = floor**power.denominator == factor**power.denominator * num_tokens**power.numerator
    return floor if exact else floor + 1


def window_tokens(settings):
    return stripe_distance(settings.first_stripe + 1, settings.power) - 1


def anchors_far_to_near(position, settings):
    distances, stripe = [], settings.first_stripe + 1
    while (distance := stripe_distance(stripe, settings.power)) <= position + 1:
        distances.append(distance)
        stripe += 1
    return [position + 1 - distance for distance in reversed(distances)]


def best_anchors(problem, row, head, settings):
    """Prefill of the authors' kernel: farthest first, an anchor replaces a kept one only by a higher score."""
    keys = problem.keys[:, head // problem.group].astype(np.float64)
    query = problem.search_query[row, head].astype(np.float64)
    kept = []
    for anchor in anchors_far_to_near(problem.positions[row], settings):
        score = float(np.float32(keys[anchor] @ query))
        place = next((i for i, (other, _) in enumerate(kept) if score > other), len(kept))
        kept.insert(place, (score, anchor))
        del kept[settings.spans :]
    return kept


def span(anchor, position, settings, exponent=None):
    num_tokens = position + 1
    exponent = settings.power if exponent is None else exponent
    first = max(0, anchor - span_length(settings.backward, num_tokens, exponent))
    window_start = max(0, num_tokens - window_tokens(settings))
    last = min(anchor + span_length(settings.forward, num_tokens, exponent), position, window_start - 1)
    return list(range(first, last + 1))


def superlinear(problem, row, head, settings, variant=""):
    position = problem.positions[row]
    kv_head = head // problem.group
    of_head = problem.query[row, head], problem.keys[:, kv_head], problem.values[:, kv_head]
    window = list(range(max(0, position + 1 - window_tokens(settings)), position + 1))
    kept = best_anchors(problem, row, head, settings)
    if not kept:
        return attend(*of_head, window, problem.logit_scale), []
    exponent = 1 - settings.power if variant == "1 - q" else settings.power
    spans = [span(anchor, position, settings, exponent) for _, anchor in kept]
    scores = np.array([score for score, _ in kept])
    if variant == "scaled gate":
        scores = scores * problem.logit_scale
    gate = softmax(scores)
    if variant == "lse gate":
        logits = [problem.logit_scale * (of_head[1][s + window].astype(np.float64) @ of_head[0]) for s in spans]
        gate = softmax(np.array([np.log(np.exp(x).sum()) for x in logits]))
    if variant == "window apart":
        parts = [attend(*of_head, tokens, problem.logit_scale) for tokens in spans]
    elif variant == "one softmax":
        union = sorted(set(window).union(*spans))
        return attend(*of_head, union, problem.logit_scale), [anchor for _, anchor in kept]
    elif variant == "no token twice":
        seen, parts = set(), []
        for tokens in spans:
            parts.append(attend(*of_head, [t for t in tokens if t not in seen] + window, problem.logit_scale))
            seen |= set(tokens)
    else:
        parts = [attend(*of_head, tokens + window, problem.logit_scale) for tokens in spans]
    return sum(g * part for g, part in zip(gate, parts)), [anchor for _, anchor in kept]


def make(settings, positions, salt, num_tokens=None, **fields):
    rng = runner.generator(salt)
    return runner.random_problem(method(settings), num_tokens or max(positions) + 1, positions, rng, **fields)


def check(problem, settings):
    answer = runner.run(problem)
    assert answer.lse is None
    for row, position in enumerate(problem.positions):
        for head in range(problem.query.shape[1]):
            out, anchors = superlinear(problem, row, head, settings)
            assert answer.blocks(row, head, 0) == anchors, f"seed {runner.SEED}, position {position}"
            for item in answer.selected[row][head][0]:
                assert list(range(*item.tokens)) == span(item.id, position, settings)
            runner.assert_close(answer.out[row, head], out)
    return answer


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_equals_the_paper(settings):
    positions = [*range(0, 60, 7), 63, 64, 65, 99, 100, 255, 256, 900, 1023, 1024]
    check(make(settings, positions, 1, num_tokens=1100), settings)


def test_heads_choose_for_themselves():
    problem = make(EXTENDED, [1500], 2, query_heads=8, kv_heads=2)
    answer = check(problem, EXTENDED)
    assert len({tuple(answer.blocks(0, head, 0)) for head in range(8)}) > 2


def test_default_window_is_empty_and_the_first_anchor_is_the_query():
    assert window_tokens(KERNEL_DEFAULT) == 0
    answer = check(make(KERNEL_DEFAULT, [0], 3), KERNEL_DEFAULT)
    assert [item.tokens for item in answer.selected[0][0][0]] == [(0, 1)]


def test_dense_while_the_window_holds_everything():
    settings = dataclasses.replace(EXTENDED, first_stripe=9)  # a window of 99
    assert window_tokens(settings) == 99
    problem = make(settings, [0, 50, 98, 99], 4)
    answer = check(problem, settings)
    for row, position in enumerate(problem.positions[:3]):
        assert answer.blocks(row, 0, 0) == []
        dense = attend(
            problem.query[row, 0],
            problem.keys[:, 0],
            problem.values[:, 0],
            list(range(position + 1)),
            problem.logit_scale,
        )
        runner.assert_close(answer.out[row, 0], dense)
    assert answer.blocks(3, 0, 0) == [0], "at t = w the first anchor is token 0"


@pytest.mark.parametrize(
    "variant", ["lse gate", "scaled gate", "window apart", "one softmax", "no token twice"]
)
def test_other_readings_answer_otherwise(variant):
    """The data would show a gate by lse, a scaled gate, a window outside the spans, or overlaps counted once."""
    settings = dataclasses.replace(EXTENDED, spans=4)
    problem = make(settings, [400, 700, 1000], 5)
    problem.search_query *= 0.3
    answer = check(problem, settings)
    spans = [set(range(*item.tokens)) for item in answer.selected[0][0][0]]
    assert sum(map(len, spans)) > len(set.union(*spans)), "spans overlap in this data"
    assert any(
        runner.differs(answer.out[row, head], superlinear(problem, row, head, settings, variant)[0])
        for row in range(3)
        for head in range(4)
    )


def test_the_exponent_is_the_power_of_the_code():
    """The readme of the authors says 1 - span_power; at 0.5 both agree, at 0.55 they do not."""
    problem = make(RELEASED, [1000], 6)
    answer = check(problem, RELEASED)
    assert runner.differs(answer.out[0, 0], superlinear(problem, 0, 0, RELEASED, "1 - q")[0])
    half = make(KERNEL_DEFAULT, [1000], 6)
    runner.assert_close(runner.run(half).out[0, 0], superlinear(half, 0, 0, KERNEL_DEFAULT, "1 - q")[0])


def test_ties_keep_the_farther_anchor():
    problem = make(EXTENDED, [800], 7)
    problem.keys[:] = problem.keys[:1]
    answer = check(problem, EXTENDED)
    assert answer.blocks(0, 0, 0) == anchors_far_to_near(800, EXTENDED)[:2]


def test_search_query_alone_chooses():
    """Scores come from the supplied query, not scaled; the attention query only attends."""
    problem = make(EXTENDED, [800], 8)
    before = runner.run(problem)
    problem.query = -problem.query
    problem.scale = 3.0
    after = runner.run(problem)
    assert [before.blocks(0, h, 0) for h in range(4)] == [after.blocks(0, h, 0) for h in range(4)]


def test_every_key_is_in_reach():
    """p + q >= 1 and b >= 1 / p: all spans and the window together cover the context; b = 1 leaves holes."""
    for settings, covered in (
        (Settings(spans=1000), True),
        (dataclasses.replace(EXTENDED, spans=1000), True),
        (dataclasses.replace(RELEASED, spans=1000), True),
        (Settings(backward=1, spans=1000), False),
    ):
        answer = runner.run(make(settings, [1777], 9))
        assert (answer.tokens[0][0][0] == [(0, 1778)]) == covered


@pytest.mark.parametrize("position", [2**20 - 1, 999_999])
def test_exact_anchors_at_a_million(position):
    """One head size keeps it small; all anchors are kept, so the table is compared whole."""
    settings = dataclasses.replace(RELEASED, spans=5000, backward=0, forward=0)
    rng = runner.generator(10)
    problem = runner.random_problem(
        method(settings), position + 1, [position], rng, query_heads=1, kv_heads=1, key_dim=1, value_dim=1
    )
    answer = runner.run(problem)
    assert sorted(answer.blocks(0, 0, 0)) == sorted(anchors_far_to_near(position, settings))
