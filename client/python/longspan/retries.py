"""Repeats calls that the server refuses for a while. Every call of the service is safe to repeat."""

from __future__ import annotations

import random
import time
import typing

import grpc

from longspan.errors import Error, from_rpc_error

_FIRST_BACKOFF_SECONDS = 0.02
_LAST_BACKOFF_SECONDS = 1.0

Result = typing.TypeVar("Result")


class Retries(typing.NamedTuple):
    """timeout: seconds that a call may take with all its repeats, None for no limit of the
    client's. retry_for: seconds during which refused attempts are repeated."""

    timeout: float | None
    retry_for: float

    def call(self, attempt: typing.Callable[[float | None], Result]) -> Result:
        """`attempt` gets the seconds that are left and raises grpc.RpcError or Error."""
        start = time.monotonic()
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            elapsed = time.monotonic() - start
            try:
                return attempt(None if self.timeout is None else max(0.0, self.timeout - elapsed))
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
            except Error as failure:
                error = failure
            # Jitter, so that clients that were refused together do not come back together.
            delay = (error.retry_delay or backoff) * random.uniform(1.0, 1.25)
            end = time.monotonic() - start + delay
            late = end > self.retry_for or (self.timeout is not None and end > self.timeout)
            if not error.retryable or late:
                raise error
            time.sleep(delay)
            backoff = min(2 * backoff, _LAST_BACKOFF_SECONDS)
