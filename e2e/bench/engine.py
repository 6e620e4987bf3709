#!/usr/bin/env python3
"""Measures the repository engine beside its peers on the same data, and writes docs/benchmarks.md.

    SIZE=small|medium|full  how much data (full)
    PEERS=no                only lifeboat
    OUT=FILE                where the page goes (docs/benchmarks.md; at other sizes than full: nowhere but the terminal)

CPU seconds are user and system time of the program and its children, memory is its largest resident set. Caches of the
file system are warm. A restore is compared with its source, byte by byte. No time makes it fail: only a program that
fails or restores something else does.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import data
import tools

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lifeboat" / "bench"
ROUNDS = 4
# ext4 avoids inodes that were freed in the last minutes, and searches long for others: 200,000 files that one program
# restored and that were removed made the next restore of anything take 45 CPU seconds more. So restored trees of many
# files stay until the end.
MANY_FILES = 1000


@dataclass
class Row:
    data_set: str
    step: str
    tool: str
    cpu: float
    wall: float
    rss: float
    stored: float
    note: str = ""


def run(command: list[str], env: dict[str, str], folder: Path) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak memory in MiB of a command, which must succeed."""
    began = time.monotonic()
    log = CACHE / "last.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(errors='replace')}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began, usage.ru_maxrss / 1024


def stored_mib(repo: Path) -> float:
    return sum(path.stat().st_size for path in repo.rglob("*") if path.is_file()) / data.MIB


class Bench:
    def __init__(self, work: Path):
        self.work = work
        self.rows: list[Row] = []

    def measure(self, tool: tools.Tool, name: str, step: str, verb: str, folder: Path, **values) -> None:
        repo = self.work / f"{tool.name}-{name}"
        before = stored_mib(repo) if repo.exists() else 0
        command = tool.command(verb, repo=repo, **values)
        cpu, wall, rss = run(command, tool.environment(repo), folder)
        if step:
            self.rows.append(Row(name, step, tool.name, cpu, wall, rss, stored_mib(repo) - before))
            print(f"{name:7} {step:12} {tool.name:9} {cpu:7.2f} CPU s {wall:7.2f} s {rss:6.0f} MiB "
                  f"{self.rows[-1].stored:+9.1f} MiB stored", flush=True)

    def begin(self, tool: tools.Tool, name: str, source: Path) -> None:
        self.measure(tool, name, "", "init", source)
        if tool.prepare:
            self.measure(tool, name, "", "prepare", source)

    def data_set(self, tool: tools.Tool, name: str, source: Path) -> None:
        self.begin(tool, name, source)
        self.measure(tool, name, "first", "backup", source, src=source, number=0)
        self.measure(tool, name, "unchanged", "backup", source, src=source, number=1)
        self.restore(tool, name, source, 1)

    def restore(self, tool: tools.Tool, name: str, source: Path, number: int) -> None:
        out = self.work / f"out-{tool.name}-{name}"
        out.mkdir()
        self.measure(tool, name, "restore", "restore", out, src=source, out=out, number=number)
        compare(source, out)
        if sum(len(files) for _, _, files in os.walk(out)) < MANY_FILES:
            shutil.rmtree(out)

    def changed_pages(self, found: list[tools.Tool], source: Path) -> float:
        """Backs up an image of which 1% of the pages change, several times. Returns MiB really changed."""
        own = self.work / "changing"
        shutil.copytree(source, own)
        for tool in found:
            self.begin(tool, "pages", own)
            self.measure(tool, "pages", "first", "backup", own, src=own, number=0)
        changed = 0
        for number in range(1, ROUNDS + 1):
            changed += data.change_image(own, number)
            for tool in found:
                self.measure(tool, "pages", f"1% no. {number}", "backup", own, src=own, number=number)
        for tool in found:
            self.restore(tool, "pages", own, ROUNDS)
        return changed / data.MIB


def compare(source: Path, out: Path) -> None:
    done = subprocess.run(["diff", "-rq", source, out], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the restored tree differs:\n{done.stdout}{done.stderr}")


def machine() -> str:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{os.cpu_count()} × {models[0] if models else platform.machine()}, {memory:.0f} GiB, Linux {platform.release()}"


def page(size: str, bench: Bench, found: list[tools.Tool], absent: dict[str, str], changed: float) -> str:
    text = ["# Benchmarks", "", f"Made by `make bench`, size `{size}`, on {machine()}; load average before: {LOAD}. "
            "All programs ran on the same data, in one run, with encryption, on the local file system, caches warm. "
            "CPU seconds count on a machine that others use too; wall times do not.", ""]
    text += [f"- {tool.name}: {tool.version()}; {tool.options}" for tool in found]
    text += [f"- {name}: absent ({reason})" for name, reason in absent.items()] + [""]
    text += ["| data | step | program | CPU s | wall s | peak MiB | stored MiB |", "|---|---|---|---|---|---|---|"]
    text += [f"| {row.data_set} | {row.step} | {row.tool} | {row.cpu:.2f} | {row.wall:.2f} | {row.rss:.0f} | {row.stored:.1f} |"
             for row in bench.rows]
    text += ["", f"## Growth when 1% of the 8 KiB pages change, {ROUNDS} times ({changed:.1f} MiB really changed)", "",
             "| program | grown MiB | times what changed |", "|---|---|---|"]
    for tool in found:
        grown = sum(row.stored for row in bench.rows if row.tool == tool.name and row.step.startswith("1%"))
        text.append(f"| {tool.name} | {grown:.1f} | {grown / changed:.1f} |")
    return "\n".join(text) + "\n"


LOAD = " ".join(f"{load:.1f}" for load in os.getloadavg())


def main() -> None:
    size = os.environ.get("SIZE", "full")
    program = Path(os.environ.get("LIFEBOAT", ROOT / "target" / "release" / "lifeboat")).resolve()
    CACHE.mkdir(parents=True, exist_ok=True)
    found, absent = ([], {}) if os.environ.get("PEERS") == "no" else tools.peers(CACHE)
    found.insert(0, tools.lifeboat(program))
    sets = data.make(CACHE / f"data-{size}", size)
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    bench = Bench(work)
    try:
        for name, source in sets.items():
            for tool in found:
                bench.data_set(tool, name, source)
        changed = bench.changed_pages(found, sets["image"])
    finally:
        shutil.rmtree(work)
    text = page(size, bench, found, absent, changed)
    out = os.environ.get("OUT", ROOT / "docs" / "benchmarks.md" if size == "full" else "")
    if out:
        Path(out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
