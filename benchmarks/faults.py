"""What the platform promises of streams, under faults: nothing lost, nothing twice, nothing stale, nothing torn.

    python benchmarks/faults.py [--json] [--quick] [--only real,recovery]

One machine, one disk; kills and truncation stand for power loss. Where nothing was found in n tries, the true rate is
below 3/n with 95% confidence; it is printed beside. The runs themselves live in tests/faults.
"""

import asyncio
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _report import Report, arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

SEED = 7


@dataclass(frozen=True, slots=True)
class Run:
    """What a section needs to know."""

    report: Report
    directory: Path
    is_quick: bool

    def count(self, full: int, quick: int) -> int:
        """How many of something."""
        return quick if self.is_quick else full


def simulated(run: Run) -> None:
    from simulation import simulate

    figures = simulate(run.count(10_000, 300), SEED)
    lossy = simulate(run.count(3_000, 100), SEED, loses=True)
    _say_violations(run, figures.violations + lossy.violations)
    run.report.add("faults_simulated", figures.num_faults + lossy.num_faults, _kinds(figures.faults_by_kind))
    run.report.add("acknowledged_bytes_lost_simulated", figures.acknowledged_bytes_lost, _bound(figures.num_faults))
    run.report.add("simulated_rollbacks_noticed", lossy.num_rollbacks_detected / lossy.num_rollbacks, "of all")


def exhaustive(run: Run) -> None:
    from exhaustive import FULL, SMALL, search

    figures = search(SMALL if run.is_quick else FULL, max_seconds=3000.0)
    _say_violations(run, [figures.violation] if figures.violation else [])
    run.report.add("exhaustive_states", figures.num_states, f"in {figures.seconds:.0f} s, depth {figures.depth}")
    run.report.add("exhaustive_is_closed", figures.is_closed, f"{figures.num_transitions} transitions")


def planted(run: Run) -> None:
    from planted_defects import DEFECTS, by_search, hunt

    found = [hunt(defect) for defect in DEFECTS]
    for caught in found:
        run.report.say(f"    {caught.defect}: {caught.finder or 'NOT FOUND'} in {caught.seconds:.1f} s")
    of_the_store = [defect for defect in DEFECTS if defect.layer == "store"]
    by_search_alone = [hunt(defect, {"search": by_search}) for defect in of_the_store[: run.count(len(DEFECTS), 5)]]
    run.report.add("planted_defects_caught", sum(bool(caught.finder) for caught in found), f"of {len(DEFECTS)}")
    run.report.add("planted_defects_found_by_search", sum(bool(c.finder) for c in by_search_alone), "by it alone")
    run.report.add(
        "planted_defect_median_seconds", statistics.median(caught.seconds for caught in found), "to find one"
    )


def real(run: Run) -> None:
    from store_faults import real_faults

    figures = asyncio.run(real_faults(run.count(320, 10), SEED))
    run.report.add("faults_real", figures.num_faults, _kinds(figures.faults_by_kind))
    lost = f"of {figures.acknowledged_bytes:,} bytes; {_bound(figures.num_faults)}"
    run.report.add("acknowledged_bytes_lost", figures.acknowledged_bytes_lost, lost)
    run.report.add("torn_checkpoints", figures.torn_checkpoints, f"of {figures.num_checkpoints}")


def retries(run: Run) -> None:
    from store_faults import forced_retries

    figures = asyncio.run(forced_retries(run.count(10_000, 300), SEED))
    run.report.add("records_applied_twice", figures.records_applied_twice, f"of {figures.num_retries} forced retries")


def full(run: Run) -> None:
    from disk_full import NoMountError, disk_full

    try:
        figures = asyncio.run(disk_full(run.count(60, 3), SEED, run.directory))
    except NoMountError as error:
        run.report.say(f"    not here: {error}")
        return
    num_exits = sum(figures.exits.values())
    lost = f"of {figures.acknowledged_bytes:,} bytes; Redis met the full disk {num_exits} times"
    run.report.add("acknowledged_bytes_lost_disk_full", figures.acknowledged_bytes_lost, lost)
    run.report.add("records_applied_twice_disk_full", figures.records_applied_twice, f"answers: {figures.errors}")
    run.report.add("torn_checkpoints_disk_full", figures.torn_checkpoints, f"of {figures.num_checkpoints}")


def cuts(run: Run) -> None:
    from file_cuts import file_cuts

    num_random, num_last = run.count(500, 15), run.count(6_000, 0)
    figures = asyncio.run(file_cuts(num_random, num_last, SEED, run.directory))
    _say_violations(run, list(figures.problems))
    run.report.add("file_cuts_wrong", len(figures.problems), f"of {figures.num_cuts}, {figures.num_inside} inside")
    run.report.add("cut_marks_gone", figures.num_gone, f"of {figures.num_marks} marks presented")


def clocks(run: Run) -> None:
    from clock_jumps import clock_jumps, find_libfaketime

    if (library := find_libfaketime()) is None:
        run.report.say("    not here: libfaketime is not installed")
        return
    figures = asyncio.run(clock_jumps(run.count(60, 5), SEED, run.directory, library))
    jumped = f"{figures.num_commits} commits, {figures.num_takeovers} takeovers, jumps {figures.jumps}"
    run.report.add("stale_commits_accepted_clocks", figures.stale_commits_accepted, jumped)
    lost = figures.acknowledged_bytes_lost + figures.commits_lost
    run.report.add("lost_clocks", lost, f"of {figures.acknowledged_bytes:,} bytes and the commits")
    run.report.add("expired_early_clocks", len(figures.expired_early), str(figures.expired_early))
    run.report.add("clock_recovery_seconds", figures.slowest_recovery_seconds, "at most, with a lease of 1 s")


def promotions(run: Run) -> None:
    from stale_replicas import stale_promotions

    figures = asyncio.run(stale_promotions(run.count(200, 3), SEED, run.directory))
    run.report.add("rollbacks_detected_share", figures.num_detected / figures.num_promotions, "of stale promotions")
    healed = f"of {figures.num_promotions}; {figures.lost_bytes:,} acknowledged bytes were gone"
    run.report.add("rollbacks_healed_share", figures.num_healed / figures.num_promotions, healed)


def equality(run: Run) -> None:
    from worker_faults import byte_equality

    figures = asyncio.run(byte_equality(run.count(500, 10), SEED, _tiny_model(run)))
    _say_violations(run, list(figures.unequal))
    run.report.add("byte_equal_share", figures.num_equal / figures.num_runs, f"of {figures.num_runs} runs")
    run.report.say(f"    {dict(figures.faults)}, {dict(figures.counts)}, {figures.seconds:.0f} s")


def stale(run: Run) -> None:
    from stale_workers import stale_commits

    figures = asyncio.run(stale_commits(run.count(500, 25), SEED, _tiny_model(run)))
    run.report.add("stale_commits_accepted", figures.num_accepted, f"of {figures.num_pauses} pauses past the lease")


def flips(run: Run) -> None:
    from corruption import DAMAGES, damage_sweep

    from eunoe.decoder.decoder import Decoder

    decoder = Decoder.load(_tiny_model(run), num_threads=1)
    with _redis(run) as socket:
        for name, damages, num_tries in (("flips", DAMAGES[:1], 5_000), ("other_damages", DAMAGES[1:], 2_000)):
            num_tries = run.count(num_tries, 200)
            sweeps = [
                asyncio.run(
                    damage_sweep(
                        decoder,
                        f"unix://{socket}",
                        num_tries=num_tries,
                        seed=SEED,
                        is_encrypted=is_encrypted,
                        damages=damages,
                    )
                )
                for is_encrypted in (False, True)
            ]
            share = 1 - sum(len(sweep.silent) for sweep in sweeps) / (2 * num_tries)
            run.report.add(f"{name}_detected_share", share, f"of {2 * num_tries}, half of them encrypted values")


def stall(run: Run) -> None:
    from write_stall import commit_throughput, ping_stall

    from eunoe.clients.state_store import StateStoreClient
    from eunoe.runtime.grpc_channel import open_channel

    async def measure() -> None:
        from gateway import process

        with (
            _redis(run) as socket,
            process("state_store", run.directory / "store.json", redis_url=f"unix://{socket}") as address,
        ):
            async with open_channel(address) as channel:
                store = StateStoreClient(channel, deadline_seconds=60.0)
                commits = await commit_throughput(
                    store, "commits", socket, state_mib=32, num_repeats=run.count(9, 3)
                )  # fmt: skip
                pings = await ping_stall(store, "pings", socket, state_mib=256, num_states=run.count(8, 2))
        rates = f"{commits.commit_mib_per_second:.0f} of {commits.raw_mib_per_second:.0f} MiB/s"
        run.report.add("commit_ratio", commits.commit_ratio, f"{rates}, over gRPC, of pipelined SETs")
        syncs = f"1 MiB written and synced: median {pings.fsync_p50_ms:.1f}, at most {pings.fsync_max_ms:.1f} ms"
        run.report.add(
            "ping_p999_ms", pings.ping_p999_ms, f"of {pings.num_pings}, most {pings.ping_max_ms:.1f}; {syncs}"
        )

    asyncio.run(measure())


def storm(run: Run) -> None:
    from cancel_storm import StormFigures, cancel_storm
    from worker_processes import Site

    async def measure() -> StormFigures:
        async with Site(_tiny_model(run)) as site:
            await site.serving_worker()
            gateway = await site.serving_gateway()
            pids = {"gateway": gateway.pid, "state_store": site.state_store_pid}
            num_calls = run.count(10_000, 1_000)
            return await cancel_storm(gateway.address, pids, site.model_name, num_calls=num_calls, seed=SEED)

    figures = asyncio.run(measure())
    for name, mib in figures.mib_per_1000.items():
        run.report.add(f"mib_per_1000_cancelled_{name}", mib, f"{figures.num_calls} calls")


def slow(run: Run) -> None:
    from slow_clients import Ending, slow_clients

    endings: list[Ending] = ["reset", "cancel", "black hole"]
    figures = asyncio.run(
        slow_clients(
            _tiny_model(run), endings[: run.count(3, 2)], num_each=run.count(4, 1), seconds=5.0, export_mib=128
        )
    )
    num_clients = sum(figures.num_clients.values())
    exported = f"{num_clients} slow clients, exports of {figures.export_mib} MiB among them"
    run.report.add("slow_clients_gateway_growth_mib", figures.growth_mib["gateway"], exported)
    quiet = f"at most {figures.crowded_ms[1]:.0f}; without them {figures.quiet_ms[0]:.0f}, {figures.quiet_ms[1]:.0f}"
    run.report.add("beside_slow_clients_p50_ms", figures.crowded_ms[0], quiet)
    for ending, seconds in figures.given_back_seconds.items():
        run.report.add(f"given_back_seconds_after_{ending.replace(' ', '_')}", seconds, "calls, copies, connections")


def gateway(run: Run) -> None:
    from gateway_kills import gateway_kills

    figures = asyncio.run(gateway_kills(run.count(100, 3), SEED))
    of_all = f"of {figures.num_bytes:,} in {figures.num_streams} streams, {figures.num_kills} kills"
    run.report.add("gateway_kills_lost_bytes", figures.lost_bytes, of_all)
    run.report.add("gateway_kills_surplus_bytes", figures.surplus_bytes, f"{figures.num_reconnects} calls opened again")
    run.report.add("gateway_kills_wrong_streams", len(figures.wrong), _kinds(figures.kinds))
    longest = f"from kill -9 to the next acknowledged record; at most {max(figures.pauses):.2f}"
    run.report.add("gateway_kill_pause_p50_seconds", figures.pause_p50_seconds, longest)


def sidecar(run: Run) -> None:
    from sidecar_faults import sidecar_faults

    figures = asyncio.run(sidecar_faults(run.count(200, 13), SEED, _tiny_model(run)))
    wrong = (figures.failed_appends, figures.misrecorded, figures.not_back, figures.different, figures.failed_folds)
    problems = [problem for problems in wrong for problem in problems]
    if figures.lost_bytes:
        problems.append(f"{figures.lost_bytes} acknowledged bytes are not in the logs")
    if figures.num_unaudited > figures.num_unrecorded:
        problems.append(f"{figures.num_unaudited} evictions are not in the audit log")
    _say_violations(run, problems)
    num_faults, num_fallbacks = figures.faults.total(), figures.counted.total()
    appended = f"of {figures.num_appends} in {num_faults} faults"
    run.report.add("sidecar_failed_appends", len(figures.failed_appends), appended)
    run.report.add("sidecar_lost_bytes", figures.lost_bytes, f"of {figures.num_bytes:,}")
    reported = f"of {figures.num_evictions}; {figures.num_unrecorded} were counted as lost on the way there"
    run.report.add("sidecar_evictions_unaudited", figures.num_unaudited, reported)
    run.report.say(f"    {_kinds(figures.faults)}; {figures.num_hits} of them hit a segment; {figures.seconds:.0f} s")
    num_wrong = (figures.counted - figures.recorded).total() + (figures.recorded - figures.counted).total()
    decided = f"of {num_fallbacks} in {figures.num_evictions} evictions: {_kinds(figures.counted)}"
    run.report.add("sidecar_fallbacks_unrecorded", num_wrong + len(figures.misrecorded), decided)
    seconds = f"median {figures.back_p50_seconds:.1f} s, at most {figures.back_max_seconds:.1f}"
    run.report.add("sidecar_policies_not_back", len(figures.not_back), f"until all streams had: {seconds}")
    num_streams = figures.verdicts.total()
    run.report.add(
        "sidecar_verified_share",
        figures.verdicts["VERIFIED"] / num_streams,
        f"of {num_streams} streams, by another worker",
    )
    usual = f"usually {1000 * figures.usual_seconds:.1f}; the deadline is 500"
    run.report.add("sidecar_longest_segment_ms", 1000 * max(figures.longest_seconds.values()), usual)


def fuzzed(run: Run) -> None:
    from fuzzing import TARGETS, fuzz

    full = {"state": 300_000, "record": 200_000, "metadata": 300_000, "export": 300_000}
    figures = fuzz({target: run.count(full[target], 2_000) for target in TARGETS}, SEED)
    run.report.add("fuzz_executions", figures.num_executions, str(figures.executions_by_target))
    run.report.add("fuzz_crashes", figures.num_crashes, figures.output)


def recovered(run: Run) -> None:
    from recovery import recovery

    from eunoe.embedded.models import DEFAULT_MODEL, resolve_model

    _, directory = resolve_model(DEFAULT_MODEL, on_step=run.report.say)
    figures = asyncio.run(recovery(run.count(30, 3), directory))
    run.report.add("recovery_p50_seconds", figures.p50_seconds, f"of {len(figures.recoveries)} kills")
    run.report.add("recovery_p99_seconds", figures.p99_seconds, f"at most {figures.max_seconds:.2f}")
    alone = asyncio.run(recovery(run.count(3, 1), directory, num_workers=1))
    run.report.add("restart_p50_seconds", alone.p50_seconds, "of a single worker")


SECTIONS: dict[str, Callable[[Run], None]] = {
    "simulated": simulated,
    "exhaustive": exhaustive,
    "planted": planted,
    "real": real,
    "retries": retries,
    "full": full,
    "cuts": cuts,
    "clocks": clocks,
    "promotions": promotions,
    "equality": equality,
    "stale": stale,
    "flips": flips,
    "stall": stall,
    "storm": storm,
    "slow": slow,
    "gateway": gateway,
    "sidecar": sidecar,
    "fuzz": fuzzed,
    "recovery": recovered,
}


def main() -> None:
    """Run the sections and print."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(SECTIONS)}")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name] or list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    # What goes wrong on purpose would fill the screen.
    logging.disable(logging.CRITICAL)
    report = Report("faults", as_json=options.json)
    report.say("  one machine, one disk; kills and truncation stand for power loss")
    for name in wanted:
        report.say(f"  {name}")
        with tempfile.TemporaryDirectory(prefix="eunoe-faults-") as directory:
            SECTIONS[name](Run(report, Path(directory), options.quick))
    report.finish()


@contextmanager
def _redis(run: Run) -> Iterator[Path]:
    """A durable Redis; gives its socket."""
    from gateway import redis

    with redis(run.directory):
        yield run.directory / "redis.sock"


def _tiny_model(run: Run) -> Path:
    from eunoe.decoder.tiny import write_tiny_model

    directory = run.directory / "tiny"
    write_tiny_model(directory)
    return directory


def _say_violations(run: Run, violations: list[str]) -> None:
    for violation in violations:
        run.report.say(f"    BROKEN: {violation}")


def _kinds(faults: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in faults.items())


def _bound(num_tries: int) -> str:
    return f"below {3 / num_tries:.1e} a fault at 95%"


if __name__ == "__main__":
    main()
