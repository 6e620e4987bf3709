"""The figures that are wanted, and how each is taken from what was measured. Most hold for data of full size only."""

from collections.abc import Callable
from dataclasses import dataclass, field

import floor
from crowd import Tally
from data import MIB
from measure import Change, Row

OURS = "lifeboat"


@dataclass
class Results:
    """All that one run measured. `entries` counts files and folders of a data set."""

    size: str
    rows: list[Row]
    tallies: list[Tally]
    changes: list[Change]
    entries: dict[str, int] = field(default_factory=dict)

    def each(self, data_set: str, step: str, what: Callable[[Row], float]) -> dict[str, float]:
        return {row.tool: what(row) for row in self.rows if (row.data_set, row.step) == (data_set, step)}

    def programs(self) -> list[str]:
        return list(dict.fromkeys(row.tool for row in self.rows if row.tool != floor.NAME))

    def grown(self, change: Change) -> dict[str, float]:
        """MiB that what changed cost, by program."""
        rows = [row for row in self.rows if row.data_set == change.data_set and row.step in change.steps]
        return {name: sum(row.stored for row in rows if row.tool == name) for name in self.programs()}

    def peak(self) -> dict[str, float]:
        """The largest resident set of any step in MiB, by program."""
        return {name: max(row.rss for row in self.rows if row.tool == name) for name in self.programs()}


@dataclass
class Target:
    """One line: a figure by program, what is wanted of ours, and whether less is better. `always`: at any size of data."""

    figure: str
    by_program: dict[str, float]
    wanted: float
    unit: str = "CPU s"
    less: bool = True
    always: bool = False

    def line(self, size: str) -> str | None:
        """A row of the table; None when ours was not measured."""
        peers = {name: value for name, value in self.by_program.items() if name not in (OURS, floor.NAME)}
        if OURS not in self.by_program:
            return None
        ours = self.by_program[OURS]
        show = lambda value: f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2f}"
        best, ratio = "–", "–"
        if peers:
            name = (min if self.less else max)(peers, key=peers.get)
            best = f"{name} {show(peers[name])}"
            ratio = f"{ours / peers[name]:.2f}" if peers[name] else "–"
        met = "yes" if (ours <= self.wanted if self.less else ours >= self.wanted) else "no"
        if size != "full" and not self.always:
            met = "–"
        return f"| {self.figure} | {show(ours)} {self.unit} | {best} | {ratio} | {'≤' if self.less else '≥'} {show(self.wanted)} | {met} |"


def targets(results: Results) -> list[Target]:
    cpu, wall, stored = (lambda row: row.cpu), (lambda row: row.wall), (lambda row: row.stored)
    first = lambda name, wanted: Target(f"first backup, *{name}*", results.each(name, "first", cpu), wanted)
    lines = [first("tree", 3.8), first("small", 4), first("image", 3), first("noise", 2.5)]
    for name in ("tree", "noise"):
        by_program = results.each(name, "first", cpu)
        if floor.NAME in by_program:
            share = {tool: value / by_program[floor.NAME] for tool, value in by_program.items()}
            lines.append(Target(f"first backup, *{name}*, by zstd, hash and cipher alone", share, 1.25, "×"))
    noise = results.each("noise", "first", stored).get(OURS, 0) * MIB / 1e9  # as large as its source: nothing of it is compressed
    again = {tool: noise / value for tool, value in results.each("noise", "read again", cpu).items() if value}
    lines.append(Target("duplicate data read again, *noise*", again, 2, "GB per CPU s", less=False))
    lines.append(Target("unchanged, *small*", results.each("small", "unchanged", cpu), 0.8))
    rate = {tool: results.entries.get("small", 0) / value for tool, value in results.each("small", "unchanged", wall).items()}
    lines.append(Target("unchanged, *small*, wall", rate, 250_000, "entries/s", less=False))
    lines.append(Target("peak memory of any verb on any set", results.peak(), 128, "MiB"))
    lines += [Target(f"full restore, *{name}*", results.each(name, "restore", cpu), 2.4) for name in ("tree", "noise")]
    lines.append(Target("expire half and reclaim, *small*", results.each("small changing", "expire half", cpu), 0.3))
    share = {one.tool: 100 * (one.meanwhile or 0) / one.alone for one in results.tallies}
    lines.append(Target("backup beside expiries, of its speed alone", share, 80, "%", less=False))
    refused = {one.tool: float(one.backups_refused + one.expiries_refused) for one in results.tallies}
    lines.append(Target("refused of many writers and deleters", refused, 0, "runs", always=True))
    size = results.each("tree", "first", stored)
    best = min((value for tool, value in size.items() if tool not in (OURS, floor.NAME)), default=0)
    if best:
        lines.append(Target("repository size, *tree*, by the best peer", {tool: value / best for tool, value in size.items()}, 1.02, "×", always=True))
    for change in results.changes:
        if change.data_set == "pages":
            grown = {tool: value / change.changed for tool, value in results.grown(change).items()}
            lines.append(Target("growth by changed pages, *image*", grown, 2, "× what changed", always=True))
    return lines
