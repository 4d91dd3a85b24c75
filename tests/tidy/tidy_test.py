"""The repository keeps its own rules: arrows, vendors' headers, words, lengths, maps, and linters that are really on."""

import pathlib
import re
import subprocess

import pytest
import rules
import sources

ROOT = sources.ROOT


def complaints_of(check, paths):
    found = []
    for path in paths:
        text = sources.read(path)
        if text is not None:
            found += check(path, text)
    return found


def expect_none(complaints):
    assert not complaints, "\n" + "\n".join(complaints)


def test_there_are_sources():
    assert len(sources.cpp_files()) > 10


def test_include_arrows():
    expect_none(complaints_of(rules.check_arrows, sources.cpp_files()))


def test_vendor_headers():
    expect_none(complaints_of(rules.check_vendor_headers, sources.cpp_files()))


def test_words():
    expect_none(complaints_of(rules.check_words, sources.tracked_files()))


def test_shape():
    expect_none(complaints_of(rules.check_shape, sources.tracked_files()))


def test_every_source_is_listed():
    complaints = []
    for path in sources.tracked_files():
        listed = path.suffix in sources.CPP or path.name.endswith("_test.py")
        if not listed or path.parts[0] == "proto":
            continue
        lists = [ROOT / parent / "CMakeLists.txt" for parent in path.parents]
        text = "\n".join(file.read_text() for file in lists if file.exists())
        complaints += rules.check_listed(path, text)
    expect_none(complaints)


def test_folder_map():
    folders = {str(path.parts[0]) for path in sources.tracked_files() if len(path.parts) > 1}
    expect_none(rules.check_folder_map((ROOT / "README.md").read_text(), folders))


def test_readme_names_two_set_up_commands():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^deploy/quickstart\b", readme, re.MULTILINE)
    assert re.search(r"^tests/run\b", readme, re.MULTILINE)


def test_links_of_the_documents_lead_somewhere():
    complaints = []
    for path in sources.tracked_files():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", sources.read(path)):
            if "://" in target:
                continue
            if not (ROOT / path.parent / target).exists():
                complaints.append(f"{path}: the link to {target} leads nowhere")
    expect_none(complaints)


def test_files_that_the_documents_name_exist():
    complaints = []
    for path in sources.tracked_files():
        if path.suffix != ".md":
            continue
        for name in re.findall(r"`([\w.-]+/[\w./-]+)`", sources.read(path)):
            ours = name.split("/")[0] in rules.OURS | {"proto", "docs", "cmake", ".ci"}
            if ours and not any((ROOT / f"{name}{suffix}").exists() for suffix in ["", ".h", ".cc"]):
                complaints.append(f"{path}: there is no {name}")
    expect_none(complaints)


def literals(pattern, suffixes):
    """Every match of a pattern in the sources, outside the tests."""
    found = set()
    for path in sources.tracked_files():
        if path.suffix in suffixes and path.parts[0] != "tests":
            found |= set(re.findall(pattern, sources.read(path)))
    return found


def test_every_metric_is_documented():
    metrics = literals(r'"(longspan_[a-z_]+)"', {".cc", ".h"})
    text = (ROOT / "docs/api.md").read_text()
    documented = set(re.findall(r"`(longspan_[a-z_]+)`", text))
    assert len(metrics) > 10
    assert metrics <= documented, f"not in docs/api.md: {sorted(metrics - documented)}"
    assert documented <= metrics, f"not in the code: {sorted(documented - metrics)}"


def test_every_reason_is_documented():
    text = (ROOT / "docs/api.md").read_text()
    table = text[text.index("## Errors") : text.index("## Limits")]
    documented = set(re.findall(r"`([A-Z_]+)`", table))
    reasons = literals(r'return "([A-Z_]+)";', {".cc"}) & documented
    used = literals(r'with_reason\([^;]*?"([A-Z][A-Z_]+)"', {".cc", ".h"})
    assert len(used) > 5
    assert used <= documented, f"not in docs/api.md: {sorted(used - documented)}"
    assert documented <= used | reasons, f"not in the code: {sorted(documented - used - reasons)}"


def test_clang_format():
    files = [str(path) for path in sources.cpp_files()]
    result = subprocess.run(
        ["clang-format", "--dry-run", "--Werror", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]


def test_shellcheck():
    scripts = []
    for path in sources.tracked_files():
        text = sources.read(path)
        if text is not None and sources.is_shell(path, text):
            scripts.append(str(path))
    assert {"deploy/quickstart", "deploy/install-dependencies", "tests/run", ".ci/run"} <= set(scripts)
    result = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_executables_are_executable():
    for name in ["deploy/quickstart", "deploy/install-dependencies", "tests/run", ".ci/run"]:
        assert (ROOT / name).stat().st_mode & 0o111, name


def tidy_checks(*options):
    """The names of the checks that clang-tidy enables with these options."""
    command = ["clang-tidy", *options, "--list-checks"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"^    (\S+)$", result.stdout, re.MULTILINE))


def listed_checks():
    block = re.search(r"^Checks: >-\n((?:  .*\n)+)", (ROOT / ".clang-tidy").read_text(), re.MULTILINE)
    return [line.strip().rstrip(",") for line in block.group(1).splitlines()]


def matches(pattern, names):
    return {name for name in names if re.fullmatch(pattern.replace("*", ".*"), name)}


def test_every_clang_tidy_check_is_enabled():
    """A typo in a list of checks disables a check without a word, so what is listed is counted."""
    every = tidy_checks("--checks=*")
    enabled = tidy_checks()
    listed = listed_checks()
    assert listed[0] == "-*"
    expected = set()
    for item in listed[1:]:
        found = matches(item.lstrip("-"), every)
        assert found, f".clang-tidy names {item}, which clang-tidy does not know"
        expected = expected - found if item.startswith("-") else expected | found
    assert enabled == expected
    assert len(enabled) > 80


def test_every_clang_tidy_option_is_known():
    command = ["clang-tidy", "--checks=*", "--dump-config"]
    known = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
    for option in re.findall(r"key: ([\w.-]+)", (ROOT / ".clang-tidy").read_text()):
        # The options of one identifier kind are not dumped before they are set.
        if option.startswith("readability-identifier-naming."):
            assert re.search(r"(Case|Prefix|Suffix|IgnoredRegexp)$", option), option
        else:
            assert f"key:             {option}" in known, option


def test_warnings_are_errors():
    assert "-Werror" in (ROOT / "cmake/targets.cmake").read_text()
    assert re.search(r"^WarningsAsErrors: '\*'$", (ROOT / ".clang-tidy").read_text(), re.MULTILINE)


# The rules themselves can fail.


@pytest.mark.parametrize(
    "path, text",
    [
        ("base/x.h", '#include "kernels/method.h"\n'),
        ("kernels/x.cc", '#include "comm/communicator.h"\n'),
        ("kernels/x.cc", '#include "longspan/v1/method.pb.h"\n'),
        ("coordinator/x.cc", '#include "worker/group.h"\n'),
        ("client/cli/main.cc", '#include "worker/group.h"\n'),
        ("comm/x.h", '  #  include <worker/layout.h>\n'),
    ],
)
def test_arrows_can_fail(path, text):
    assert rules.check_arrows(pathlib.PurePosixPath(path), text)


@pytest.mark.parametrize(
    "path, text",
    [
        ("worker/x.cc", '#include "kernels/method.h"\n#include "longspan/v1/method.pb.h"\n'),
        ("client/cli/serve.cc", '#include "worker/group.h"\n#include "coordinator/service.h"\n'),
        ("tests/worker/x_test.cc", '#include "worker/group.h"\n'),
        ("base/x.h", '#include <vector>\n#include "absl/status/status.h"\n'),
    ],
)
def test_arrows_can_pass(path, text):
    assert not rules.check_arrows(pathlib.PurePosixPath(path), text)


@pytest.mark.parametrize(
    "path, header",
    [
        ("worker/group.cc", "<mpi.h>"),
        ("comm/in_process.cc", "<nccl.h>"),
        ("worker/x.cc", "<cuda_runtime.h>"),
        ("tests/kernels/x.cc", "<cuda_runtime.h>"),
        ("kernels/reference/attend.cc", '"hwy/highway.h"'),
        ("kernels/x.cc", '"grpcpp/grpcpp.h"'),
        ("base/config.cc", '"CLI/CLI.hpp"'),
        ("kernels/x.cc", "<immintrin.h>"),
    ],
)
def test_vendor_headers_can_fail(path, header):
    assert rules.check_vendor_headers(pathlib.PurePosixPath(path), f"#include {header}\n")


@pytest.mark.parametrize("word", ["TO" "DO", "FIX" "ME: later", "see /ro" "ot/notes", '"/ho' 'me/me/x"'])
def test_words_can_fail(word):
    assert rules.check_words(pathlib.PurePosixPath("a.cc"), f"int a;  // {word}\n")


def test_words_can_pass():
    text = "path = ${root}/wo" "rk/x\nkernels/root/y\nmethod\n"
    assert not rules.check_words(pathlib.PurePosixPath("a.cc"), text)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.cc", "int a;\n" * 601),
        ("a.cu", "int a;\n" * 601),
        ("a.cc", "int a;"),
        ("a.cc", "int a; \n"),
        ("a.cc", "\tint a;\n"),
        ("a.h", "// Purpose.\nint a;\n"),
        ("a.h", "#pragma once\nint a;\n"),
    ],
)
def test_shape_can_fail(name, text):
    assert rules.check_shape(pathlib.PurePosixPath(name), text)


def test_folder_map_can_fail():
    assert rules.check_folder_map("| `base/` | x |\n", {"base", "comm"})
    assert rules.check_folder_map("| `base/` | x |\n| `gone/` | x |\n", {"base"})
    assert not rules.check_folder_map("| `base/` | x |\n", {"base"})


def test_listed_can_fail():
    path = pathlib.PurePosixPath("kernels/merge.cc")
    assert rules.check_listed(path, "SOURCES branch_merge.cc")
    assert not rules.check_listed(path, "SOURCES\n  merge.cc)")
