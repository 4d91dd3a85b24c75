"""The `longspan` command: exit codes, JSON shapes, help, completion, and what it changes."""

import json
import os
import re
import shutil
import subprocess

import longspan
import numpy
import pytest
from conftest import ROOT
from server import binary


def shape(layers=2, kv_heads=2):
    return ["--layers", layers, "--query-heads", 4, "--kv-heads", kv_heads, "--head-dim", 64]


SHAPE = shape()


class Command:
    """Runs `longspan` against one server."""

    def __init__(self, address):
        self.address = address

    def __call__(self, *arguments, code=0, env=None):
        done = subprocess.run(
            [binary(), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "LONGSPAN_SERVER": self.address, **(env or {})},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def json(self, *arguments, code=0):
        return json.loads(self(*arguments, "-o", "json", code=code).stdout)


@pytest.fixture
def run(server, client):
    return Command(server.address)


def fill(client, context_id, tokens, rng):
    context = client.context(context_id)
    for layer in range(2):
        rows = rng.standard_normal((tokens, 2, 64)).astype(numpy.float32)
        context.append(layer, rows, rows, 0)


# ---- Contexts -----------------------------------------------------------------------------------


def test_the_life_of_a_context(run, client, rng):
    made = run.json(
        *["context", "create", "one", *SHAPE, "--method", "dense", "--method", "quest"],
        *["--default-method", "quest", "--label", "team=blue", "--ttl", "500"],
    )
    assert made["context_id"] == "one"
    assert made["committed_length"] == 0
    assert made["layer_lengths"] == [0, 0]
    spec = made["spec"]
    assert (spec["num_layers"], spec["num_query_heads"], spec["num_kv_heads"]) == (2, 4, 2)
    assert (spec["key_head_dim"], spec["kv_dtype"]) == (64, "bf16")
    assert spec["methods"] == ["dense", "quest"]
    assert spec["default_method"] == "quest"
    assert spec["labels"] == {"team": "blue"}
    assert spec["ttl_seconds"] == 500
    assert made["expire_time"] and made["create_time"].endswith("Z")

    fill(client, "one", 300, rng)
    forked = run.json("context", "fork", "one", 130, "--new-id", "two")
    assert (forked["context_id"], forked["committed_length"]) == ("two", 130)
    assert run.json("context", "truncate", "one", 128)["layer_lengths"] == [128, 128]
    assert {item["context_id"] for item in run.json("context", "list")} == {"one", "two"}
    assert run.json("context", "get", "two")["kv_bytes"] > 0
    run("context", "delete", "one", "two")
    assert run.json("context", "list") == []


def test_tables_are_for_people(run):
    run("context", "create", "seen", *SHAPE, "--method", "dense")
    listed = run("context", "list").stdout.splitlines()
    assert re.match(r"ID +TOKENS +LAYERS", listed[0])
    assert listed[1].startswith("seen ")
    shown = run("context", "get", "seen").stdout
    assert re.search(r"^heads +4 query, 2 key-value$", shown, re.MULTILINE)


def test_a_method_file_is_enough_for_a_method(run, tmp_path):
    path = tmp_path / "mine.txtpb"
    path.write_text("branches { selection { kind: KIND_NONE } mask { window_tokens: 16 } }")
    made = run.json("context", "create", "own", *SHAPE, "--method", path)
    assert made["spec"]["methods"] == ["mine"]


# ---- Exit codes ---------------------------------------------------------------------------------


def test_exit_codes(run, tmp_path):
    run("context", "create", "taken", *SHAPE)
    run(code=2)
    run("nonsense", code=2)
    run("context", "create", *shape(layers=-1), code=2)
    run("context", "create", *SHAPE, "--kv-dtype", "int3", code=2)
    run("context", "create", "spaces are refused", *SHAPE, code=2)
    run("context", "get", "nowhere", code=3)
    run("context", "create", *SHAPE, "--method", "nonsense", code=3)
    run("context", "create", "taken", *SHAPE, "--kv-dtype", "fp32", code=4)
    run("--server", "localhost:1", "context", "list", code=5)
    path = tmp_path / "later.txtpb"
    path.write_text("branches { summary { kind: KIND_LOW_BIT } selection { kind: KIND_TOP_P } }")
    run("context", "create", *SHAPE, "--method", path, code=7)
    run("context", "delete", "nowhere", code=3)
    run("context", "delete", "nowhere", "--allow-missing")


def test_a_full_server_is_exit_code_6(run):
    refused = run("bench", *SHAPE, "--tokens", 1 << 21, "--quiet", code=6)
    assert "hint:" in refused.stderr
    assert run.json("context", "list") == []


def test_errors_say_what_to_do(run):
    refused = run("context", "get", "nowhere", code=3)
    assert refused.stdout == ""
    assert refused.stderr.startswith("longspan: NOT_FOUND: ")
    assert "hint: `longspan context list`" in refused.stderr
    assert "longspan serve" in run("--server", "localhost:1", "context", "list", code=5).stderr
    assert "there is no `creat` here" in run("context", "creat", code=2).stderr
    assert "Run `longspan context create --help`" in run("context", "create", code=2).stderr


def test_errors_as_json(run):
    refused = run("context", "create", *shape(kv_heads=3), "-o", "json", code=2)
    error = json.loads(refused.stderr)["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert any("num_kv_heads" in violation["field"] for violation in error["field_violations"])
    assert {"message", "reason", "metadata", "hint"} <= set(error)


def test_help_lists_the_exit_codes(run):
    text = run("--help").stdout
    for code in range(8):
        assert re.search(rf"^  {code}  \S", text, re.MULTILINE)
    for words in (["serve"], ["context", "create"], ["methods", "check"], ["explain"], ["bench"]):
        assert "Usage: longspan" in run(*words, "--help").stdout


# ---- Methods ------------------------------------------------------------------------------------


def test_methods_are_listed_shown_and_checked(run, tmp_path):
    listed = {method["name"]: method for method in run.json("methods", "list")}
    assert [name for name, method in listed.items() if method["default"]]
    assert listed["nsa"]["needs_gates"] and not listed["quest"]["needs_gates"]
    assert listed["superlinear"]["needs_search_query"]
    assert "quest" in run("methods", "list").stdout

    text = run("methods", "show", "quest").stdout
    assert longspan.parse_method(text).name == "quest"
    assert run.json("methods", "show", "quest")["branches"][0]["summary"]["block_tokens"] == 16

    files = sorted((ROOT / "deploy" / "methods").glob("*.txtpb"))
    checked = run.json("methods", "check", *files)
    assert [check["file"] for check in checked] == list(map(str, files))
    assert all(check["accepted"] for check in checked)
    assert all(check["kv_bytes_per_token"] == 2 * 2 * 2 * 64 for check in checked)

    later = tmp_path / "later.txtpb"
    later.write_text("branches { selection { kind: KIND_TOP_P } }")
    (refused,) = run.json("methods", "check", later, code=7)
    assert not refused["accepted"]
    assert all(reason["code"] == "UNIMPLEMENTED" for reason in refused["reasons"])
    broken = tmp_path / "broken.txtpb"
    broken.write_text("branches {\n  nonsense: 1\n}")
    assert "broken.txtpb:2:" in run("methods", "check", later, broken, code=2).stdout


# ---- Explain ------------------------------------------------------------------------------------


def test_explain(run, client, rng, tmp_path):
    run("context", "create", "full", *SHAPE, "--method", "dense", "--method", "window",
        "--method", "nsa", "--method", "superlinear", "--kv-dtype", "fp32")  # fmt: skip
    fill(client, "full", 2000, rng)
    query = tmp_path / "query.npy"
    numpy.save(query, rng.standard_normal((4, 64)).astype(numpy.float32))
    near = tmp_path / "near.txtpb"
    near.write_text("branches { mask { window_tokens: 100 sink_tokens: 4 } }")
    answer = run.json("explain", "full", "--query", query, "--method", near, "--layer", 1,
                      "--position", 1500, "--compare-with-dense")  # fmt: skip
    assert answer["method"] == "near"
    assert len(answer["recall"]) == len(answer["relative_error"]) == 4
    assert answer["read_fraction"] == pytest.approx(104 / 1501)
    assert all(0 < recall < 1 for recall in answer["recall"])
    assert {row["query_head"] for row in answer["selections"]} == {0, 1, 2, 3}
    row = answer["selections"][0]
    assert row["position"] == 1500
    assert row["num_tokens"] == sum(span["end"] - span["begin"] for span in row["spans"])
    assert all(span["mass"] is not None for span in row["spans"])

    same = run.json("explain", "full", "--seed", 3)
    assert same == run.json("explain", "full", "--seed", 3)
    one = run.json("explain", "full", "--head", 2)["selections"]
    assert {row["query_head"] for row in one} == {2}
    table = run("explain", "full", "--compare-with-dense").stdout
    assert re.match(r"POSITION +HEAD +BRANCH +TOKENS +RECALL +ERROR +SPANS", table)
    for name in ("nsa", "superlinear"):  # gates and search queries are made up
        assert run.json("explain", "full", "--method", name)["method"] == name


def test_explain_refuses_other_files(run, client, rng, tmp_path):
    run("context", "create", "full", *SHAPE)
    fill(client, "full", 10, rng)
    half = tmp_path / "half.npy"
    numpy.save(half, rng.standard_normal((1, 4, 64)).astype(numpy.float16))
    run("explain", "full", "--query", half)
    cases = {
        "double": rng.standard_normal((4, 64)),
        "flat": numpy.ones(4, dtype=numpy.float32),
        "fortran": numpy.asfortranarray(numpy.ones((4, 64), dtype=numpy.float32)),
    }
    for name, array in cases.items():
        path = tmp_path / f"{name}.npy"
        numpy.save(path, array)
        assert f"{name}.npy: " in run("explain", "full", "--query", path, code=2).stderr
    whole = half.read_bytes()
    for size in (0, 5, 9, 11, 60, len(whole) - 1):
        half.write_bytes(whole[:size])
        assert "half.npy: " in run("explain", "full", "--query", half, code=2).stderr
    run("explain", "full", "--query", tmp_path / "missing.npy", code=2)


# ---- Bench --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unary", [False, True])
def test_bench_measures_and_cleans_up(run, unary):
    done = run("bench", *SHAPE, "--tokens", 6000, "--steps", 5, "--warmup", 2, "--method", "dense",
               "--method", "quest", "-o", "json", *(["--unary"] if unary else []))  # fmt: skip
    answer = json.loads(done.stdout)
    assert [result["method"] for result in answer["results"]] == ["dense", "quest"]
    for result in answer["results"]:
        assert result["calls"] == 10
        assert 0 < result["p50_us"] <= result["p90_us"] <= result["p99_us"]
        assert result["tokens_per_second"] == pytest.approx(1e6 / (2 * result["mean_us"]))
    assert answer["results"][0]["read_fraction"] == pytest.approx(1)
    assert answer["fill"]["bytes"] == 6000 * 2 * 2 * 2 * 64 * 2
    assert answer["context"]["tokens"] == 6000
    # Plain lines off a terminal.
    assert "\r" not in done.stderr and "fill" in done.stderr and "decode quest" in done.stderr
    assert run.json("context", "list") == []


def test_bench_prints_a_table(run):
    done = run("bench", "--tokens", 500, "--steps", 2, "--warmup", 0, "--quiet")
    assert done.stderr == ""
    assert re.search(r"^METHOD +P50 us +P90 us +P99 us", done.stdout, re.MULTILINE)


# ---- Configuration ------------------------------------------------------------------------------


def test_config_print_can_be_read_back(run, tmp_path):
    printed = run("config", "print", "--ranks", 3, env={"LONGSPAN_BACKEND": "reference"}).stdout
    path = tmp_path / "serve.conf"
    path.write_text(printed)
    values = run.json("config", "print", "--config", path)
    assert (values["ranks"], values["backend"]) == ("3", "reference")
    assert run.json("config", "print", "--config", path, "--ranks", 2)["ranks"] == "2"
    assert run.json("config", "check", path) == {"valid": True, "errors": []}


def test_config_check_reports_every_error(run, tmp_path):
    path = tmp_path / "serve.conf"
    path.write_text("ranks = many\nnonsense = 1\nport = 99999\n")
    refused = run.json("config", "check", path, code=2)
    assert not refused["valid"]
    places = [error["where"] for error in refused["errors"]]
    assert places == [f"{path}:{line}" for line in (1, 2, 3)]
    run("serve", "--config", path, code=2)
    run("config", "check", tmp_path / "missing.conf", code=2)


# ---- Completion and version ---------------------------------------------------------------------


def test_completion_knows_commands_options_values_contexts_and_methods(run):
    run("context", "create", "known", *SHAPE)

    def complete(*words):
        return run("__complete", *words).stdout.split()

    assert {"bench", "completion", "config", "context", "explain", "methods", "serve"} <= set(
        complete("")
    )
    assert complete("context", "l") == ["list"]
    assert complete("context", "create", "--kv-") == ["--kv-dtype", "--kv-heads"]
    assert complete("context", "create", "--kv-dtype", "") == ["bf16", "fp16", "fp32"]
    assert complete("-o", "j") == ["json"]
    assert complete("context", "get", "") == ["known"]
    assert "quest" in complete("context", "create", "--method", "")
    assert complete("serve", "--backend", "s") == ["simd"]
    assert complete("--server", "localhost:1", "context", "get", "no-such-") == []


def test_completion_in_bash(run):
    script = f"""
        PATH={os.path.dirname(binary())}:$PATH
        source <(longspan completion bash)
        COMP_WORDS=(longspan methods s) COMP_CWORD=2
        _longspan
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["show"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_parse(run, shell):
    script = run("completion", shell).stdout
    assert "longspan __complete" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_version(run):
    assert run("version").stdout == f"longspan {longspan.__version__}\n"
    assert run.json("version") == {"version": longspan.__version__}
