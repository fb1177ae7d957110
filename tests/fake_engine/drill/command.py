"""`drill`: every fault at every callback."""

from __future__ import annotations

import argparse
import os
import time

from ..runner import Job, run_jobs
from .daemon import FAULTS
from .run import Plan, run

REFERENCE_DAEMON = "{python} -m fake_engine.connectors.reference_daemon {socket} {state}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(connector="fake_engine.connectors.with_daemon", server_url="{socket}")
    parser.add_argument("--daemon-command", default=REFERENCE_DAEMON, help="with {socket}, {state} and {python}")
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--every", type=int, default=1, help="at every Nth callback only [default: 1]")
    parser.add_argument("--first", type=int, default=0, help="the first of them [default: 0]")
    parser.add_argument("--last", type=int, help="the last of them [default: that of the quiet run]")
    parser.add_argument("--deadline-ms", type=float, default=20.0, help="what one callback may wait, once")
    parser.add_argument("--slack-ms", type=float, default=10.0, help="what a busy machine may add to it")
    parser.add_argument("--waits", type=int, default=1, help="callbacks that may wait until the connector stops asking")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="drills at a time")


def drill(options: object, arguments: argparse.Namespace) -> int:
    """The number of drills that failed."""
    begin = time.monotonic()

    def plan(fault: str | None, number: int = 0, rank: int = 0) -> Plan:
        return Plan(
            options, arguments.daemon_command, fault, number, rank,  # type: ignore[arg-type]
            deadline_ms=arguments.deadline_ms, slack_ms=arguments.slack_ms, waits=arguments.waits,
        )

    quiet = run(plan(None))
    if quiet.violations:
        print(f"FAILED without a fault: {quiet.violations[0]}")
        return 1

    def numbers(rank: int) -> range:
        last = quiet.callbacks[rank] - 1 if arguments.last is None else arguments.last
        return range(arguments.first, min(last + 1, quiet.callbacks[rank]), arguments.every)

    plans = [
        plan(fault, number, rank)
        for fault in arguments.faults.split(",")
        for rank in range(arguments.tp)
        for number in numbers(rank)
    ]
    failed = struck = 0
    for outcome in run_jobs([Job(each.name, each.seed, each.run) for each in plans], arguments.workers):
        struck += outcome.struck
        if outcome.violations:
            failed += 1
            print(f"FAILED {outcome.name}: {'; '.join(map(str, outcome.violations[:3]))}", flush=True)
    print(
        f"{len(plans) - failed} of {len(plans)} drills passed, {struck} struck,"
        f" {quiet.callbacks} callbacks of each rank, {time.monotonic() - begin:.1f} s"
    )
    return failed
