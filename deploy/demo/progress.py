"""Progress of the main job: a bar on a terminal, plain lines elsewhere."""

import sys
import time

_BAR_WIDTH = 24
_SECONDS_BETWEEN_LINES = 10.0


def say(text: str = "") -> None:
    """One line for the reader, at once."""
    print(text, flush=True)


def headline(text: str) -> None:
    say()
    say(f"== {text}")


def table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell; the first is text, the others are figures."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        say("  " + "  ".join(cells))


class Progress:
    """How far a piece of work is: `with Progress("Filling", 128, "windows") as bar: bar.advance()`.
    Work with a `limit`, in seconds, ends there, done or not."""

    def __init__(self, title: str, total: float, unit: str, limit: float = float("inf")):
        self.title = title
        self.limit = limit
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._terminal = sys.stdout.isatty()
        self._start = self._last = time.monotonic()

    def __enter__(self):
        if not self._terminal:
            say(f"  {self.title} ...")
        return self

    def __exit__(self, failure_type, *_):
        if self._terminal:
            sys.stdout.write("\r\033[K")
        if failure_type is None:
            say(f"  {self.title}: {self._amount()} in {self.seconds:.1f} s")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`note` says what was done last."""
        self.done += amount
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        line = f"  {self.title} {self._bar()} {self._amount()}, {self.seconds:.0f} s"
        if 0 < self.done < self.total:
            whole = min(self.seconds * self.total / self.done, self.limit)
            line += f", {max(0.0, whole - self.seconds):.0f} s left"
        if note:
            line += f" ({note})"
        if self._terminal:
            sys.stdout.write(f"\r\033[K{line[:120]}")
            sys.stdout.flush()
        else:
            say(line)

    def _amount(self) -> str:
        done = f"{self.done:,.0f}"
        if self.done < self.total:
            done += f" of {self.total:,.0f}"
        return f"{done} {self.unit}"

    def _bar(self) -> str:
        filled = round(_BAR_WIDTH * min(1.0, self.done / self.total))
        return "[" + "#" * filled + "." * (_BAR_WIDTH - filled) + "]"
