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


RESULTS = """<?xml version="1.0" encoding="UTF-8"?>
<testsuite name="Linux-c++"
\ttests="5"
\tfailures="1"
\tdisabled="0"
\tskipped="1"
\thostname="x"
\t>
\t<testcase name="worker.bad" classname="worker.bad" time="0.1" status="fail">
\t</testcase>
\t<testcase name="worker.good" classname="worker.good" time="0.1" status="run"/>
</testsuite>
"""


def totals_of(results, exit_code):
    """The totals after a ctest that wrote these results and exited with this code."""
    script = f"""
        source tests/run
        log_folder_of_this_test=$log_folder
        ctest() {{
          cat >"$log_folder_of_this_test/tests-pretended.xml" <<'XML'
{results}
XML
          return {exit_code}
        }}
        run_tests pretended
        echo "$passed $failed $skipped: ${{failures[*]-}}"
    """
    result = run("bash", "-c", script)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_results_are_counted():
    assert totals_of(RESULTS, 8) == "3 1 1: worker.bad (pretended)"


def test_results_without_failures():
    fine = RESULTS.replace('failures="1"', 'failures="0"').replace('status="fail"', 'status="run"')
    assert totals_of(fine, 0) == "4 0 1: "
    # Something else went wrong, for example a test whose program is missing.
    assert totals_of(fine, 8) == "4 1 1: tests of preset pretended: ctest exited with 8"


def test_missing_results_are_a_failure():
    assert totals_of("", 1) == "0 1 0: tests of preset pretended: ctest wrote no results"


def test_python_must_be_usable():
    result = shell("LONGSPAN_PYTHON=/bin/false find_python")
    assert result.returncode == 0
    assert "/bin/false" not in result.stdout
