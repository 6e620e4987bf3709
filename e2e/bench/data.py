"""Makes the data sets of the benchmark, the same bytes on every machine. Writes nothing outside of its folder."""

import functools
import hashlib
import itertools
import os
import random
from pathlib import Path

PAGE = 8192
MIB = 1 << 20
# size name -> what each set is made of: bytes, files, or both; of `daily` also how many versions, of `postgres` the scale of pgbench
SIZES = {
    "small": {"tree": (6 * MIB, 400), "small": 2_000, "image": 24 * MIB, "noise": 16 * MIB, "sparse": 256 * MIB, "large": 20,
              "daily": (2 * MIB, 200, 5), "postgres": 1},
    "medium": {"tree": (160 * MIB, 11_000), "small": 50_000, "image": 256 * MIB, "noise": 512 * MIB, "sparse": 4096 * MIB, "large": 400,
               "daily": (30 * MIB, 1_300, 15), "postgres": 8},
    "full": {"tree": (693 * MIB, 46_000), "small": 200_000, "image": 1536 * MIB, "noise": 2048 * MIB, "sparse": 16384 * MIB, "large": 2_000,
             "daily": (100 * MIB, 4_500, 30), "postgres": 28},
}


def described(size: str) -> list[str]:
    """What each set is, for the page."""
    plan = SIZES[size]
    whole = lambda name: f"{plan[name] / MIB:,.0f} MiB"
    return [
        f"*tree*: {plan['tree'][0] / MIB:,.0f} MiB of text like source code in {plan['tree'][1]:,} files.",
        f"*small*: {plan['small']:,} files of 50 to 3,000 bytes. *small changing*: the same, 5% of them new before each backup.",
        f"*image*: {whole('image')} like those of a database. *pages*: the same, 1% of its pages of 8 KiB changed before each backup.",
        f"*noise*: {whole('noise')} of random bytes.",
        f"*sparse*: {whole('sparse')}, of which each 128th is data.",
        f"*large*: {plan['large']:,} files of 1 MiB, half of each random bytes and half text; at size `full` a fifth of the 10,000 that are wanted, "
        "for the disk's sake.",
        f"*daily*: {plan['daily'][2]} versions of a tree of {plan['daily'][0] / MIB:,.0f} MiB in {plan['daily'][1]:,} files, a backup each: from "
        "one to the next 2% of the files are edited, 1% appear, 1% go, and a log grows. Figures are of all these backups together.",
        f"*postgres*: the data directory of a PostgreSQL that pgbench filled at scale {plan['postgres']}, as files, the server stopped; "
        "then rows in about 1, 5 and 20% of the large table's pages are updated, which also writes to the write-ahead log.",
    ]


def lines(rng: random.Random) -> list[str]:
    """Lines that look like source code: few words, often used; some names that are rare."""
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz_", k=rng.randint(3, 12))) for _ in range(4000)]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))  # summed once: `choices` would each time
    made = []
    for _ in range(30_000):
        text = " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(2, 9)))
        made.append("    " * rng.randint(0, 4) + text + rng.choice([";\n", " {\n", ")\n", ",\n", "\n"]))
    return made


def tree(root: Path, total: int, files: int) -> None:
    rng = random.Random(1)
    stock = lines(rng)
    average = len("".join(stock)) // len(stock)
    sizes = [int(rng.lognormvariate(8.3, 1.4)) + 40 for _ in range(files)]
    scale = total / sum(sizes)
    for number, size in enumerate(sizes):
        folder = root / f"part{number % 37:02}" / f"module{number // 37 % 83:02}"
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(rng.choices(stock, k=max(1, int(size * scale) // average)))
        (folder / f"file{number:05}.rs").write_text(f"// {number} {rng.random()}\n{text}")


def small(root: Path, files: int) -> None:
    rng = random.Random(2)
    stock = lines(rng)
    for number in range(files):
        folder = root / f"{number // 1000:03}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number % 1000:03}.json").write_text(small_text(rng, stock, number))


def small_text(rng: random.Random, stock: list[str], number: int) -> str:
    text = "".join(rng.choices(stock, k=80))[: rng.randint(50, 3000) - 8]
    return f"{number:07} {text}"


@functools.cache
def few_lines() -> list[str]:
    """Made once, for what is changed while others run."""
    return lines(random.Random(6))


def warm(root: Path) -> None:
    """Reads everything once: the first program finds it in memory as the others do."""
    for folder, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                while file.read(1 << 20):
                    pass


def change_small(root: Path, round_number: int) -> None:
    """Gives 5% of the small files new bytes; every second of these becomes another file instead."""
    rng = random.Random(200 + round_number)
    stock = few_lines()
    files = sorted(root.rglob("*.json"))
    for place, path in enumerate(rng.sample(files, max(2, len(files) // 20))):
        if place % 2:
            path.unlink()
            path = path.with_name(f"{path.stem[:3]}-{round_number}-{place}.json")
        path.write_text(small_text(rng, stock, round_number))


def page(rng: random.Random, stock: list[str]) -> bytes:
    """A page like those of a database: a header, rows of numbers and text, some room at its end."""
    rows = b"".join(rng.randbytes(24) + line.encode() for line in rng.choices(stock, k=100))
    return (rng.randbytes(24) + rows)[: PAGE - 800].ljust(PAGE, b"\0")


def image(root: Path, size: int) -> None:
    rng = random.Random(3)
    stock = lines(rng)
    root.mkdir()
    with (root / "disk.img").open("wb") as out:
        for _ in range(size // PAGE):
            out.write(page(rng, stock))


def change_image(root: Path, round_number: int) -> int:
    """Changes 1% of the pages in place. Returns the bytes changed."""
    rng = random.Random(100 + round_number)
    stock = lines(rng)
    with (root / "disk.img").open("r+b") as out:
        pages = os.fstat(out.fileno()).st_size // PAGE
        chosen = rng.sample(range(pages), max(1, pages // 100))
        for number in chosen:
            out.seek(number * PAGE)
            out.write(page(rng, stock))
    return len(chosen) * PAGE


def pages(root: Path) -> set[bytes]:
    """Sums of the different pages of all files, as each begins at a multiple of their size."""
    found = set()
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                found.update(hashlib.blake2b(piece, digest_size=16).digest() for piece in iter(lambda: file.read(PAGE), b""))
    return found


def change_daily(root: Path, day: int) -> None:
    """Two of each hundred files are edited, one appears, one goes; and a log grows."""
    rng = random.Random(300 + day)
    stock = few_lines()
    files = sorted(root.rglob("*.rs"))
    part = max(1, len(files) // 100)
    chosen = rng.sample(files, 4 * part)
    some = lambda: "".join(rng.choices(stock, k=rng.randint(1, 9)))
    for path in chosen[: 2 * part]:
        text = path.read_text()
        place = rng.randrange(len(text))
        path.write_text(text[:place] + some() + text[place:])
    for path in chosen[2 * part : 3 * part]:
        path.with_name(f"{path.stem}-{day}.rs").write_text(f"// {day} {rng.random()}\n" + "".join(some() for _ in range(100)))
    for path in chosen[3 * part :]:
        path.unlink()
    with (root / "log").open("a") as log:
        log.writelines(f"{day} {rng.random()} {line}" for line in rng.choices(stock, k=len(files)))


def noise(root: Path, size: int) -> None:
    rng = random.Random(4)
    root.mkdir()
    with (root / "noise.bin").open("wb") as out:
        for _ in range(size // (8 * MIB)):
            out.write(rng.randbytes(8 * MIB))


def sparse(root: Path, size: int) -> None:
    rng = random.Random(5)
    root.mkdir()
    with (root / "sparse.img").open("wb") as out:
        out.truncate(size)
        for start in range(0, size, 64 * MIB):
            out.seek(start)
            out.write(rng.randbytes(MIB // 2))


def large(root: Path, files: int) -> None:
    """Files of 1 MiB: 64 KiB of random bytes and of text in turn."""
    rng = random.Random(7)
    stock = lines(rng)
    piece, folder = 64 << 10, 100
    for number in range(files):
        path = root / f"{number // folder:03}" / f"{number % folder:02}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            for _ in range(MIB // piece // 2):
                text = "".join(rng.choices(stock, k=piece // 40))  # half as much again as is needed
                out.write(rng.randbytes(piece) + text.encode()[:piece])


def make(base: Path, size: str) -> dict[str, Path]:
    """The sets of this size below `base`, made unless they are there."""
    plan = SIZES[size]
    makers = {
        "tree": lambda root: tree(root, *plan["tree"]),
        "small": lambda root: small(root, plan["small"]),
        "image": lambda root: image(root, plan["image"]),
        "noise": lambda root: noise(root, plan["noise"]),
        "sparse": lambda root: sparse(root, plan["sparse"]),
        "large": lambda root: large(root, plan["large"]),
    }
    base.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, maker in makers.items():
        root, done = base / name, base / f".{name}.made"
        if not done.exists():
            if root.exists():
                raise SystemExit(f"{root} is half made: remove it and start again")
            print(f"making {root}", flush=True)
            maker(root)
            done.touch()
        made[name] = root.resolve()  # rustic stores the path without links, and is asked for it
    return made
