"""Proves the engine: each planted bug is caught by the scenario or drill that is there for it."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from functools import partial

from .connectors.planted import NOT_WRONG, PLANTED, PLANTED_FOR_DRILLS
from .drill.command import REFERENCE_DAEMON
from .drill.run import Plan
from .runner import Job, run_jobs, run_one
from .scenarios import Options

SECONDS_TO_HIT = 1.5
IMPATIENT = Options(hit_seconds=SECONDS_TO_HIT, patience_s=SECONDS_TO_HIT)


def prove(seeds: int, workers: int) -> int:
    """The number of planted bugs that were not caught as they must be, and of faults seen where there is none."""
    begin = time.monotonic()
    found: dict[str, set[str]] = defaultdict(set)
    for outcome in run_jobs(_scenarios(seeds) + _drills(), workers):
        found[outcome.name] |= {violation.kind for violation in outcome.violations}
    every = PLANTED | PLANTED_FOR_DRILLS
    missed = 0
    for name, bug in every.items():
        if caught := found[name] & {bug.kind, bug.or_as}:
            print(f"caught {name}: {bug.scenario}, {', '.join(sorted(caught))}")
        else:
            missed += 1
            print(f"MISSED {name}: {bug.scenario} saw {sorted(found[name]) or 'nothing'}, not {bug.kind}")
    wrongly = [name for name in NOT_WRONG if found[name]]
    for name in wrongly:
        print(f"WRONGLY caught {name}: {sorted(found[name])}")
    print(f"{len(every) - missed} of {len(every)} planted bugs caught, {time.monotonic() - begin:.1f} s")
    return missed + len(wrongly)


def _scenarios(seeds: int) -> list[Job]:
    jobs = []
    for name, bug in (PLANTED | NOT_WRONG).items():
        options = dataclasses.replace(
            IMPATIENT, module="fake_engine.connectors.planted", scheduler_class=bug.scheduler,
            worker_class=bug.worker, **bug.options,
        )
        jobs += [Job(name, seed, partial(run_one, options, bug.scenario, seed)) for seed in range(seeds)]
    return jobs


def _drills() -> list[Job]:
    jobs = []
    for name, bug in PLANTED_FOR_DRILLS.items():
        options = dataclasses.replace(
            IMPATIENT, module="fake_engine.connectors.with_daemon", scheduler_class=bug.scheduler,
            worker_class=bug.worker, server_url="{socket}",
            patience_s=bug.options.get("patience_s", SECONDS_TO_HIT),
        )
        for number in bug.options["callbacks"]:
            jobs.append(Job(name, number, Plan(options, REFERENCE_DAEMON, bug.scenario, number).run))
    return jobs
