"""Measure worker processes: trials an hour, real trials, and what kills cost.

    python scripts/bench_workers.py throughput [--postgres URL] [--workers 1 2 4 8] [--seconds 2]
    python scripts/bench_workers.py real [STUDY] [--workers 1 2] [--trials 8] [--out runs/workers]
    python scripts/bench_workers.py faults [--postgres URL] [--kills 200]

throughput: simulated trials, which only wait, on SQLite and on an empty PostgreSQL database. The
clock runs while all workers work, so the start of the processes doesn't count; perfect would be
the number of workers.
real: the exploration of a study, anew for each number of workers, with the same baseline.
faults: workers of a study of simulated trials are killed at random instants; every trial of the
budget must be there in the end.
What a proposal costs with many finished trials: `bench_sampler.py --trials 100 1000 2000`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import optuna
from optuna.study import Study
from simulation import Killer, conduct, open_simulated, tally

from autocompress.database import open_storage
from autocompress.slots import WORKER
from autocompress.store import load_study, trials_spent


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["throughput", "real", "faults"])
    parser.add_argument("study", nargs="?", default="quickstart")
    parser.add_argument("--postgres", help="URL of an empty PostgreSQL database")
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a simulated trial")
    parser.add_argument("--each", type=int, default=15, help="simulated trials for each worker")
    parser.add_argument("--trials", type=int, default=8, help="real trials")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", default="runs/workers")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        urls = {"sqlite": f"sqlite:///{folder}/study.db"}
        if options.postgres:
            urls["postgresql"] = options.postgres
        if options.what == "throughput":
            throughput(urls, options.workers or [1, 2, 4, 8], options.seconds, options.each)
        elif options.what == "faults":
            faults(urls, options.kills)
        else:
            real(options.study, options.workers or [1, 2], options.trials, Path(options.out))


def throughput(urls: dict[str, str], workers: Sequence[int], seconds: float, each: int) -> None:
    """Trials an hour of simulated trials."""
    print(f"Simulated trials of {seconds:g} s, {each} for each worker")
    print("| database | workers | trials an hour | times one worker |\n|---|---|---|---|")
    for name, url in urls.items():
        first: float | None = None
        for count in workers:
            study_name = f"s{uuid4().hex[:8]}"
            conduct(url, study_name, each * count, count, seconds)
            speed = per_hour(open_simulated(url, study_name))
            first = first or speed
            print(f"| {name} | {count} | {speed:.0f} | {speed / first:.2f} |", flush=True)


def per_hour(study: Study) -> float:
    """Trials an hour while all workers work: from the last one's first start to the first's end.

    A trial that lies in that time by a part counts by that part.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for trial in trials_spent(study):
        start, end = moment(trial.datetime_start), moment(trial.datetime_complete)
        spans.setdefault(trial.user_attrs[WORKER], []).append((start, end))
    begin = max(min(start for start, _ in own) for own in spans.values())
    close = min(max(end for _, end in own) for own in spans.values())
    parts = [
        max(0.0, min(end, close) - max(start, begin)) / (end - start)
        for own in spans.values()
        for start, end in own
    ]
    return 3600 * sum(parts) / (close - begin)


def moment(time: datetime | None) -> float:
    """A time that a finished trial has, in seconds."""
    assert time is not None
    return time.timestamp()


def real(study: str, workers: Sequence[int], trials: int, out: Path) -> None:
    """Trials an hour of a real exploration."""
    print(f"Exploration of {study}, {trials} trials")
    print("| workers | trials an hour | times the first |\n|---|---|---|")
    first: float | None = None
    for count in workers:
        place = out / f"{count}-{uuid4().hex[:6]}"
        command = [sys.executable, "-m", "autocompress.study", "run", study, "--out", str(place)]
        command += ["--workers", str(count), "--trials", str(trials), "--stage", "exploration"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        (database,) = place.glob("*/study.db")
        storage = open_storage(f"sqlite:///{database.resolve()}")
        found = load_study(storage, database.parent.name, "exploration")
        assert found is not None
        speed = per_hour(found)
        first = first or speed
        print(f"| {count} | {speed:.0f} | {speed / first:.2f} |", flush=True)


def faults(urls: dict[str, str], kills: int) -> None:
    """Kill workers at random instants, and count what is there in the end."""
    print("| database | workers | kills | trials planned | complete | failed | cut off | left |")
    print("|---|---|---|---|---|---|---|---|")
    for name, url in urls.items():
        study_name = f"s{uuid4().hex[:8]}"
        killer = Killer(kills, 0.6)
        total = kills // 2 + 20
        conduct(url, study_name, total, 4, 1.0, killer, steadfast=True)
        found = tally(open_simulated(url, study_name))
        print(
            f"| {name} | 4 | {kills - killer.left} | {total} | {found.complete} | {found.failed} | "
            f"{found.cut_off} | {found.left} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
