#!/usr/bin/env python3
"""Measures the repository engine beside its peers on the same data, and writes docs/benchmarks.md with pictures.

    SIZE=small|medium|full  how much data (full)
    PEERS=no                only lifeboat
    OUT=FILE                where the page goes (docs/benchmarks.md; at other sizes than full: nowhere but the terminal)

CPU seconds are user and system time of the program and its children, memory is its largest resident set. Caches of the
file system are warm: all of a set but *sparse* is read before the first program. A restore is compared with its source,
byte by byte. No time makes it fail: only a program that fails or restores something else does. `e2e/bin/with-programs`
before it brings the S3 server; PostgreSQL is installed where there is none, as Debian's package. Remove nothing that has
many files shortly before: ext4 then searches long for free inodes, and the first programs that restore pay for it.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import crowd
import data
import floor
import report
import s3
import steps
import tools
from measure import Bench
from targets import Results

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lifeboat" / "bench"
# size name -> snapshots before the expiry, seconds of many at once
LONG = {"small": (4, 10), "medium": (8, 30), "full": (8, 60)}


@contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder in the cache for one run at a time, which is gone afterwards, whatever happens."""
    CACHE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    work = CACHE / "work"
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():  # of a run that was killed
            shutil.rmtree(work)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work)


def measure(bench: Bench, found: list[tools.Tool], sets: dict[str, Path], size: str, peers: bool) -> Results:
    snapshots, seconds = LONG[size]
    entries = {name: sum(len(folders) + len(files) for _, folders, files in os.walk(root)) for name, root in sets.items()}
    own = bench.work / "tree"  # its times are changed
    subprocess.run(["cp", "-a", sets["tree"], own], check=True)
    sets = {**sets, "tree": own}
    for name, source in sets.items():
        if name != "sparse":  # whose holes would take all memory
            data.warm(source)
        if peers and name in ("tree", "noise"):
            bench.note(floor.measure(CACHE, name, source))
        for tool in found:
            steps.data_set(bench, tool, name, source)
        bench.drop(found, name)
    steps.changed_pages(bench, found, sets["image"])
    steps.database(bench, found, data.SIZES[size]["postgres"])
    steps.daily(bench, found, *data.SIZES[size]["daily"])
    steps.expire(bench, found, sets["small"], snapshots)
    both = crowd.halves(own, bench.work)
    tallies = [tally for tool in found if (tally := crowd.crowd(bench, tool, sets["small"], both, seconds))]
    if size == "small":
        bench.left_out.append("one core: not at size `small`.")
    else:
        steps.one_core(bench, found, own)
    s3.over_s3(bench, found, own)
    return Results(size, bench.rows, tallies, bench.changes, entries)


def main() -> None:
    size, peers = os.environ.get("SIZE", "full"), os.environ.get("PEERS") != "no"
    program = Path(os.environ.get("LIFEBOAT", ROOT / "target" / "release" / "lifeboat")).resolve()
    with workplace() as work:
        found, absent = tools.peers(CACHE) if peers else ([], {})
        found.insert(0, tools.lifeboat(program))
        bench = Bench(work)
        if not peers:
            bench.left_out.append("zstd, hash and cipher alone: not with PEERS=no.")
        results = measure(bench, found, data.make(CACHE / f"data-{size}", size), size, peers)
    drawn = report.pictures(results)
    out = os.environ.get("OUT", ROOT / "docs" / "benchmarks.md" if size == "full" else "")
    to = Path(out or "benchmarks.md")
    folder = to.with_suffix("")  # of the pictures
    text = report.page(results, found, absent, bench.left_out, [f"{folder.name}/{name}" for name in drawn])
    if out:
        folder.mkdir(exist_ok=True)
        for name, svg in drawn.items():
            (folder / name).write_text(svg)
        to.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
