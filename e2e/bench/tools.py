"""The programs that are compared: how each is installed and called. One place for what is fair between them."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

PASSWORD = "benchmark"
RESTIC, BORG, KOPIA, RUSTIC = "v0.19.1", "1.4.5", "v0.23.1", "0.11.4"

# FOLDER MODULE VERSION. Unlike `go install` it needs no list of all versions, which not every module proxy has.
GO_BUILD = """set -e
mkdir -p "$1/module"
cd "$1/module"
rm -f go.mod go.sum
go mod init bench
go mod edit -require="$2@$3"
GOFLAGS=-mod=mod go build -o "$1/bin/${2##*/}" "$2"
"""


@dataclass
class Tool:
    """One program. `{repo}`, `{src}`, `{out}` stand for folders, `{number}` for the backup's; `src` and `out` are where
    the backup and the restore are started. `prepare` is run once after `init` where that does not say all."""

    name: str
    program: Path
    options: str
    init: list[str]
    backup: list[str]
    restore: list[str]
    env: dict[str, str] = field(default_factory=dict)
    prepare: list[str] = field(default_factory=list)

    def version(self) -> str:
        done = subprocess.run([self.program, "--version" if self.name != "restic" else "version"],
                              capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()[0]

    def command(self, verb: str, **values) -> list[str]:
        return [str(self.program), *(word.format(**values) for word in getattr(self, verb))]

    def environment(self, repo: Path) -> dict[str, str]:
        own = {name: value.format(repo=repo) for name, value in self.env.items()}
        return {"PATH": os.environ["PATH"], "HOME": str(repo.parent), **own}


def lifeboat(program: Path) -> Tool:
    return Tool("lifeboat", program, "defaults: AES-256-GCM, zstd 1", ["--quiet", "init"],
                ["--quiet", "backup", "--lineage", "bench", "{src}"], ["--quiet", "restore", "latest", "{out}"],
                {"LIFEBOAT_REPOSITORY": "{repo}", "LIFEBOAT_PASSWORD": PASSWORD})


def restic(program: Path) -> Tool:
    return Tool("restic", program, "--read-concurrency 2, zstd by default", ["init", "--quiet"],
                ["backup", "--quiet", "--read-concurrency", "2", "{src}"],
                ["restore", "--quiet", "latest:{src}", "--target", "{out}"],
                {"RESTIC_REPOSITORY": "{repo}", "RESTIC_PASSWORD": PASSWORD, "RESTIC_CACHE_DIR": "{repo}.cache"})


def borg(program: Path) -> Tool:
    return Tool("borg", program, "repokey-blake2, zstd 3", ["init", "--encryption", "repokey-blake2"],
                ["create", "--compression", "zstd,3", "::{number}", "."], ["extract", "::{number}"],
                {"BORG_REPO": "{repo}", "BORG_PASSPHRASE": PASSWORD, "BORG_BASE_DIR": "{repo}.cache"})


def kopia(program: Path) -> Tool:
    return Tool("kopia", program, "zstd, no upload limits, --parallel 2", ["repository", "create", "filesystem", "--path", "{repo}"],
                ["snapshot", "create", "--no-progress", "--parallel", "2", "{src}"],
                ["snapshot", "restore", "--no-progress", "--snapshot-time", "latest", "{src}", "{out}"],
                {"KOPIA_PASSWORD": PASSWORD, "KOPIA_CONFIG_PATH": "{repo}.config/repository.config", "KOPIA_CACHE_DIRECTORY": "{repo}.cache",
                 "KOPIA_CHECK_FOR_UPDATES": "false", "KOPIA_LOG_DIR": "{repo}.logs"},
                ["policy", "set", "--global", "--compression", "zstd"])


def rustic(program: Path) -> Tool:
    return Tool("rustic", program, "zstd by default", ["--no-progress", "init"], ["--no-progress", "backup", "{src}"],
                ["--no-progress", "restore", "latest:{src}", "{out}"],
                {"RUSTIC_REPOSITORY": "{repo}", "RUSTIC_PASSWORD": PASSWORD, "RUSTIC_CACHE_DIR": "{repo}.cache"})


def installed(cache: Path, name: str, steps: list[list]) -> tuple[Path | None, str]:
    """The program in the cache, else installed there by `steps`, else on PATH; or the reason why there is none."""
    program = cache / name / "bin" / name
    failed = "not on PATH"
    if not program.exists():
        for step in steps:
            env = {**os.environ, "GOBIN": str(program.parent)}
            done = subprocess.run([str(word) for word in step], env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failed = (done.stderr.strip().splitlines() or ["no message"])[-1]
                break
    if program.exists():
        return program, ""
    found = shutil.which(name)
    return (Path(found), "") if found else (None, failed)


def peers(cache: Path) -> tuple[list[Tool], dict[str, str]]:
    """Those that can be had, and why the others cannot."""
    venv = cache / "borg"
    wanted = {
        "restic": (restic, [["go", "install", f"github.com/restic/restic/cmd/restic@{RESTIC}"]]),
        "borg": (borg, [["python3", "-m", "venv", venv], [venv / "bin" / "pip", "install", "--quiet", f"borgbackup=={BORG}"]]),
        "kopia": (kopia, [["sh", "-c", GO_BUILD, "sh", cache / "kopia", "github.com/kopia/kopia", KOPIA]]),
        "rustic": (rustic, [["cargo", "install", "--quiet", "--locked", "--root", cache / "rustic", f"rustic-rs@{RUSTIC}"]]),
    }
    found, absent = [], {}
    for name, (make, steps) in wanted.items():
        program, failed = installed(cache, name, steps)
        if program is None:
            absent[name] = failed
        else:
            found.append(make(program))
    return found, absent
