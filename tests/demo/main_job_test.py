"""The main job at its small size: it runs through, its report stands alone, and its figures make sense."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "tests" / "support"))

from server import binary


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(what the job printed, its report, its figures)"""
    report = tmp_path_factory.mktemp("job") / "report" / "index.html"
    command = [sys.executable, str(ROOT / "deploy/demo/run.py"), "--quick"]
    command += ["--server", binary(), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(report.with_name("figures.json").read_text(encoding="utf-8"))
    return done.stdout, report.read_text(encoding="utf-8"), figures


def test_report_stands_alone(job):
    _, report, _ = job
    assert report.count("<svg") == 5
    # Nothing is loaded from elsewhere: links inside the page and embedded pictures only. Names of XML
    # namespaces look like addresses, but are not fetched.
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', report):
        assert attribute.startswith(("#", "data:")), attribute
    assert "<script" not in report and "@import" not in report
    assert "axes_" in report and "context length (tokens)" in report and "ms" in report


def test_dense_through_the_service_is_the_models_own_attention(job):
    _, _, figures = job
    methods = {method["label"]: method for method in figures["reading"]["methods"]}
    dense = methods["dense"]
    assert dense["answer"] == methods["PyTorch SDPA"]["answer"]
    assert dense["top1_agreement"] == 1.0
    assert abs(dense["kl_nats"]) < 1e-6
    assert dense["fraction_read"] == pytest.approx(1.0)


def test_sparse_methods_read_less(job):
    _, _, figures = job
    for method in figures["reading"]["methods"]:
        if method["family"] not in ("sdpa", "dense"):
            assert 0 < method["fraction_read"] <= 1
            assert 0 <= method["top1_agreement"] <= 1
            assert math.isfinite(method["kl_nats"])
    for point in figures["million"]["accuracy"]:
        assert 0 < point["fraction_read"] < 0.6
        assert 0 < point["recall_p10"] <= point["recall_mean"] <= 1
        assert 0 <= point["error_mean"] < 2
        assert 0 < point["p50_ms"] <= point["p90_ms"]


def test_a_larger_budget_captures_more(job):
    _, _, figures = job
    points = [point for point in figures["million"]["accuracy"] if point["family"] == "quest"]
    recalls = [point["recall_mean"] for point in points]
    assert len(recalls) > 1 and recalls == sorted(recalls)
    # No choice of the same number of pages can hold more than the best one.
    best = {point["budget_tokens"]: point["recall_mean"] for point in figures["million"]["check"]["best_recall"]}
    for point in points:
        assert point["recall_mean"] <= best[point["budget_tokens"]] + 1e-3


def test_dense_is_checked_with_pytorch(job):
    _, _, figures = job
    assert figures["million"]["check"]["error_max"] < 4e-3
    assert figures["million"]["check"]["lse_difference_max"] < 1e-3


def test_selection_map_names_every_head(job):
    _, _, figures = job
    million = figures["million"]
    heads = {(head["layer"], head["head"]) for head in million["map"]["heads"]}
    assert heads == {(layer, head) for layer in million["layers"] for head in range(million["query_heads"])}
    for head in million["map"]["heads"]:
        mass = sum(span[2] for span in head["spans"])
        assert mass == pytest.approx(head["recall"], abs=2e-2)


def test_progress_is_plain_lines_off_a_terminal(job):
    printed, _, figures = job
    assert "\r" not in printed and "\033" not in printed
    assert f"{figures['million']['distinct_tokens']:,} distinct tokens" in printed
