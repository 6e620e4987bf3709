"""Runs a program and notes what it took: CPU, wall time, memory, what the repository grew by, requests. Decides nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import tools

# ext4 avoids inodes that were freed in the last minutes, and searches long for others: 200,000 files that one program
# restored and that were removed made the next restore of anything take 45 CPU seconds more. So restored trees of many
# files stay until the end.
MANY_FILES = 5000
LAUNCH = Path(__file__).with_name("launch.py")


@dataclass
class Row:
    """One step of one program: CPU and wall seconds, peak memory and growth of the repository in MiB (negative: shrunk)."""

    data_set: str
    step: str
    tool: str
    cpu: float
    wall: float
    rss: float
    stored: float
    requests: int | None = None  # to the S3 server


@dataclass
class Change:
    """What changed before one step or several of a data set: MiB of pages that were nowhere before, of so many in all."""

    data_set: str
    name: str
    steps: list[str]
    changed: float
    whole: float


@dataclass
class Where:
    """What is special about a place to run: nothing, here."""

    name: str = ""  # behind the name of the data set
    prefix: tuple[str, ...] = ()  # words before the command
    bucket: Path | None = None  # where the S3 server keeps the objects, one folder a program
    requests: Callable[[], int] | None = None  # how many there were so far


HERE = Where()


def run(command: list[str], env: dict[str, str], folder: Path, log: Path) -> tuple[int, float, float, float]:
    """Exit code, CPU seconds, wall seconds and peak memory in MiB of a command; what it says goes to `log`."""
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    with log.open("wb") as out:
        launch = [sys.executable, "-I", "-S", LAUNCH, result, *command]
        process = subprocess.Popen(launch, env=env, cwd=folder, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait()
        except BaseException:  # this run is stopped: nothing may write below its folder any more
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} could not be started:\n{log.read_text(errors='replace')}")
    taken = json.loads(result.read_text())
    return taken["code"], taken["cpu"], taken["wall"], taken["rss"]


def run_well(command: list[str], env: dict[str, str], folder: Path, log: Path) -> tuple[float, float, float]:
    """The same of a command that must succeed."""
    code, *taken = run(command, env, folder, log)
    if code != 0:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')}")
    return tuple(taken)


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / data.MIB if folder.exists() else 0


def compare(source: Path, out: Path) -> None:
    done = subprocess.run(["diff", "-rq", source, out], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"what was restored differs:\n{done.stdout}{done.stderr}")


class Bench:
    def __init__(self, work: Path):
        self.work = work
        self.rows: list[Row] = []
        self.changes: list[Change] = []
        self.left_out: list[str] = []  # sentences about what was not measured

    def repo(self, tool: tools.Tool, name: str) -> Path:
        return self.work / f"{tool.name}-{name.replace(' ', '-').replace(',', '')}"

    def measure(self, tool: tools.Tool, name: str, step: str, verb: str, folder: Path, where: Where = HERE, **values) -> Row | None:
        """Runs a verb on the repository of this data set. Returns what it took; without a `step` it is not noted, either."""
        repo = self.repo(tool, name + where.name)
        commands = tool.commands(verb, repo=repo, **{"lineage": "bench", **values})
        if commands is None:
            self.left_out.append(f"{name}{where.name}, {step or verb}: {tool.name} cannot do it.")
            return None
        stored = where.bucket / tool.name if where.bucket else repo
        size, requests = size_mib(stored), where.requests() if where.requests else 0
        taken = [run_well([*where.prefix, *one], tool.environment(repo), folder, self.work / "last.log") for one in commands]
        cpu, wall, rss = (sum(one[0] for one in taken), sum(one[1] for one in taken), max(one[2] for one in taken))
        row = Row(name + where.name, step, tool.name, cpu, wall, rss, size_mib(stored) - size,
                  where.requests() - requests if where.requests else None)
        if step:
            self.note(row)
        return row

    def note(self, row: Row) -> None:
        self.rows.append(row)
        requests = "" if row.requests is None else f" {row.requests:7} requests"
        print(f"{row.data_set:16} {row.step:14} {row.tool:9} {row.cpu:7.2f} CPU s {row.wall:7.2f} s {row.rss:6.0f} MiB "
              f"{row.stored:+9.1f} MiB stored{requests}", flush=True)

    def begin(self, tool: tools.Tool, name: str, source: Path, where: Where = HERE) -> None:
        self.measure(tool, name, "", "init", source, where)
        if tool.prepare:
            self.measure(tool, name, "", "prepare", source, where)

    def restore(self, tool: tools.Tool, name: str, source: Path, number: int, where: Where = HERE, verb: str = "restore") -> None:
        out = self.work / f"out-{self.repo(tool, name + where.name).name}"
        out.mkdir()
        self.measure(tool, name, "restore", verb, out, where, src=source, out=out, number=number)
        compare(source, out)
        if sum(len(files) for _, _, files in os.walk(out)) < MANY_FILES:
            shutil.rmtree(out)

    def drop(self, found: list[tools.Tool], name: str) -> None:
        """Removes the repositories of a data set, with their caches."""
        for tool in found:
            for path in self.work.glob(f"{self.repo(tool, name).name}*"):
                shutil.rmtree(path)
