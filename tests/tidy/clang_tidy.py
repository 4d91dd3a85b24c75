"""clang-tidy over every source of a build: `clang_tidy.py BUILD_FOLDER [--jobs N] [FILE ...]`.

A file that passed is not checked again until it, a header of ours that it reaches, its compile command or .clang-tidy
changes: what passed is remembered in build/tidy.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import rules
import sources

ROOT = sources.ROOT
PASSED = ROOT / "build" / "tidy"


@functools.cache
def content(path: pathlib.Path) -> bytes:
    return path.read_bytes()


def reached_files(start: pathlib.Path) -> set[pathlib.Path]:
    """The file and every header of ours that it includes, directly or not."""
    reached, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for _, included in rules.includes(content(path).decode()):
            # Ours are named from the root; a file that is included several times names itself so as well.
            if (ROOT / included).is_file():
                waiting.append(ROOT / included)
    return reached


def fingerprint(entry: dict) -> str:
    digest = hashlib.sha256(content(ROOT / ".clang-tidy"))
    # The build folder's name does not matter to what is checked.
    digest.update(entry["command"].replace(entry["directory"], "").encode())
    for path in sorted(reached_files(pathlib.Path(entry["file"]))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + content(path))
    return digest.hexdigest()


def our_entries(build: pathlib.Path, only: list[str]) -> list[dict]:
    """One compile command for each source of ours; generated code is not ours. clang-tidy does not know nvcc's options,
    so device code is left out."""
    entries = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = pathlib.Path(entry["file"])
        relative = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if path.suffix == ".cu":
            continue
        if relative and not relative.startswith("build/") and (not only or relative in only):
            entries.setdefault(relative, entry)
    return list(entries.values())


def check(build: pathlib.Path, entry: dict) -> str:
    """clang-tidy's complaints; empty if there are none."""
    mark = PASSED / fingerprint(entry)
    if mark.exists():
        return ""
    command = ["clang-tidy", "-p", str(build), "--quiet", entry["file"]]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return result.stdout or result.stderr
    PASSED.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_intermixed_args()
    entries = our_entries(arguments.build.resolve(), arguments.files)
    if not entries:
        print(f"{arguments.build}: no source of ours in compile_commands.json")
        return 1
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for complaint in pool.map(functools.partial(check, arguments.build.resolve()), entries):
            if complaint:
                failed += 1
                print(complaint, flush=True)
    print(f"clang-tidy: {len(entries)} files, {failed} with complaints")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
