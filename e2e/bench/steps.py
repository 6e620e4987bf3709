"""What is measured with one program at a time: the steps of each data set, changed pages, expiry, one core."""

import itertools
import os
import shutil
from pathlib import Path

import data
import tools
from measure import HERE, Bench, Where, compare

ROUNDS = 4  # of changed pages


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


def changed_pages(bench: Bench, found: list[tools.Tool], source: Path) -> float:
    """Backs up an image of which 1% of the pages change, several times. Returns MiB really changed."""
    own = bench.work / "changing"
    shutil.copytree(source, own)
    for tool in found:
        bench.begin(tool, "pages", own)
        bench.measure(tool, "pages", "first", "backup", own, src=own, number=0)
    changed = 0
    for number in range(1, ROUNDS + 1):
        changed += data.change_image(own, number)
        for tool in found:
            bench.measure(tool, "pages", f"1% no. {number}", "backup", own, src=own, number=number)
    for tool in found:
        bench.restore(tool, "pages", own, ROUNDS)
    bench.drop(found, "pages")
    shutil.rmtree(own)
    return changed / data.MIB


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
