"""One real server for the tests of the clients, and fresh random numbers with the seed printed."""

import os
import pathlib
import secrets
import sys

import longspan
import numpy
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from server import Server  # noqa: E402


@pytest.fixture(scope="session")
def server():
    with Server("--ranks", 2, "--kv-capacity", "512MiB") as process:
        yield process


@pytest.fixture
def client(server):
    with longspan.Client(server.address) as connection:
        yield connection
        for context in list(connection.contexts()):
            connection.context(context.context_id).delete(allow_missing=True)


@pytest.fixture
def rng():
    seed = int(os.environ.get("LONGSPAN_TEST_SEED", secrets.randbits(32)))
    print(f"LONGSPAN_TEST_SEED={seed}")
    return numpy.random.default_rng(seed)
