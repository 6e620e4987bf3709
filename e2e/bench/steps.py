"""What is measured with one program at a time: the steps of each data set, changed pages and rows, daily versions, expiry, one core."""

import itertools
import os
import shutil
import sys
from pathlib import Path

import data
import postgres
import tools
from measure import HERE, Bench, Change, Row, Where, compare, size_mib

ROUNDS = 4  # of changed pages
UPDATED = (1, 5, 20)  # per cent of a table's pages


def data_set(bench: Bench, tool: tools.Tool, name: str, source: Path) -> None:
    """First backup, unchanged, full restore; and what is only interesting of some sets."""
    basic(bench, tool, name, source, HERE)
    numbers = itertools.count(2)
    if name == "noise":
        bench.measure(tool, name, "read again", "read_again", source, src=source, number=next(numbers))
    if name == "small":
        one_file(bench, tool, name, source)
    if name in ("tree", "small"):
        bench.measure(tool, name, "check", "check", source)
        bench.measure(tool, name, "check data", "check_data", source)
    if name == "small":
        rebuild_index(bench, tool, name, source)
    if name == "tree":
        for path in source.rglob("*"):
            if path.is_file():
                os.utime(path)
        bench.measure(tool, name, "touched", "backup", source, src=source, number=next(numbers))


def basic(bench: Bench, tool: tools.Tool, name: str, source: Path, where: Where) -> None:
    bench.begin(tool, name, source, where)
    bench.measure(tool, name, "first", "backup", source, where, src=source, number=0)
    bench.measure(tool, name, "unchanged", "backup", source, where, src=source, number=1)
    bench.restore(tool, name, source, 1, where, "restore_sparse" if name == "sparse" else "restore")


def one_file(bench: Bench, tool: tools.Tool, name: str, source: Path) -> None:
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    path = paths[len(paths) // 2].relative_to(source)
    out = bench.work / f"one-{tool.name}"
    (out / path).parent.mkdir(parents=True)
    bench.measure(tool, name, "one file", "one_file", out, src=source, out=out, number=1, path=path)
    (out / path.with_suffix(".expected")).write_bytes((source / path).read_bytes())
    compare(out / path.with_suffix(".expected"), out / path)
    shutil.rmtree(out)


def rebuild_index(bench: Bench, tool: tools.Tool, name: str, source: Path) -> None:
    """Loses the index and the cache; what was made anew must pass a check."""
    if tool.rebuild_index is None:
        bench.left_out.append(f"{name}, rebuild index: {tool.name} has nothing comparable.")
        return
    repo = bench.repo(tool, name)
    index = lambda: [path for path in repo.glob(tool.index) if path.is_file()]
    if not index():
        sys.exit(f"{tool.name} has no index at {repo}/{tool.index}")
    for path in index():
        path.unlink()
    for cache in repo.parent.glob(f"{repo.name}.cache"):
        shutil.rmtree(cache)
    bench.measure(tool, name, "rebuild index", "rebuild_index", source)
    if not index():
        sys.exit(f"{tool.name} made no index at {repo}/{tool.index}")
    bench.measure(tool, name, "", "check", source)


def changed_pages(bench: Bench, found: list[tools.Tool], source: Path) -> None:
    """Backs up an image of which 1% of the pages change, several times."""
    own = bench.work / "changing"
    shutil.copytree(source, own)
    for tool in found:
        bench.begin(tool, "pages", own)
        bench.measure(tool, "pages", "first", "backup", own, src=own, number=0)
    change = Change("pages", f"1%, {ROUNDS} times", [f"1% no. {number}" for number in range(1, ROUNDS + 1)], 0, size_mib(own))
    for number, step in enumerate(change.steps, 1):
        change.changed += data.change_image(own, number) / data.MIB
        for tool in found:
            bench.measure(tool, "pages", step, "backup", own, src=own, number=number)
    bench.changes.append(change)
    for tool in found:
        bench.restore(tool, "pages", own, ROUNDS)
    bench.drop(found, "pages")
    shutil.rmtree(own)


def database(bench: Bench, found: list[tools.Tool], scale: int) -> None:
    """Backs up the files of a PostgreSQL that is stopped, and again each time rows in more of its pages were updated."""
    name = "postgres"
    with postgres.cluster(scale) as cluster:
        for tool in found:
            bench.begin(tool, name, cluster.data)
            bench.measure(tool, name, "first", "backup", cluster.data, src=cluster.data, number=0)
        pages = data.pages(cluster.data)
        for number, percent in enumerate(UPDATED, 1):
            step = f"{percent}% updated"
            cluster.update(percent, number)
            before, pages = pages, data.pages(cluster.data)
            changed = len(pages - before) * data.PAGE / data.MIB
            bench.changes.append(Change(name, step, [step], changed, size_mib(cluster.data)))
            for tool in found:
                bench.measure(tool, name, step, "backup", cluster.data, src=cluster.data, number=number)
        for tool in found:
            bench.restore(tool, name, cluster.data, len(UPDATED))
    bench.drop(found, name)


def daily(bench: Bench, found: list[tools.Tool], size: int, files: int, versions: int) -> None:
    """Backs up each of many versions of a tree. What all of them took and stored is one row."""
    name, own = "daily", bench.work / "daily"
    data.tree(own, size, files)
    taken: dict[str, list[Row]] = {tool.name: [] for tool in found}
    for tool in found:
        bench.begin(tool, name, own)
    for number in range(versions):
        if number:
            data.change_daily(own, number)
        for tool in found:
            taken[tool.name].append(bench.measure(tool, name, "", "backup", own, src=own, number=number))
    for tool in found:
        rows = taken[tool.name]
        cpu, wall, stored = (sum(getattr(row, figure) for row in rows) for figure in ("cpu", "wall", "stored"))
        bench.note(Row(name, f"{versions} backups", tool.name, cpu, wall, max(row.rss for row in rows), stored))
        bench.restore(tool, name, own, versions - 1)
    bench.drop(found, name)
    shutil.rmtree(own)


def expire(bench: Bench, found: list[tools.Tool], source: Path, snapshots: int) -> None:
    """Backs up small files, 5% of them new each time; then takes off the older half. What stays must be whole, and restored."""
    name, own, keep = "small changing", bench.work / "small-changing", snapshots // 2
    shutil.copytree(source, own)
    for tool in found:
        bench.begin(tool, name, own)
    for number in range(snapshots):
        data.change_small(own, number)
        for tool in found:
            step = "5% new" if number == snapshots - 1 else ""
            bench.measure(tool, name, step, "backup", own, src=own, number=number)
    for tool in found:
        if tool.prepare_expire:
            bench.measure(tool, name, "", "prepare_expire", own, keep=keep)
        bench.measure(tool, name, "expire half", "expire", own, keep=keep)
        bench.measure(tool, name, "", "check_data", own)
    bench.drop(found, name)


def one_core(bench: Bench, found: list[tools.Tool], source: Path) -> None:
    for tool in found:
        basic(bench, tool, "tree", source, Where(", one core", ("taskset", "-c", "0")))
        bench.drop([tool], "tree, one core")
