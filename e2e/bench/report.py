"""Writes the page and its pictures from what was measured. Measures nothing."""

import os
import platform
from html import escape
from pathlib import Path

import data
import tools
from measure import Change, Row
from targets import Results, targets

LOAD = " ".join(f"{load:.1f}" for load in os.getloadavg())
COLOURS = {"lifeboat": "#0b6e4f", "restic": "#9aa5b1", "borg": "#7b8794", "kopia": "#b8c2cc", "rustic": "#52606d"}
LABEL, BAR, LINE, WIDTH = 170, 340, 18, 600  # pixels of a picture


def machine() -> str:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{os.cpu_count()} × {models[0] if models else platform.machine()}, {memory:.0f} GiB, Linux {'.'.join(platform.release().split('.')[:2])}"


def table(head: str, rows: list[str]) -> list[str]:
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *rows, ""]


def line(row: Row) -> str:
    requests = "" if row.requests is None else f" {row.requests} |"
    return f"| {row.data_set} | {row.step} | {row.tool} | {row.cpu:.2f} | {row.wall:.2f} | {row.rss:.0f} | {row.stored:.1f} |{requests}"


def growth(change: Change, grown: dict[str, float]) -> list[str]:
    return [f"| {change.data_set} | {change.name} | {change.whole:.0f} | {change.changed:.1f} | {tool} | {value:.1f} | {value / change.changed:.1f} |"
            for tool, value in grown.items()]


def page(results: Results, found: list[tools.Tool], absent: dict[str, str], left_out: list[str], pictures: list[str]) -> str:
    """The page as Markdown; `pictures` are paths from where it lies."""
    text = ["# Benchmarks", "", f"Made by `make bench`, size `{results.size}`, on {machine()}; load average before: {LOAD}. "
            "All programs ran on the same data, in one run, with encryption, on the local file system, caches warm. "
            "CPU seconds count on a machine that others use too; wall times do not.", ""]
    text += [f"- {tool.name}: {tool.version()}; {tool.options}" for tool in found]
    text += [f"- {name}: absent ({reason})" for name, reason in absent.items()] + [""]
    text += ["## Data", "", *(f"- {sentence}" for sentence in data.described(results.size)), ""]
    text += ["## What is wanted", "", "The ratio is ours by the best peer's. Most targets are for size `full`; `–` where they say nothing at this size.", ""]
    wanted = [target.line(results.size) for target in targets(results)]
    text += table("figure | lifeboat | best peer | ratio | target | met", [one for one in wanted if one])
    text += ["## All figures", "", "Negative growth is space given back. Before *rebuild index* the files of the index and the cache were removed: what is stored then is the index.", ""]
    steps = list(dict.fromkeys((row.data_set, row.step) for row in results.rows))
    rows = sorted(results.rows, key=lambda row: steps.index((row.data_set, row.step)))
    head = "data | step | program | CPU s | wall s | peak MiB | stored MiB"
    text += table(head, [line(row) for row in rows if row.requests is None])
    remote = [line(row) for row in rows if row.requests is not None]
    if remote:
        text += ["## An S3 server with 30 ms added to each round trip", "", *table(f"{head} | requests", remote)]
    text += ["## Growth when pages of 8 KiB change", "", "Really changed are pages that were nowhere in the files before.", ""]
    text += table("data | change | MiB in all | really changed MiB | program | grown MiB | times what changed",
                  [row for change in results.changes for row in growth(change, results.grown(change))])
    text += ["## Many writers and deleters on one repository at once", "",
             "Each deleter takes all but the two newest backups off and reclaims, by settings that are safe beside backups (kopia and "
             "rustic then delete a day later). Then a backup alone, and one of as much other data while a deleter runs without a pause. "
             "`lifeboat forget` and `expire` lower their own priority (nice 10); the others are run as they are.", ""]
    text += table("program | backups | refused | expiries | refused | alone MiB/s | beside expiries MiB/s | afterwards",
                  [f"| {one.tool} | {one.backups} | {one.backups_refused} | {one.expiries} | {one.expiries_refused} | {one.alone:.1f} | "
                   f"{'refused' if one.meanwhile is None else f'{one.meanwhile:.1f}'} | {one.after} |" for one in results.tallies])
    if left_out:
        text += ["## Left out", "", *(f"- {sentence}" for sentence in left_out), ""]
    if pictures:
        text += ["## Pictures", "", *(f"![{Path(path).stem}]({path})" for path in pictures), ""]
    return "\n".join(text).rstrip() + "\n"


def picture(title: str, groups: dict[str, list[tuple[str, float]]]) -> str:
    """Bars by program as SVG, each group in its own scale and with its name above."""
    parts, y = [f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>'], 34
    for step, bars in groups.items():
        y += LINE
        parts.append(f'<text x="8" y="{y}" font-style="italic">{escape(step)}</text>')
        longest = max(value for _, value in bars) or 1
        for tool, value in bars:
            y += LINE
            width = max(1, round(BAR * value / longest))
            parts.append(f'<text x="{LABEL - 6}" y="{y}" text-anchor="end">{escape(tool)}</text>'
                         f'<rect x="{LABEL}" y="{y - 11}" width="{width}" height="13" fill="{COLOURS.get(tool, "#d9a441")}"/>'
                         f'<text x="{LABEL + width + 5}" y="{y}">{value:.2f}</text>')
        y += 6
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" font-family="sans-serif" font-size="12">'
            f'<rect width="{WIDTH}" height="{y + 10}" fill="white"/>{"".join(parts)}</svg>\n')


def pictures(results: Results) -> dict[str, str]:
    """SVG by file name: one for each data set; peak memory; growth; the size of many versions."""
    drawn = {}
    for data_set in dict.fromkeys(row.data_set for row in results.rows):
        rows = [row for row in results.rows if row.data_set == data_set]
        remote = rows[0].requests is not None  # where waiting is what counts
        groups: dict[str, list[tuple[str, float]]] = {}
        for row in rows:
            groups.setdefault(row.step, []).append((row.tool, row.wall if remote else row.cpu))
        drawn[data_set.replace(", ", "-").replace(" ", "-")] = picture(f"{data_set}: {'wall' if remote else 'CPU'} seconds", groups)
    drawn["memory"] = picture("Peak memory of any verb on any set", {"MiB": list(results.peak().items())})
    drawn["growth"] = picture("Growth when pages of 8 KiB change", {
        f"{change.data_set}, {change.name}: {change.changed:.1f} MiB changed": list(results.grown(change).items()) for change in results.changes})
    daily = [row for row in results.rows if row.data_set == "daily" and row.step.endswith("backups")]
    drawn["versions"] = picture("Repository with daily versions of one tree", {f"MiB after {daily[0].step}": [(row.tool, row.stored) for row in daily]})
    return {f"{name}.svg": svg for name, svg in drawn.items()}
