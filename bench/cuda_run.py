"""Builds, checks and times the CUDA kernels with their peers, and ends with the table of targets.

    python bench/cuda_run.py [--binaries DIR] [--quick] [--json FILE]

Run it on a machine with a GPU and a python3 that has PyTorch. Each program verifies before it times; a failed check ends
with exit code 1, a missed target does not. --binaries takes programs that were built elsewhere (preset cuda-kernels).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = ["cuda_probe", "cuda_prefill", "cuda_decode", "cuda_search", "cuda_importance", "cuda_sparse_decode"]


class Target(typing.NamedTuple):
    """A case reaches its target when its time is within max_ms, or its rate within min_ratio of the peer's."""

    case: str
    peer: str = ""
    min_ratio: float = 0.0
    max_ms: float = 0.0


def dense_targets():
    for shape in ("32/8 d128", "64/4 d128", "32/8 d64"):
        for size in ("8K", "32K", "64K", "128K"):
            yield Target(f"dense prefill {shape} {size}", "cuDNN", min_ratio=0.85)
    for shape in ("32/8 d128", "64/4 d128"):
        yield Target(f"dense decode {shape} 128K", "cuDNN", min_ratio=1.05)
        yield Target(f"dense decode {shape} 1M", "cuDNN", min_ratio=1.0)


TARGETS = [
    *dense_targets(),
    Target("selected prefill 64/4 d128 64K random lists", "flash-linear-attention", max_ms=16.0),
    Target("selected prefill 32/8 d128 64K random lists", max_ms=16.0),
    Target("selected prefill 64/4 d128 64K shared lists of 64 rows", max_ms=6.5),
    Target("selected prefill 32/8 d128 64K shared lists of 64 rows", max_ms=3.3),
    Target("sparse decode 64/4 d128 1M top-64", max_ms=0.015),
    Target("sparse decode 32/8 d128 1M top-64", max_ms=0.024),
]


def build():
    subprocess.run(["cmake", "--preset", "cuda-kernels"], cwd=ROOT, check=True)
    subprocess.run(["cmake", "--build", "--preset", "cuda-kernels"], cwd=ROOT, check=True)
    return ROOT / "build/cuda-kernels/bin"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_programs(binaries, results, quick):
    """The programs whose checks failed."""
    failed = []
    for name in PROGRAMS:
        program = binaries / f"bench_{name}"
        if not program.exists():
            print(f"{name}: not built")
            continue
        print(f"== {name}", flush=True)
        command = [str(program), "--json", str(results)] + (["--quick"] if quick else [])
        if subprocess.run(command).returncode != 0:
            failed.append(name)
    return failed


def verdict(target, times, peers):
    """(ours, the peer's, what was reached) as text."""
    ours = times.get(target.case)
    theirs = peers.get((target.case, target.peer))
    if ours is None:
        return "not run", "–", "–"
    peer = f"{target.peer} {theirs:.3f} ms" if theirs else "–"
    if target.min_ratio:
        if theirs is None:
            return f"{ours:.3f} ms", "not run", "–"
        ratio = theirs / ours
        word = "reached" if ratio >= target.min_ratio else "missed"
        return f"{ours:.3f} ms", peer, f"{word}: {ratio:.2f} of {target.min_ratio:.2f}"
    word = "reached" if ours <= target.max_ms else "missed"
    return f"{ours:.3f} ms", peer, f"{word}: at most {target.max_ms:g} ms"


def print_table(times, peers):
    print("\n| job | time | peer | target |\n| --- | --- | --- | --- |")
    for target in TARGETS:
        ours, peer, reached = verdict(target, times, peers)
        print(f"| {target.case} | {ours} | {peer} | {reached} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binaries", type=pathlib.Path, help="directory of programs that are built already")
    parser.add_argument("--quick", action="store_true", help="checks, and small contexts for the peers")
    parser.add_argument("--json", type=pathlib.Path, help="keep a line for each case in this file")
    arguments = parser.parse_args()
    binaries = arguments.binaries or build()
    with tempfile.TemporaryDirectory() as scratch:
        results = arguments.json or pathlib.Path(scratch) / "results.json"
        results.unlink(missing_ok=True)
        failed = run_programs(binaries, results, arguments.quick)
        print("== peers", flush=True)
        peers = [sys.executable, str(ROOT / "bench/cuda_peers.py"), "--json", str(results)]
        subprocess.run(peers + (["--quick"] if arguments.quick else []))
        records = read(results)
    times = {record["case"]: record["ms"] for record in records if "peer" not in record}
    print_table(times, {(r["case"], r["peer"]): r["ms"] for r in records if "peer" in r})
    if failed:
        sys.exit(f"checks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
