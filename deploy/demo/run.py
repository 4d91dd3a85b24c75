"""The main job: a real model reads a real text through Longspan. See --help; deploy/quickstart runs it."""

import argparse
import datetime
import pathlib
import signal
import sys
import time

import engine
import machine
import million
import progress
import reading
import report
import torch
import variants
from service import Service

_RANKS = 4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="the `longspan` command")
    parser.add_argument("--report", required=True, type=pathlib.Path, help="HTML file to write")
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    # As an exception, so that the server ends with the job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    start = time.monotonic()
    seconds = {}

    def finished(what: str, since: float) -> float:
        now = time.monotonic()
        seconds[what] = now - since
        return now

    progress.headline(f"The engine: {engine.MODEL_NAME}")
    llm = engine.Engine()
    verses = engine.read_text()
    progress.say(f"  {sum(p.numel() for p in llm.model.parameters()):,} parameters")
    now = finished("loading the model", start)
    log = arguments.report.with_name("server.log")
    with Service(arguments.server, log, _RANKS, kv_gibibytes=2 if arguments.quick else 6) as service:
        figures = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "quick": arguments.quick,
            "default": variants.default_variant().label,
            "machine": machine.describe(service, torch.get_num_threads()),
            "seconds": seconds,
        }
        now = finished("starting the server", now)
        figures["reading"] = reading.run(llm, service, verses, arguments.quick)
        now = finished("reading", now)
        figures["million"] = million.run(llm, service, verses, arguments.quick)
        finished("a million tokens", now)
    finished("in all", start)
    numbers = report.write(arguments.report, figures)
    progress.say()
    progress.say(f"Done in {seconds['in all']:.0f} s. Report: {arguments.report}. Figures: {numbers}.")


if __name__ == "__main__":
    main()
