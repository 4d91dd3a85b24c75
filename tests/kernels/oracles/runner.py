"""Runs the C++ reference pipeline on problems made here, through the reference_runner binary.

Everything that the oracles compute lives in Python and comes from the papers' formulas; nothing is shared with the C++.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile

import numpy as np

BINARY_DIR = os.environ.get("LONGSPAN_BINARY_DIR", "build/cpu/bin")
SEED = int(os.environ.get("LONGSPAN_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
print(f"LONGSPAN_TEST_SEED={SEED}")


def generator(salt: int) -> np.random.Generator:
    return np.random.default_rng([SEED, salt])


@dataclasses.dataclass
class Problem:
    """One layer of one context. Shapes: keys [n, G, D], values [n, G, E], query [T, H, D]."""

    method: dict
    keys: np.ndarray
    values: np.ndarray
    query: np.ndarray
    positions: list[int]
    search_query: np.ndarray | None = None
    gates: np.ndarray | None = None
    sink_logits: np.ndarray | None = None
    phase: str = "decode"
    layer: int = 0
    kv_dtype: str = "fp32"
    scale: float | None = None
    soft_cap: float = 0.0

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.keys.shape[1]

    @property
    def logit_scale(self) -> float:
        return self.query.shape[2] ** -0.5 if self.scale is None else self.scale


@dataclasses.dataclass
class Selected:
    id: int
    tokens: tuple[int, int]
    forced: bool


@dataclasses.dataclass
class Answer:
    out: np.ndarray  # [T, H, E]
    lse: np.ndarray | None  # [T, H]
    selected: list[list[list[list[Selected]]]]  # [T][H][branches]
    tokens: list[list[list[list[tuple[int, int]]]]]  # [T][H][branches], what is attended to

    def blocks(self, row: int, head: int, branch: int) -> list[int]:
        return [item.id for item in self.selected[row][head][branch]]


def random_problem(
    method: dict,
    num_tokens: int,
    positions: list[int],
    rng: np.random.Generator,
    query_heads: int = 4,
    kv_heads: int = 2,
    key_dim: int = 32,
    value_dim: int = 24,
    **fields,
) -> Problem:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    rows = len(positions)
    return Problem(
        method=method,
        keys=normal(num_tokens, kv_heads, key_dim),
        values=normal(num_tokens, kv_heads, value_dim),
        query=normal(rows, query_heads, key_dim),
        positions=positions,
        search_query=normal(rows, query_heads, key_dim),
        gates=rng.random((rows, query_heads, len(method["branches"]))).astype(np.float32),
        **fields,
    )


def run(problem: Problem) -> Answer:
    rows, query_heads, key_dim = problem.query.shape
    num_tokens, kv_heads, value_dim = problem.values.shape
    description = {
        "method": problem.method,
        "phase": problem.phase,
        "layer": problem.layer,
        "num_query_heads": query_heads,
        "num_kv_heads": kv_heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "kv_dtype": problem.kv_dtype,
        "scale": problem.logit_scale,
        "soft_cap": problem.soft_cap,
        "num_tokens": num_tokens,
        "num_rows": rows,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "problem.json").write_text(json.dumps(description))
        for tensor in ("keys", "values", "query", "search_query", "gates", "sink_logits"):
            data = getattr(problem, tensor)
            if data is not None:
                np.ascontiguousarray(data, dtype="<f4").tofile(folder / f"{tensor}.f32")
        np.asarray(problem.positions, dtype="<i8").tofile(folder / "positions.i64")
        done = subprocess.run(
            [pathlib.Path(BINARY_DIR) / "reference_runner", folder], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        out = np.fromfile(folder / "out.f64").reshape(rows, query_heads, value_dim)
        lse = np.fromfile(folder / "lse.f64")
        all_lists = json.loads((folder / "selections.json").read_text())
    # A method whose roles made it dense has one branch.
    num_branches, rest = divmod(len(all_lists), rows * query_heads)
    assert rest == 0
    lists = iter(all_lists)
    selected, tokens = [], []
    for _ in range(rows):
        selected.append([])
        tokens.append([])
        for _ in range(query_heads):
            branches = [next(lists) for _ in range(num_branches)]
            selected[-1].append(
                [[Selected(i, (b, e), f) for i, b, e, f in one["selected"]] for one in branches]
            )
            tokens[-1].append([[tuple(span) for span in one["tokens"]] for one in branches])
    return Answer(out, lse.reshape(rows, query_heads) if lse.size else None, selected, tokens)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """Relative in the Euclidean norm; NaN never passes."""
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected)
    assert error <= tolerance * max(np.linalg.norm(expected), 1e-30), f"error {error}, seed {SEED}"


def differs(actual: np.ndarray, other: np.ndarray) -> bool:
    """Clearly another answer: what a formula read wrongly must show."""
    return bool(np.linalg.norm(actual - other) > 1e-3 * np.linalg.norm(actual))
