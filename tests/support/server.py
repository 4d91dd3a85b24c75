"""A real `longspan serve` process for tests and tools: starts on free ports, waits for the ready
line, and terminates with SIGTERM. The binary is $LONGSPAN_BINARY, else the newest of
build/*/bin/longspan.
"""

import os
import pathlib
import queue
import re
import signal
import subprocess
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
READY = re.compile(r"serving on (\S+) \(metrics on ([^)]+)\)")


def binary() -> str:
    """Path of the `longspan` command under test."""
    named = os.environ.get("LONGSPAN_BINARY")
    if named:
        return named
    built = sorted(ROOT.glob("build/*/bin/longspan"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise FileNotFoundError("no build/*/bin/longspan: build the target `longspan` first")
    return str(built[-1])


class Server:
    """One server process. `address` and `metrics_address` are host:port, `log` is its output."""

    def __init__(self, *flags, env=None, command=None, start_timeout=60.0):
        self.log = []
        arguments = [command or binary(), "serve", "--port", "0", "--metrics-port", "0"]
        self.process = subprocess.Popen(
            arguments + [str(flag) for flag in flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        # The reader lives as long as the process, so that a full pipe never blocks the server.
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address, self.metrics_address = self._wait_until_ready(start_timeout)

    def _read(self):
        for line in self.process.stdout:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def _wait_until_ready(self, timeout):
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise TimeoutError(f"not ready after {timeout} s:\n{''.join(self.log)}") from None
            if line is None:
                code = self.process.wait()
                raise RuntimeError(f"the server exited with {code}:\n{''.join(self.log)}")
            ready = READY.search(line)
            if ready:
                return ready.group(1), ready.group(2)

    def terminate(self, timeout=60.0) -> int:
        """Asks the server to drain and returns its exit code; safe to call again."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._reader.join(timeout)
        return code

    def kill(self):
        """Ends the process at once, as a crash would."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.terminate()
