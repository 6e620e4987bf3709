"""A PostgreSQL database of the benchmark's own, of Debian's programs: a user without rights runs its server, and only a socket
in a private folder leads to it. Measures nothing."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tools

USER = "postgres"  # Debian's package makes it; the server refuses to be run by root
ROWS = 100_000  # that pgbench makes for each unit of its scale
FREE = 10  # per cent of each page, so that a row that is updated stays in its page
# Pages change by the updates alone, and the log of writes is short. A crash of the machine would lose all of it anyway.
SETTINGS = """
listen_addresses = ''
autovacuum = off
fsync = off
min_wal_size = 32MB
max_wal_size = 64MB
"""


def newest() -> Path | None:
    """The folder of the programs of the newest version that is installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: float(path.parent.name), default=None)


def programs() -> Path:
    """The same, installed when there is none."""
    failed = "" if newest() else tools.attempt(tools.debian("postgresql"), {})
    found = newest()
    if not found:
        sys.exit(f"there is no PostgreSQL, and Debian's package cannot be installed: {failed or 'it has no programs'}")
    return found


class Cluster:
    """A data directory that pgbench filled. Its server runs only while something is changed."""

    def __init__(self, folder: Path, scale: int):
        self.programs, self.folder, self.data, self.rows = programs(), folder, folder / "data", scale * ROWS
        self.as_user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
        if self.as_user:
            shutil.chown(folder, USER, USER)
        self.run("initdb", "--no-sync", "--auth=trust", "--locale=C", "--encoding=UTF8", f"--username={USER}", f"--pgdata={self.data}")
        with (self.data / "postgresql.conf").open("a") as settings:
            settings.write(f"{SETTINGS}unix_socket_directories = '{folder}'\n")
        with self.server():
            self.run("pgbench", "--initialize", "--quiet", f"--scale={scale}", f"--fillfactor={100 - FREE}")
            self.pages = int(self.sql("select relpages from pg_class where relname = 'pgbench_accounts'"))

    def run(self, program: str, *arguments: str) -> str:
        command = [str(self.programs / program), *arguments]
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PGHOST": str(self.folder), "PGUSER": USER, "PGDATABASE": "postgres"}
        done = subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, check=False, **self.as_user)
        if done.returncode != 0:
            log = self.folder / "log"
            said = log.read_text(errors="replace") if log.exists() else ""
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}{said}")
        return done.stdout

    def sql(self, text: str) -> str:
        return self.run("psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", f"--command={text}").strip()

    @contextmanager
    def server(self) -> Iterator[None]:
        """A server that is stopped cleanly at the end: all that it wrote is in the files then."""
        control = lambda *words: self.run("pg_ctl", f"--pgdata={self.data}", "--wait", *words)
        try:
            control(f"--log={self.folder / 'log'}", "start")
            yield
        except BaseException:
            if (self.data / "postmaster.pid").exists():
                control("--mode=immediate", "stop")
            raise
        control("--mode=fast", "stop")

    def update(self, percent: int, seed: int) -> None:
        """Updates rows at random, the same in every run, as many as meet this share of the table's pages."""
        count = round(-math.log(1 - percent / 100) * self.pages)  # some meet a page that was met before
        chosen = f"select 1 + floor(random() * {self.rows})::int from generate_series(1, {count})"
        with self.server():
            self.sql(f"select setseed({seed / 100}); update pgbench_accounts set abalance = abalance + 1 where aid in ({chosen})")


@contextmanager
def cluster(scale: int) -> Iterator[Cluster]:
    """A cluster in a folder that is gone afterwards. The benchmark's own folder may lie where only its user gets."""
    with tempfile.TemporaryDirectory(prefix="lifeboat-bench-", dir="/var/tmp") as folder:
        yield Cluster(Path(folder).resolve(), scale)
