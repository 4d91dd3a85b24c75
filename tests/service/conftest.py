"""Real servers over real gRPC, and fresh random numbers with the seed printed."""

import os
import pathlib
import secrets
import sys

import numpy
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT / "tests" / "service"))

from calls import Stubs  # noqa: E402
from server import Server  # noqa: E402


@pytest.fixture(scope="session")
def server():
    with Server("--ranks", 2, "--kv-capacity", "256MiB", "--log-level", "debug") as process:
        yield process


@pytest.fixture
def stubs(server):
    connection = Stubs(server.address)
    yield connection
    connection.close()


@pytest.fixture
def start():
    """Starts servers with flags of the test's own, and ends them with it."""
    servers = []

    def begin(*flags, **options):
        servers.append(Server("--kv-capacity", "64MiB", *flags, **options))
        return servers[-1]

    yield begin
    for process in servers:
        process.terminate()


@pytest.fixture
def connect():
    """Stubs for any address, closed with the test."""
    connections = []

    def begin(address):
        connections.append(Stubs(address))
        return connections[-1]

    yield begin
    for connection in connections:
        connection.close()


@pytest.fixture
def rng():
    seed = int(os.environ.get("LONGSPAN_TEST_SEED", secrets.randbits(32)))
    print(f"LONGSPAN_TEST_SEED={seed}")
    return numpy.random.default_rng(seed)
