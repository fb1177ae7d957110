"""Commands: run scenarios, check the golden call counts, drill the daemon, and prove the engine on planted bugs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .config import ConnectorNames
from .drill import command as drill_command
from .drill.daemon import Daemon
from .faults import Violation
from .golden import golden, golden_of
from .load import SETUPS, Load, load, percentile
from .prove import prove
from .runner import names, run_many
from .scenarios import ONLY, REGISTRY, Options


def main() -> None:
    arguments = _parser().parse_args()
    if getattr(arguments, "device", "cpu").startswith("cuda"):
        # Once, instead of in each rank: they are forked. CUDA itself begins in the ranks.
        importlib.import_module("torch")
    raise SystemExit(arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fake_engine",
        description="A stand-in for TensorRT-LLM's executor that drives KV cache connectors and checks every byte.",
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run scenarios with a connector")
    connector_arguments(run)
    run.add_argument("--scenario", default="all", help="a name, several with commas, or all (see `list`)")
    run.add_argument("--seeds", type=int, default=20, help="so many seeds [default: 20]")
    run.add_argument("--first-seed", type=int, default=0, help="the first of them [default: 0]")
    run.add_argument("--seed", type=int, help="this seed only")
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="scenarios at a time")
    run.add_argument("--seconds", type=float, help="begin no more after so long, and say how many were left out")
    run.add_argument("--timings", action="store_true", help="print percentiles of each callback")
    run.add_argument("--daemon-command", help="start this daemon first; {socket}, {state} and {python} are filled in")
    run.set_defaults(command=_run)
    listed = commands.add_parser("list", help="list the scenarios")
    listed.set_defaults(command=_list)
    planted = commands.add_parser("prove", help="show that planted bugs are caught")
    planted.add_argument("--seeds", type=int, default=3, help="seeds per bug")
    planted.add_argument("--workers", type=int, default=os.cpu_count())
    planted.set_defaults(command=lambda arguments: 1 if prove(arguments.seeds, arguments.workers) else 0)
    drills = commands.add_parser("drill", help="strike the daemon at every callback")
    connector_arguments(drills)
    drill_command.add_arguments(drills)
    drills.set_defaults(command=lambda arguments: 1 if drill_command.drill(options_of(arguments), arguments) else 0)
    loads = commands.add_parser("load", help="time the callbacks at many concurrent requests")
    connector_arguments(loads)
    loads.add_argument("--requests", type=int, default=Load.requests)
    loads.add_argument("--long-blocks", type=int, default=Load.long_blocks, help="blocks of four of the prompts")
    loads.add_argument("--setup", choices=list(SETUPS), action="append", help="this one only [default: each]")
    loads.add_argument("--rounds", type=int, default=Load.rounds, help="engines one after another, the first cold")
    loads.add_argument("--daemon-command", help="start this daemon first, as in run")
    loads.set_defaults(command=_load)
    counts = commands.add_parser("golden", help="check the call counts that upstream's tests pin")
    connector_arguments(counts)
    counts.add_argument("--daemon-command", help="start this daemon first, and count with --connector, as in run")
    counts.set_defaults(command=_golden)
    return parser


def connector_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connector", default="fake_engine.connectors.reference", help="module of the connector")
    parser.add_argument("--scheduler-class", default="Scheduler")
    parser.add_argument("--worker-class", default="Worker")
    parser.add_argument("--server-url", help="kv_connector_config.server_url [default: a directory per scenario]")
    parser.add_argument("--api", choices=["L1", "L2"], default="L1", help="one flat pool, or layer groups")
    parser.add_argument("--import-path", choices=["old", "new"], help="where the classes are [default: by seed]")
    parser.add_argument("--overlap", action="store_true", help="the overlap scheduler")
    parser.add_argument("--tp", type=int, choices=[1, 2], default=1, help="ranks, each a process")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:N for torch tensors")
    parser.add_argument("--no-cache", action="store_true", help="the cache is away: nothing needs to be found")
    parser.add_argument("--hit-seconds", type=float, default=10.0, help="how late a hit may come")
    parser.add_argument(
        "--patience-seconds", type=float, default=20.0, help="how long a request may take, on a machine that is busy"
    )


@contextmanager
def _daemon(arguments: argparse.Namespace) -> Iterator[Options]:
    """The options, with the address of a daemon that runs meanwhile where one was asked for."""
    options = options_of(arguments)
    if not arguments.daemon_command:
        yield options
        return
    # Not a TemporaryDirectory: ranks run exit functions, and theirs would remove it.
    directory = tempfile.mkdtemp(prefix="fake-engine-")
    daemon = Daemon(arguments.daemon_command, directory)
    try:
        daemon.start()
        url = (options.server_url or "{socket}").format(socket=daemon.socket, state=daemon.state)
        yield dataclasses.replace(options, server_url=url)
    finally:
        daemon.close()
        shutil.rmtree(directory, ignore_errors=True)


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(
        module=arguments.connector,
        scheduler_class=arguments.scheduler_class,
        worker_class=arguments.worker_class,
        server_url=arguments.server_url,
        api=arguments.api,
        import_path=arguments.import_path,
        overlap=arguments.overlap,
        ranks=arguments.tp,
        device=arguments.device,
        cache=not arguments.no_cache,
        hit_seconds=arguments.hit_seconds,
        patience_s=arguments.patience_seconds,
    )


def _run(arguments: argparse.Namespace) -> int:
    with _daemon(arguments) as options:
        return _run_with(options, arguments)


def _run_with(options: Options, arguments: argparse.Namespace) -> int:
    first = arguments.first_seed
    seeds = [arguments.seed] if arguments.seed is not None else list(range(first, first + arguments.seeds))
    chosen = names(arguments.scenario, arguments.api)
    begin, failed, ended = time.monotonic(), 0, 0
    seconds: dict[str, list[float]] = {}
    jobs = [(name, seed) for seed in seeds for name in chosen]
    for outcome in run_many(options, jobs, arguments.workers, arguments.seconds):
        ended += 1
        for callback, values in outcome.seconds.items():
            seconds.setdefault(callback, []).extend(values)
        if outcome.violations:
            failed += 1
            print(f"FAILED {outcome.name} --seed {outcome.seed}: {_told(outcome.violations)}", flush=True)
    if arguments.timings:
        print_timings(seconds)
    left_out = f", {len(jobs) - ended} not begun" if ended < len(jobs) else ""
    print(f"{ended - failed} of {ended} passed{left_out}, {len(chosen)} scenarios, {time.monotonic() - begin:.1f} s")
    return 1 if failed else 0


def _told(violations: list[Violation]) -> str:
    first = "; ".join(str(violation) for violation in violations[:3])
    return first + (f"; and {len(violations) - 3} more" if len(violations) > 3 else "")


def print_timings(seconds: dict[str, list[float]]) -> None:
    for name, values in sorted(seconds.items()):
        p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
        print(
            f"{name:32} {len(values):8} calls  p50 {p50 * 1e6:9.1f} us  p99 {p99 * 1e6:9.1f} us"
            f"  most {max(values) * 1e6:9.1f} us"
        )


def _load(arguments: argparse.Namespace) -> int:
    size = Load(requests=arguments.requests, long_blocks=arguments.long_blocks, rounds=arguments.rounds)
    failed = 0
    for setup in arguments.setup or SETUPS:
        with _daemon(arguments) as options:
            timed = load(options, size, setup)
        print(f"set-up {setup}, whole callbacks")
        print_timings(timed.whole)
        own = {name: values for name, values in timed.connector.items() if values != timed.whole[name]}
        print(f"set-up {setup}, the connector's time where the engine's own get_tokens is in it; this is judged")
        print_timings(own)
        print(f"the cache gave {timed.offered} tokens")
        if timed.violations:
            print(f"FAILED {_told(timed.violations)}")
        over = timed.over_limit()
        print(f"connector's p99 over its limit: {', '.join(over) or 'none'}", flush=True)
        failed += bool(timed.violations or over)
    return 1 if failed else 0


def _golden(arguments: argparse.Namespace) -> int:
    if not arguments.daemon_command:
        return 1 if golden() else 0
    with _daemon(arguments) as options:
        names = ConnectorNames(options.module, options.scheduler_class, options.worker_class, options.server_url)
        return 1 if golden_of(names) else 0


def _list(arguments: argparse.Namespace) -> int:
    for name, scenario in REGISTRY.items():
        first = (scenario.__doc__ or "").strip().split("\n")[0]
        print(f"{name:22} {ONLY.get(name, 'L1 L2'):6} {first}", file=sys.stdout)
    return 0
