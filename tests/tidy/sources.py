"""The files of the repository, as the checks of style see them."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
CPP = {".h", ".cc", ".cu", ".cuh"}


def tracked_files() -> list[pathlib.PurePosixPath]:
    """Every file that git tracks or would track, relative to the root."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = {pathlib.PurePosixPath(line) for line in listed.stdout.splitlines()}
    # A file may be deleted but not yet committed so.
    return sorted(path for path in paths if (ROOT / path).is_file())


def read(path: pathlib.PurePosixPath) -> str | None:
    """The file's text; None for a binary file."""
    data = (ROOT / path).read_bytes()
    if b"\0" in data:
        return None
    return data.decode("utf-8")


def cpp_files() -> list[pathlib.PurePosixPath]:
    return [path for path in tracked_files() if path.suffix in CPP]


def is_shell(path: pathlib.PurePosixPath, text: str) -> bool:
    first = text.partition("\n")[0]
    return path.suffix == ".sh" or (first.startswith("#!") and "sh" in first.split("/")[-1])
