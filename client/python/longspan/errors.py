"""One exception for every refusal of the server, whether a call failed or one item of a batch."""

from __future__ import annotations

import typing

import grpc
from google.rpc import error_details_pb2, status_pb2

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class FieldViolation(typing.NamedTuple):
    """One field of the request that the server refused, and why."""

    field: str
    description: str


class Error(Exception):
    """What the server answered instead of a result.

    code: grpc.StatusCode. reason: stable upper-case word, empty when the server gave none.
    metadata: what belongs to the reason, such as `expected_pos`. retry_delay: seconds after which
    the same call may succeed, None when the server does not say so. field_violations and
    quota_violations name what was wrong with the request.
    """

    def __init__(self, status: status_pb2.Status):
        self.code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        self.message = status.message
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.retry_delay: float | None = None
        self.field_violations: list[FieldViolation] = []
        self.quota_violations: list[FieldViolation] = []
        for detail in status.details:
            self._read_detail(detail)
        super().__init__(f"{self.code.name}: {self.message}")

    def _read_detail(self, detail) -> None:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            self.reason = info.reason
            self.metadata = dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            self.retry_delay = retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest.FromString(detail.value)
            self.field_violations = [
                FieldViolation(violation.field, violation.description)
                for violation in request.field_violations
            ]
        elif detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
            quota = error_details_pb2.QuotaFailure.FromString(detail.value)
            self.quota_violations = [
                FieldViolation(violation.subject, violation.description)
                for violation in quota.violations
            ]

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later: the server is away, or says how long to wait.
        Every call of the service is safe to repeat."""
        return self.code == grpc.StatusCode.UNAVAILABLE or self.retry_delay is not None


def from_rpc_error(failure: grpc.RpcError) -> Error:
    """The error that a failed call carries in its trailing metadata, or its bare code."""
    for key, value in failure.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            if status.code == failure.code().value[0]:
                return Error(status)
    return Error(status_pb2.Status(code=failure.code().value[0], message=failure.details() or ""))
