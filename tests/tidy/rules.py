"""The rules of style that no off-the-shelf tool knows: pure functions from text to complaints.

The arrows are those of docs/architecture.md.
"""

import pathlib
import re

MAX_FILE_LINES = 600

# What each folder may include, besides itself. Tests, benches and deploy may include anything.
ARROWS = {
    "base": set(),
    "kernels": {"base"},
    "comm": {"base"},
    "worker": {"base", "kernels", "comm", "proto"},
    "coordinator": {"base", "proto"},
    "client": {"base", "proto"},
}
OURS = {*ARROWS, "tests", "bench", "deploy"}
# The embedded server's composition root, in three files: the one place where worker and coordinator meet.
COMPOSITION_ROOT = re.compile(r"client/cli/(serve|serve_options|lead_client)\.(h|cc)$")
# Our own messages; those of google.rpc and grpc.health belong to everybody.
PROTO_INCLUDE = re.compile(r"^longspan/.*\.pb\.h$")

# Whose headers are seen where: (include, the paths that may see it).
VENDOR_HEADERS = [
    (r"mpi\.h$", r"comm/mpi\.cc$"),
    (r"gloo/", r"comm/gloo\.cc$"),
    (r"nccl\.h$", r"comm/nccl\.cc$"),
    (r"(cuda|cublas|cutlass|cute|nv)\w*(\.h$|/)", r"(kernels/cuda/|bench/cuda_)"),
    (r"hwy/", r"(kernels/simd/|tests/kernels/|bench/)"),
    (r"\w*intrin\.h$", r"(kernels/simd/|bench/)"),
    (r"prometheus/", r"(base|worker|coordinator)/metrics|client/cli/serve\.cc$"),
    (r"spdlog/", r"base/logging\."),
    (r"CLI/", r"client/cli/"),
    (r"nlohmann/", r"(client/|bench/|tests/|base/logging\.cc$)"),
    # In base/ only what every service shares: the build without gRPC leaves these files out.
    (
        r"(grpc|grpcpp|google/rpc)/",
        r"(worker|coordinator|client|tests|bench)/|base/(error_details|ordered_stream|rpc)\.",
    ),
    (r"(gtest|gmock)/", r"tests/"),
]

# Spelled in parts, so that this file passes its own check.
BANNED_WORDS = [
    (re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b"), "finish it or file an issue"),
    (re.compile(r"(?<![\w.$}*-])/(wo" r"rk|ro" r"ot|ho" r"me|mn" r"t)/"), "a path of one machine"),
    (re.compile(r"\b(<<<<" r"<<<|>>>>" r">>>)"), "an unresolved merge"),
]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def includes(text: str) -> list[tuple[bool, str]]:
    """(in angle brackets, path) of every include."""
    return [(bracket == "<", path) for bracket, path in INCLUDE.findall(text)]


def check_arrows(path: pathlib.PurePosixPath, text: str) -> list[str]:
    """Includes that go against the arrows."""
    folder = path.parts[0]
    if folder not in ARROWS or COMPOSITION_ROOT.match(str(path)):
        return []
    complaints = []
    for _, included in includes(text):
        target = "proto" if PROTO_INCLUDE.search(included) else included.split("/")[0]
        if target == folder or target not in OURS | {"proto"}:
            continue
        if target not in ARROWS[folder]:
            complaints.append(f"{path}: {folder}/ may not include {included} of {target}/")
    return complaints


def check_vendor_headers(path: pathlib.PurePosixPath, text: str) -> list[str]:
    """Vendors' headers outside the files that are theirs."""
    complaints = []
    for _, included in includes(text):
        for header, allowed in VENDOR_HEADERS:
            if re.match(header, included) and not re.match(allowed, str(path)):
                complaints.append(f"{path}: {included} belongs in {allowed}")
    return complaints


def check_words(path: pathlib.PurePosixPath, text: str) -> list[str]:
    complaints = []
    for number, line in enumerate(text.splitlines(), 1):
        for word, why in BANNED_WORDS:
            found = word.search(line)
            if found:
                complaints.append(f"{path}:{number}: '{found.group(0)}': {why}")
    return complaints


def check_shape(path: pathlib.PurePosixPath, text: str) -> list[str]:
    """Length, line ends and headers' guards."""
    complaints = []
    lines = text.splitlines()
    source = path.suffix in {".h", ".cc", ".cu", ".cuh", ".py", ".sh", ".cmake", ".proto"}
    if source and len(lines) > MAX_FILE_LINES:
        complaints.append(f"{path}: {len(lines)} lines, more than {MAX_FILE_LINES}")
    if text and not text.endswith("\n"):
        complaints.append(f"{path}: no newline at the end")
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            complaints.append(f"{path}:{number}: spaces at the end of the line")
        if source and "\t" in line:
            complaints.append(f"{path}:{number}: a tab")
    if path.suffix in {".h", ".cuh"} and "#pragma once" not in lines:
        complaints.append(f"{path}: no '#pragma once'")
    if path.suffix in {".h", ".cuh"} and not text.startswith("//"):
        complaints.append(f"{path}: no comment that says what the file is for")
    return complaints


FOLDER_ROW = re.compile(r"^\| `([\w./-]+)/` \|", re.MULTILINE)


def check_folder_map(readme: str, folders: set[str]) -> list[str]:
    """The rows of the README's folder map against the folders that exist."""
    named = set(FOLDER_ROW.findall(readme))
    complaints = [f"README.md: the map lacks {name}/" for name in sorted(folders - named)]
    complaints += [
        f"README.md: the map names {name}/, which does not exist"
        for name in sorted(named)
        if name not in folders and name.split("/")[0] not in folders
    ]
    return complaints


def check_listed(path: pathlib.PurePosixPath, cmake: str) -> list[str]:
    """A source that no CMakeLists.txt above it names is never built. Parts of a source (-inl.h) and the headers of tests
    need not be named."""
    if path.name.endswith("-inl.h") or (path.suffix == ".h" and path.parts[0] in {"tests", "bench"}):
        return []
    if re.search(rf"(?<![\w-]){re.escape(path.name)}(?![\w-])", cmake):
        return []
    return [f"{path}: no CMakeLists.txt lists it"]
