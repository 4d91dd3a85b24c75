"""The set-up commands' manners: help, wrong usage, failures that show their reason."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ["deploy/quickstart", "deploy/install-dependencies", "tests/run"]


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {script}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_option(script):
    result = run(script, "--no-such-option")
    assert result.returncode == 2
    assert "usage:" in result.stderr


def test_unknown_part():
    result = run("tests/run", "--only", "main,nonsense")
    assert result.returncode == 2
    assert "nonsense" in result.stderr


def test_list_of_packages():
    few = run("deploy/install-dependencies", "--list").stdout.split()
    all_of_them = run("deploy/install-dependencies", "--tests", "--list").stdout.split()
    assert "cmake" in few and "clang-tidy" not in few
    assert "clang-tidy" in all_of_them
    assert set(few) < set(all_of_them)


def test_installed_already_is_silent_and_quick():
    result = run("deploy/install-dependencies", "--tests")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def shell(script):
    return run("bash", "-c", f"set -euo pipefail; source deploy/environment.sh; {script}")


def test_step_keeps_quiet():
    result = shell("step 'A step' scripts-test bash -c 'echo hidden'")
    assert result.returncode == 0
    assert "A step" in result.stdout and "hidden" not in result.stdout
    assert (ROOT / "build/log/scripts-test.log").read_text() == "hidden\n"


def test_failed_step_shows_why_and_stops():
    result = shell("step 'A step' scripts-test bash -c 'echo the reason; exit 7'; echo not reached")
    assert result.returncode == 7
    assert "the reason" in result.stdout and "not reached" not in result.stdout


def test_python_must_be_usable():
    result = shell("LONGSPAN_PYTHON=/bin/false find_python")
    assert result.returncode == 0
    assert "/bin/false" not in result.stdout
