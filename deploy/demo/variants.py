"""Which methods the main job runs: the shipped files of deploy/methods, with other budgets or in other
phases where the job compares those.
"""

import pathlib
import typing

import longspan

# The searching method and budget that suit an ordinary model best, by the curves of this job; the evidence is
# in docs/performance.md.
DEFAULT_FAMILY = "block_topk"
DEFAULT_BUDGET = 8192
# Of the first job.
_READING_BUDGETS = (1024, 2048)

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "methods"


class Variant(typing.NamedTuple):
    """A method as one of the jobs runs it. `family` is the shipped file it comes from."""

    label: str
    family: str
    method: longspan.Method
    budget_tokens: int = 0


def shipped(name: str) -> longspan.Method:
    return longspan.load_method(_FOLDER / f"{name}.txtpb")


def _renamed(method: longspan.Method, suffix: str) -> longspan.Method:
    copy = longspan.Method()
    copy.CopyFrom(method)
    copy.name = f"{method.name}_{suffix}"
    copy.ClearField("description")
    return copy


def sparse_in_prefill(method: longspan.Method) -> longspan.Method:
    """The same method with a sparse prefill, where the shipped one keeps that dense."""
    copy = _renamed(method, "prefill_too")
    copy.roles.ClearField("dense_phase")
    return copy


def everywhere(method: longspan.Method) -> longspan.Method:
    """The same method in all layers and phases: for contexts that hold a few of a model's layers."""
    copy = _renamed(method, "everywhere")
    copy.ClearField("roles")
    return copy


def with_budget(method: longspan.Method, tokens: int) -> longspan.Method:
    """The same method reading about `tokens`: searched blocks, or the window where nothing is searched.
    What a method adds beside its search (sinks, window, open block) comes on top."""
    copy = _renamed(method, str(tokens))
    for branch in copy.branches:
        if branch.selection.block_tokens:
            branch.budget.both.Clear()
            branch.budget.both.blocks = max(1, tokens // branch.selection.block_tokens)
        else:
            branch.mask.window_tokens = tokens - branch.mask.sink_tokens
    return copy


def keeps_dense_prefill(method: longspan.Method) -> bool:
    """Whether the keys that a prompt leaves behind are those of dense attention."""
    return method.name == "dense" or method.roles.dense_phase == method.roles.PHASE_PREFILL


def reading_variants(quick: bool) -> list[Variant]:
    """For an ordinary model and a prompt within its context. Dense comes first. The shipped default would
    read all of it, so its family runs with smaller budgets."""
    if quick:
        return [Variant(name, name, shipped(name)) for name in ("dense", "quest", "window")]
    names = ["dense", "quest", "kinetics", "block_topk_bound", "window", "moba"]
    variants = [Variant(name, name, shipped(name)) for name in names]
    for budget in _READING_BUDGETS:
        method = with_budget(shipped(DEFAULT_FAMILY), budget)
        variants.append(Variant(f"{DEFAULT_FAMILY}, {budget:,}", DEFAULT_FAMILY, method))
    for variant in (variants[names.index("quest")], variants[-1]):
        method = sparse_in_prefill(variant.method)
        variants.append(Variant(f"{variant.label}, prefill too", variant.family, method))
    return variants


def million_families(quick: bool) -> list[str]:
    """Methods whose accuracy and speed are measured against the budget, dense aside."""
    if quick:
        return ["quest", DEFAULT_FAMILY, "window"]
    return ["quest", "kinetics", "block_topk", "block_topk_bound", "moba", "window"]


def million_variant(family: str, budget: int) -> Variant:
    method = with_budget(everywhere(shipped(family)), budget)
    return Variant(f"{family} {budget:,}", family, method, budget)


def default_variant() -> Variant:
    return million_variant(DEFAULT_FAMILY, DEFAULT_BUDGET)


def million_variants(quick: bool) -> list[Variant]:
    """Every family at every budget, smallest first."""
    variants = []
    for family in million_families(quick):
        block = max(branch.selection.block_tokens for branch in shipped(family).branches)
        budgets = [1024, DEFAULT_BUDGET] if quick else [512, 1024, 2048, 4096, 8192, 16384]
        # A window alone must be far larger to hold as much.
        budgets = budgets if block else [4 * budget for budget in budgets]
        variants += [million_variant(family, budget) for budget in budgets if budget >= 2 * block]
    return variants
