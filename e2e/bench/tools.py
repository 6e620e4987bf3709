"""The programs that are compared: how each is installed and called. One place for what is fair between them."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

PASSWORD = "benchmark"
S3_KEY, S3_SECRET = "benchmark", "benchmark-secret"  # of a server that lives as long as the run
RESTIC, BORG, KOPIA, RUSTIC = "v0.19.1", "1.4.5", "v0.23.1", "0.11.4"

# Debian's packages, for a library of C that pip compiles.
BORG_NEEDS = ["libacl1-dev", "liblz4-dev", "libssl-dev", "libxxhash-dev", "libzstd-dev", "pkg-config"]
# FOLDER MODULE VERSION. Unlike `go install` it needs no list of all versions, which not every module proxy has.
GO_BUILD = """set -e
mkdir -p "$1/module"
cd "$1/module"
rm -f go.mod go.sum
go mod init bench
go mod edit -require="$2@$3"
GOFLAGS=-mod=mod go build -o "$1/bin/${2##*/}" "$2"
"""


Command = list[str]


@dataclass
class Tool:
    """One program. Of its verbs `{repo}`, `{src}`, `{out}` stand for folders; `{number}` for the backup's number, `{lineage}`
    for what it is a backup of, `{path}` for a file below `src`, `{keep}` for how many of the newest backups stay. `src` and
    `out` are where the backup and the restore are started. A verb that is None is one that the program does not have."""

    name: str
    program: Path
    options: str
    init: Command
    backup: Command
    read_again: Command | None  # a backup that reads every file, also those that look unchanged
    restore: Command
    restore_sparse: Command | None  # the same, and holes stay holes
    one_file: Command | None
    check: Command | None  # what is stored and refers to it, not the data
    check_data: Command | None
    expire: list[Command] | None  # takes the older backups off, and all their space back at once
    expire_beside: list[Command] | None  # the same by settings that are safe beside backups
    env: dict[str, str] = field(default_factory=dict)
    prepare: list[Command] = field(default_factory=list)  # once after `init`, where that does not say all
    prepare_expire: list[Command] = field(default_factory=list)  # rules of which backups stay, where `expire` does not say them
    s3_init: Command | None = None
    s3_env: dict[str, str] | None = None  # `{endpoint}` is HOST:PORT, `{bucket}` a bucket; None: it does not know S3
    rebuild_index: Command | None = None  # makes it anew from what is stored
    index: str = ""  # pattern of its files below the repository

    def version(self) -> str:
        done = subprocess.run([self.program, "--version" if self.name != "restic" else "version"],
                              capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()[0]

    def commands(self, verb: str, **values) -> list[Command] | None:
        """What does the verb, in this order; None when the program does not have it."""
        words = getattr(self, verb)
        if words is None:
            return None
        several = words if not words or isinstance(words[0], list) else [words]
        return [[str(self.program), *(word.format(**values) for word in one)] for one in several]

    def environment(self, repo: Path) -> dict[str, str]:
        own = {name: value.format(repo=repo) for name, value in self.env.items()}
        return {"PATH": os.environ["PATH"], "HOME": str(repo.parent), **own}

    def on_s3(self, endpoint: str, bucket: str) -> "Tool | None":
        """The same program with a repository in this bucket; its caches stay where they are."""
        if self.s3_env is None:
            return None
        fill = lambda text: text.replace("{endpoint}", endpoint).replace("{bucket}", bucket)
        keys = {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_REGION": "us-east-1"}
        own = {name: fill(value) for name, value in self.s3_env.items()}
        return replace(self, init=[fill(word) for word in self.s3_init or self.init], env={**self.env, **keys, **own})


def lifeboat(program: Path) -> Tool:
    backup = ["--quiet", "backup", "--lineage", "{lineage}", "{src}"]
    restore = ["--quiet", "restore", "latest", "{out}"]
    check = ["--quiet", "check"]
    expire = [["--quiet", "forget", "--keep-last", "{keep}"], ["--quiet", "expire", "--wait", "1s"]]
    return Tool("lifeboat", program, "defaults: AES-256-GCM, zstd 1", ["--quiet", "init"], backup, [*backup, "--force"],
                restore, restore, [*restore, "--include", "{path}"], check, [*check, "--read-data"], expire, expire,
                {"LIFEBOAT_REPOSITORY": "{repo}", "LIFEBOAT_PASSWORD": PASSWORD, "LIFEBOAT_CACHE_DIR": "{repo}.cache"},
                s3_env={"LIFEBOAT_REPOSITORY": "s3://{bucket}/lifeboat?endpoint=http://{endpoint}&region=us-east-1"},
                rebuild_index=["--quiet", "rebuild-index"], index="x0/**/*")


def restic(program: Path) -> Tool:
    backup = ["backup", "--quiet", "--read-concurrency", "2", "{src}"]
    restore = ["restore", "--quiet", "latest:{src}", "--target", "{out}"]
    check = ["check", "--quiet"]
    expire = [["forget", "--quiet", "--keep-last", "{keep}", "--prune"]]
    return Tool("restic", program, "--read-concurrency 2, zstd by default", ["init", "--quiet"], backup, [*backup, "--force"],
                restore, [*restore, "--sparse"], [*restore, "--include", "/{path}"], check, [*check, "--read-data"], expire, expire,
                {"RESTIC_REPOSITORY": "{repo}", "RESTIC_PASSWORD": PASSWORD, "RESTIC_CACHE_DIR": "{repo}.cache"},
                s3_env={"RESTIC_REPOSITORY": "s3:http://{endpoint}/{bucket}/restic"},
                rebuild_index=["repair", "index", "--quiet", "--read-all-packs"], index="index/*")


def borg(program: Path) -> Tool:
    create = ["create", "--compression", "zstd,3"]
    archive = ["::{lineage}-{number}", "."]
    restore = ["extract", "::{lineage}-{number}"]
    # Without --archives-only it reads all data as well, and compares their CRC.
    expire = [["prune", "--keep-secondly", "{keep}"], ["compact"]]
    return Tool("borg", program, "repokey-blake2, zstd 3", ["init", "--encryption", "repokey-blake2"],
                [*create, *archive], [*create, "--files-cache", "disabled", *archive], restore, ["extract", "--sparse", *restore[1:]],
                [*restore, "{path}"], ["check", "--archives-only"], ["check", "--verify-data"], expire, expire,
                {"BORG_REPO": "{repo}", "BORG_PASSPHRASE": PASSWORD, "BORG_BASE_DIR": "{repo}.cache"})


def kopia(program: Path) -> Tool:
    backup = ["snapshot", "create", "--no-progress", "--parallel", "2", "{src}"]
    restore = ["snapshot", "restore", "--no-progress", "--snapshot-time", "latest"]
    check = ["snapshot", "verify", "--no-progress"]
    drop = ["snapshot", "expire", "--all", "--delete"]
    reclaim = ["maintenance", "run", "--full", "--safety", "none"]  # its first run marks as deleted what the second takes back
    none = [word for span in ("hourly", "daily", "weekly", "monthly", "annual") for word in (f"--keep-{span}", "0")]
    return Tool("kopia", program, "zstd, no upload limits, --parallel 2", ["repository", "create", "filesystem", "--path", "{repo}"],
                backup, [*backup, "--force-hash", "100"], [*restore, "{src}", "{out}"],
                [*restore, "--write-sparse-files", "{src}", "{out}"], [*restore, "{src}/{path}", "{out}/{path}"],
                check, [*check, "--verify-files-percent", "100"],
                [drop, reclaim, reclaim], [drop, ["maintenance", "run", "--full"]],
                {"KOPIA_PASSWORD": PASSWORD, "KOPIA_CONFIG_PATH": "{repo}.config/repository.config", "KOPIA_CACHE_DIRECTORY": "{repo}.cache",
                 "KOPIA_CHECK_FOR_UPDATES": "false", "KOPIA_LOG_DIR": "{repo}.logs"},
                [["policy", "set", "--global", "--compression", "zstd"]],
                [["policy", "set", "--global", "--keep-latest", "{keep}", *none]],
                ["repository", "create", "s3", "--bucket", "{bucket}", "--endpoint", "{endpoint}", "--disable-tls",
                 "--region", "us-east-1", "--prefix", "kopia/"], {},
                ["index", "recover", "--dangerous-commands", "enabled", "--parallel", "2", "--commit"], "x*/**/*.f")


def rustic(program: Path) -> Tool:
    backup = ["--no-progress", "backup", "{src}"]
    restore = ["--no-progress", "restore", "latest:{src}", "{out}"]
    check = ["--no-progress", "check"]
    forget = ["--no-progress", "forget", "--keep-last", "{keep}", "--prune"]
    return Tool("rustic", program, "zstd by default", ["--no-progress", "init"], backup, [*backup, "--force"],
                restore, [*restore, "--sparse", "by-content"], ["--no-progress", "restore", "latest:{src}/{path}", "{out}/{path}"], check, [*check, "--read-data"],
                [[*forget, "--instant-delete"]], [forget],
                {"RUSTIC_REPOSITORY": "{repo}", "RUSTIC_PASSWORD": PASSWORD, "RUSTIC_CACHE_DIR": "{repo}.cache"},
                s3_env={"RUSTIC_REPOSITORY": "opendal:s3", "OPENDAL_BUCKET": "{bucket}", "OPENDAL_ROOT": "/rustic",
                        "OPENDAL_ENDPOINT": "http://{endpoint}", "OPENDAL_REGION": "us-east-1"},
                rebuild_index=["--no-progress", "repair", "index", "--read-all"], index="index/**/*")


def debian(*packages: str) -> list[Command]:
    """What installs Debian's packages that are missing."""
    return [["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "--no-install-recommends", "--no-upgrade", *packages]]


def attempt(steps: list[list], env: dict[str, str]) -> str:
    """Runs commands until one fails. Returns the reason; nothing when none did."""
    for step in steps:
        done = subprocess.run([str(word) for word in step], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", **env},
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return ""


def installed(cache: Path, name: str, steps: list[list]) -> tuple[Path | None, str]:
    """The program in the cache, else installed there by `steps`, else on PATH; or the reason why there is none."""
    program = cache / name / "bin" / name
    failed = "" if program.exists() else attempt(steps, {"GOBIN": str(program.parent)})
    if program.exists():
        return program, ""
    found = shutil.which(name)
    return (Path(found), "") if found else (None, failed or "not on PATH")


def peers(cache: Path) -> tuple[list[Tool], dict[str, str]]:
    """Those that can be had, and why the others cannot."""
    venv = cache / "borg"
    wanted = {
        "restic": (restic, [["go", "install", f"github.com/restic/restic/cmd/restic@{RESTIC}"]]),
        "borg": (borg, [*debian(*BORG_NEEDS), ["python3", "-m", "venv", venv],
                         [venv / "bin" / "pip", "install", "--quiet", f"borgbackup=={BORG}"]]),
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
