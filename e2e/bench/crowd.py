"""Many writers and deleters on one repository at once: who is refused, whether what stays is whole, how fast a backup is meanwhile."""

import itertools
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import data
import tools
from measure import Bench, run, run_well, size_mib

WRITERS, DELETERS, KEEP = 3, 2, 2
NEVER_REFUSED = "lifeboat"  # a refusal, or damage afterwards, makes the run fail


@dataclass
class Tally:
    """How many runs of a program succeeded and were refused, and MiB/s of a backup alone and beside deleters."""

    tool: str
    backups: int = 0
    backups_refused: int = 0
    expiries: int = 0
    expiries_refused: int = 0
    alone: float = 0
    meanwhile: float | None = None  # None: refused
    after: str = ""


class Crowd:
    def __init__(self, bench: Bench, tool: tools.Tool):
        self.bench, self.tool = bench, tool
        self.repo = bench.repo(tool, "crowd")
        self.tally = Tally(tool.name)
        self.reasons: dict[str, str] = {}

    def tried(self, verb: str, folder: Path, log: str, **values) -> float | None:
        """Seconds that the commands of the verb took together; None when one was refused."""
        seconds = 0.0
        path = self.bench.work / f"{log}.log"
        for command in self.tool.commands(verb, repo=self.repo, keep=KEEP, **values):
            code, _, wall, _ = run(command, self.tool.environment(self.repo), folder, path)
            seconds += wall
            if code != 0:
                said = path.read_text(errors="replace").strip()
                if self.tool.name == NEVER_REFUSED:
                    sys.exit(f"{' '.join(command)} ended with {code} beside others:\n{said}")
                self.reasons.setdefault(verb, (said.splitlines() or ["no message"])[-1])
                return None
        return seconds

    def write(self, number: int, source: Path, on: Callable[[], bool]) -> tuple[int, int]:
        """Changes its files and backs them up, again and again. Returns how often it succeeded and was refused."""
        done = [0, 0]
        for run_number in itertools.count():
            if not on():
                return done[1], done[0]
            data.change_small(source, run_number)
            seconds = self.tried("backup", source, f"w{number}", src=source, number=run_number, lineage=f"w{number}")
            done[seconds is not None] += 1

    def delete(self, number: int, on: Callable[[], bool]) -> tuple[int, int]:
        done = [0, 0]
        while on():
            done[self.tried("expire_beside", self.bench.work, f"d{number}") is not None] += 1
        return done[1], done[0]

    def together(self, sources: list[Path], seconds: float) -> None:
        end = time.monotonic() + seconds
        on = lambda: time.monotonic() < end
        with ThreadPoolExecutor(WRITERS + DELETERS) as pool:
            writers = [pool.submit(self.write, number, source, on) for number, source in enumerate(sources)]
            deleters = [pool.submit(self.delete, number, on) for number in range(DELETERS)]
        done = [[sum(each) for each in zip(*(one.result() for one in group), strict=True)] for group in (writers, deleters)]
        (self.tally.backups, self.tally.backups_refused), (self.tally.expiries, self.tally.expiries_refused) = done

    def speeds(self, alone: Path, beside: Path) -> None:
        """MiB/s of the backup of a folder, and of another such folder while the repository is expired without a pause."""
        values = {"repo": self.repo, "number": 0}
        [command] = self.tool.commands("backup", src=alone, lineage="alone", **values)
        _, wall, _ = run_well(command, self.tool.environment(self.repo), alone, self.bench.work / "last.log")
        self.tally.alone = size_mib(alone) / wall
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            deleter = pool.submit(self.delete, 0, lambda: not stop.is_set())
            try:
                wall = self.tried("backup", beside, "beside", src=beside, number=0, lineage="beside")
                if wall is not None:
                    self.tally.meanwhile = size_mib(beside) / wall
            finally:
                stop.set()
        deleter.result()


def crowd(bench: Bench, tool: tools.Tool, small: Path, halves: tuple[Path, Path], seconds: float) -> Tally | None:
    """Runs all of it on a repository of its own; None when the program cannot expire."""
    if tool.expire_beside is None:
        bench.left_out.append(f"many at once: {tool.name} cannot do it.")
        return None
    one = Crowd(bench, tool)
    sources = []
    for number in range(WRITERS):
        source = bench.work / f"crowd-{tool.name}-{number}"
        for folder in sorted(small.iterdir())[number * 10 : number * 10 + 10] or sorted(small.iterdir()):
            shutil.copytree(folder, source / folder.name)
        sources.append(source)
    bench.begin(tool, "crowd", small)
    if tool.prepare_expire:
        bench.measure(tool, "crowd", "", "prepare_expire", small, keep=KEEP)
    one.together(sources, seconds)
    one.speeds(*halves)
    one.tally.after = "damaged" if one.tried("check_data", bench.work, "check") is None else "whole"
    bench.drop([tool], "crowd")
    print(f"many at once: {one.tally} {one.reasons}", flush=True)
    return one.tally


def halves(tree: Path, work: Path) -> tuple[Path, Path]:
    """Two folders of other bytes and about the same size: each second folder of the tree."""
    both = work / "half-a", work / "half-b"
    for number, folder in enumerate(sorted(tree.iterdir())):
        shutil.copytree(folder, both[number % 2] / folder.name)
    return both
