"""The server of the main job: a `longspan serve` process of its own on free ports."""

import pathlib
import queue
import re
import signal
import subprocess
import threading
import time
import typing
import urllib.request

import longspan

_READY = re.compile(r"serving on (\S+) \(metrics on ([^)]+)\)")
_START_SECONDS = 60.0
# As a server without a deadline in the call would allow; a million tokens in one dense call fit easily.
_CALL_SECONDS = 120.0


class TokensRead(typing.NamedTuple):
    """Keys attended to and keys visible, summed over rows and query heads since the server's start."""

    selected: float
    visible: float

    def fraction_since(self, earlier: "TokensRead") -> float:
        """The share of the visible keys that was read since `earlier`."""
        visible = self.visible - earlier.visible
        return (self.selected - earlier.selected) / visible if visible else float("nan")


class Service:
    """Starts the server and connects to it; as a context manager it stops both."""

    def __init__(self, binary: str, log: pathlib.Path, ranks: int, kv_gibibytes: int):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w", encoding="utf-8")
        command = [binary, "serve", "--port", "0", "--metrics-port", "0"]
        command += ["--ranks", str(ranks), "--kv-capacity", f"{kv_gibibytes}GiB"]
        self.command = " ".join(["longspan", *command[1:]])
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._ready: queue.Queue = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        address, self._metrics_address = self._wait()
        self.client = longspan.Client(address, timeout=_CALL_SECONDS)

    def _read(self) -> None:
        for line in self._process.stdout:
            self._log.write(line)
            self._log.flush()
            ready = _READY.search(line)
            if ready:
                self._ready.put(ready.groups())
        self._ready.put(None)

    def _wait(self) -> tuple[str, str]:
        deadline = time.monotonic() + _START_SECONDS
        try:
            ready = self._ready.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            ready = None
        if ready is None:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"the server did not start; see {self._log.name}")
        return ready

    def tokens_read(self) -> TokensRead:
        """From the server's metrics."""
        with urllib.request.urlopen(f"http://{self._metrics_address}/metrics") as answer:
            lines = answer.read().decode().splitlines()

        def total(name: str) -> float:
            samples = [line for line in lines if re.match(name + r"[ {]", line)]
            return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

        return TokensRead(
            total("longspan_selected_tokens_total"), total("longspan_candidate_tokens_total")
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._reader.join()
        self._log.close()
