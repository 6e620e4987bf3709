#!/usr/bin/env python3
"""Measures backup and restore of a whole application on the three-node cluster, and writes the table.

The cluster is set up by `app`; here it is only used. It is measured from outside: what the API server and the
bucket show, and what the kernel says of the programs' processes. A wait is on a condition, never on time alone.

Environment: SCALE (default 1, the sizes of the published table), OUT (the page to write), METHOD (how volumes are read; default:
what a policy that does not say it gets), NOTE (a sentence about the machine).
"""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import pathlib
import random
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
LAUNCHER = str(HERE.parent / "cluster/cluster")
NAMESPACE, OBJECTS_NAMESPACE, VOLUMES_NAMESPACE = "bench-app", "bench-objects", "bench-volumes"
PATIENCE = 900  # seconds
SCALE = float(os.environ.get("SCALE", "1"))
ROWS, FILES, BLOB_MIB, OBJECTS = (max(1, round(full * SCALE)) for full in (6_500_000, 50_000, 1024, 6_000))
VOLUMES = (1, 10, 100) if SCALE >= 1 else (1, 10)
VOLUMES_OF_A_POD = 10
METHOD = os.environ.get("METHOD")
PROGRAMS = {"lifeboat-contro": "controller", "lifeboat-agent": "agents"}  # the kernel keeps 15 letters of a name


def run(*command, text=None, ok=True):
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if ok and done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def kubectl(*arguments, text=None, ok=True, namespace=NAMESPACE):
    return run("kubectl", "-n", namespace, *arguments, text=text, ok=ok)


def say(what):
    print(f"[{time.monotonic() - BEGUN:7.1f} s] {what}", flush=True)


BEGUN = time.monotonic()


# --- what is measured from outside


def processes():
    """CPU seconds, and resident and peak memory, of every process of ours that stays, by program: not of helper pods, which only
    hold a volume."""
    # Without awk, which in a node is a link to nowhere.
    script = r"""for p in /proc/[0-9]*; do read -r comm <$p/comm
      case "$comm $(tr '\0' ' ' <$p/cmdline)" in lifeboat-contro*' run '*|lifeboat-agent*' run '*|lifeboat-agent*' guard '*) echo $comm ${p#/proc/} $(cut -d' ' -f14,15 $p/stat) $(sed -n 's/^\(VmHWM\|VmRSS\|RssFile\):[^0-9]*\([0-9]*\) kB$/\2/p' $p/status);; esac; done"""
    found = []
    for node in ("n1", "n2", "n3"):
        for line in run(LAUNCHER, "in-node", node, "bash", "-c", script, ok=False).splitlines():
            fields = line.split()
            if len(fields) != 7:  # it has ended and has no memory any more
                continue
            program, pid, user, system, peak, resident, of_files = fields
            cpu = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            found.append({"program": PROGRAMS[program], "node": node, "pid": pid, "cpu": cpu, "peak": int(peak) << 10, "resident": int(resident) << 10, "of_files": int(of_files) << 10})
    if {one["program"] for one in found} != set(PROGRAMS.values()):
        raise SystemExit("the programs' processes were not found")
    return found


def total(found, field, program=None):
    return sum(one[field] for one in found if program in (None, one["program"]))


def on_nodes(found):
    """Resident memory of the agents' processes, where those of one node share the pages of their program's file."""
    nodes = {}
    for one in (one for one in found if one["program"] == "agents"):
        nodes.setdefault(one["node"], []).append(one)
    return sum(total(ones, "resident") - total(ones, "of_files") + max(one["of_files"] for one in ones) for ones in nodes.values())


def forget_peaks(found):
    for one in found:
        run(LAUNCHER, "in-node", one["node"], "bash", "-c", f"echo 5 >/proc/{one['pid']}/clear_refs")


def bucket_bytes():
    folder = run(LAUNCHER, "s3", "folder", NAMESPACE).strip()
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())


class Measured:
    """Wall time, CPU time, peak memory and growth of the bucket between entering and leaving."""

    def __enter__(self):
        self.before, self.bucket = processes(), bucket_bytes()
        forget_peaks(self.before)
        self.begun = time.monotonic()
        return self

    def __exit__(self, failed, *_):
        self.wall = time.monotonic() - self.begun
        if failed:
            return
        after = processes()
        if {one["pid"] for one in after} != {one["pid"] for one in self.before}:
            raise SystemExit("a program was restarted while it was measured")
        self.cpu = total(after, "cpu") - total(self.before, "cpu")
        self.controller, self.agents = total(after, "peak", "controller"), total(after, "peak", "agents")
        self.agent = max((one["peak"] for one in after if one["program"] == "agents"), default=0)
        self.grown = bucket_bytes() - self.bucket


# --- what is done


def wait_succeeded(kind, name, namespace):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = json.loads(kubectl("get", kind, name, "-o", "json", namespace=namespace))
        for condition in found.get("status", {}).get("conditions", []):
            if condition["type"] == "Succeeded" and condition["status"] == "True":
                return found
            if condition["type"] == "Succeeded" and condition["status"] == "False":
                raise SystemExit(f"{kind} {name} failed: {condition['message']}")
        time.sleep(0.05)
    raise SystemExit(f"{kind} {name} did not end within {PATIENCE} s")


def create(kind, name, spec, namespace=NAMESPACE):
    manifest = {"apiVersion": "lifeboat.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    kubectl("create", "-f", "-", text=json.dumps(manifest), namespace=namespace)


def back_up(name, namespace=NAMESPACE, quiesce=False):
    plan = {"tiers": [{"repository": {"ref": {"name": NAMESPACE}}}]}
    if METHOD:
        plan["volumes"] = [{"match": {}, "method": METHOD}]
    if quiesce:
        postgres = {"matchLabels": {"app": "postgres"}}
        plan["quiesce"] = {"maxFreeze": "50s", "steps": [{"selector": postgres, "template": {"name": "postgresql-checkpoint"}}, {"selector": postgres, "fsfreeze": {}}]}
    create("Backup", name, {"plan": plan}, namespace)
    return wait_succeeded("backup", name, namespace)


def restore(name, namespace):
    create("Restore", name, {"source": {"repository": {"ref": {"name": NAMESPACE}}}}, namespace)
    return wait_succeeded("restore", name, namespace)


def sql(text):
    return kubectl("exec", "postgres-0", "--", "psql", "-U", "postgres", "-d", "postgres", "-qAtc", text).strip()


def lose(namespace):
    kubectl("delete", "namespace", namespace, "--timeout=300s")
    kubectl("create", "namespace", namespace)


def wait_ready(name):
    kubectl("rollout", "status", f"statefulset/{name}", f"--timeout={PATIENCE}s")


def secret(name, data):
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "lifeboat-system"}, "stringData": data}


def repository():
    kubectl("delete", "clusterrepository", NAMESPACE, "--ignore-not-found")
    run(LAUNCHER, "s3", "remove-bucket", NAMESPACE)
    run(LAUNCHER, "s3", "bucket", NAMESPACE)
    keys = {key: os.environ[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    backend = {"s3": {"bucket": NAMESPACE, "endpoint": os.environ["REPOSITORY_ENDPOINT"], "credentials": {"secretRef": {"name": "bench-bucket"}}}}
    repository = {
        "apiVersion": "lifeboat.dev/v1alpha1", "kind": "ClusterRepository", "metadata": {"name": NAMESPACE},
        "spec": {"backend": backend, "encryption": {"secretRef": {"name": "bench-key"}}, "allowedNamespaces": {"from": "All"}},
    }
    for manifest in (secret("bench-bucket", keys), secret("bench-key", {"password": "a passphrase for benchmarks"}), repository):
        kubectl("apply", "-f", "-", text=json.dumps(manifest), namespace="lifeboat-system")
    kubectl("wait", f"clusterrepository/{NAMESPACE}", "--for=condition=Ready", "--timeout=60s")


def application():
    kubectl("apply", "-f", str(HERE / "app.yaml"))
    for name in ("postgres", "files", "blob"):
        wait_ready(name)
    sql("create table rows (id bigserial primary key, customer text not null, amount bigint not null, placed timestamptz not null)")
    sql(f"insert into rows (customer, amount, placed) select md5(n::text), n % 10000, timestamptz '2026-01-01' + n * interval '1 second' from generate_series(1, {ROWS}) n")
    sql("create table heartbeat (at timestamptz not null)")
    sql("vacuum analyze rows")
    sql("checkpoint")
    fill_files()
    kubectl("exec", "blob-0", "--", "sh", "-c", f"dd if=/dev/urandom of=/data/blob bs=1M count={BLOB_MIB} 2>/dev/null; sync")


def fill_files():
    """Files of 1 to 8 KiB, a thousand a folder, the same in every run."""
    random_bytes = random.Random(1)
    command = ["kubectl", "-n", NAMESPACE, "exec", "-i", "files-0", "--", "sh", "-c", "tar xf - -C /data && sync"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as pod:
        with tarfile.open(fileobj=pod.stdin, mode="w|") as archive:
            for number in range(FILES):
                entry = tarfile.TarInfo(f"{number // 1000:03}/{number}")
                entry.size = random_bytes.randint(1024, 8192)
                archive.addfile(entry, io.BytesIO(random_bytes.randbytes(entry.size)))
    if pod.returncode != 0:
        raise SystemExit("the files were not written")


class Writer:
    """A client of the database that commits a hundred times a second; its largest gap between two commits."""

    def __enter__(self):
        sql("truncate heartbeat")
        kubectl("exec", "postgres-0", "--", "sh", "-c", "echo 'insert into heartbeat values (clock_timestamp());' >/tmp/beat.sql")
        beat = ["pgbench", "-U", "postgres", "-n", "-f", "/tmp/beat.sql", "-R", "100", "-T", str(PATIENCE), "postgres"]
        self.process = subprocess.Popen(["kubectl", "-n", NAMESPACE, "exec", "postgres-0", "--", *beat], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while int(sql("select count(*) from heartbeat")) < 100:
            if time.monotonic() > end:
                raise SystemExit("the writer does not write")
            time.sleep(0.1)
        sql("truncate heartbeat")
        return self

    def __exit__(self, *_):
        self.gap = float(sql("select coalesce(max(extract(epoch from gap)), 0) from (select at - lag(at) over (order by at) as gap from heartbeat) g"))
        kubectl("exec", "postgres-0", "--", "pkill", "-x", "pgbench", ok=False)
        self.process.wait()


class ApiServer:
    """Creates many objects over a few connections, faster than kubectl does."""

    def __init__(self):
        view = json.loads(run("kubectl", "config", "view", "--raw", "--minify", "-o", "json"))
        cluster, user = view["clusters"][0]["cluster"], view["users"][0]["user"]
        self.address = cluster["server"].removeprefix("https://")
        text = lambda data: base64.b64decode(data).decode()
        self.context = ssl.create_default_context(cadata=text(cluster["certificate-authority-data"]))
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:  # only files are taken; this one is the owner's alone
            pem.write(text(user["client-certificate-data"]) + text(user["client-key-data"]))
            pem.flush()
            self.context.load_cert_chain(pem.name)

    def create(self, path, objects):
        connection = http.client.HTTPSConnection(self.address, context=self.context)
        for body in objects:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.read() is None or answer.status != 201:
                raise SystemExit(f"POST {path}: {answer.status}")
        connection.close()


def small_objects():
    kubectl("create", "namespace", OBJECTS_NAMESPACE)
    server, workers = ApiServer(), 8
    objects = [{"metadata": {"name": f"object-{n}"}, "data": {"number": str(n), "text": f"settings of part {n} " * 10}} for n in range(OBJECTS)]
    path = f"/api/v1/namespaces/{OBJECTS_NAMESPACE}/configmaps"
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda part: server.create(path, objects[part::workers]), range(workers)))


def many_volumes(count):
    """Pods with `count` volumes in all, 1 MiB that cannot be compressed on each."""
    kubectl("create", "namespace", VOLUMES_NAMESPACE)
    items = []
    for first in range(0, count, VOLUMES_OF_A_POD):
        names = [f"v{number}" for number in range(first, min(count, first + VOLUMES_OF_A_POD))]
        items += [
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "32Mi"}}}}
            for name in names
        ]
        fill = "for v in /volumes/*; do dd if=/dev/urandom of=$v/data bs=1M count=1 2>/dev/null; done; sync; touch /tmp/filled; sleep 1000000"
        container = {
            "name": "main", "image": "docker.io/lifeboat-e2e/busybox:1", "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", fill],
            "readinessProbe": {"exec": {"command": ["test", "-e", "/tmp/filled"]}, "periodSeconds": 1},
            "volumeMounts": [{"name": name, "mountPath": f"/volumes/{name}"} for name in names],
        }
        volumes = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in names]
        items.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{first}"}, "spec": {"terminationGracePeriodSeconds": 0, "containers": [container], "volumes": volumes}})
    kubectl("create", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}), namespace=VOLUMES_NAMESPACE)
    kubectl("wait", "--for=condition=Ready", "pods", "--all", f"--timeout={PATIENCE}s", namespace=VOLUMES_NAMESPACE)


# --- the table


def mib(count):
    return f"{count / (1 << 20):,.0f} MiB"


def figure(measured):
    return f"{measured.wall:.1f} s, {measured.cpu:.1f}"


def measure():
    rows, memory = [], []
    note = lambda *columns: (rows.append(columns), say(" | ".join(columns)))
    remember = lambda what, measured: memory.append((what, measured))
    idle = processes()
    with Measured() as m:
        back_up("first")
    remember("first backup", m)
    note("first backup: wall, CPU s", figure(m), "62.8 s, 23.7", "64.3 s, 25.9")
    first = m.grown
    with Measured() as m:
        back_up("unchanged")
    note("unchanged again", f"{figure(m)}; bucket + {mib(m.grown)}", "20.8 s, 3.5", "38.5 s, 4.4")
    sql(f"update rows set amount = amount + 1 where id in (select 1 + floor(random() * {ROWS})::bigint from generate_series(1, {max(1, ROWS // 100)}))")
    sql("checkpoint")
    with Measured() as m:
        back_up("updated")
    note("after an update of 1% of the rows at random", f"{figure(m)}; bucket + {mib(m.grown)}", "35.7 s, 9.6; + 1,238 MiB", "59.8 s, 10.6; + 1,231 MiB")
    note("bytes in the bucket after the first backup", mib(first), "–", "–")
    with Writer() as alone:
        time.sleep(10)
    with Writer() as frozen:
        taken = back_up("frozen", quiesce=True)
    freeze = taken["status"]["quiesce"]["freezeMillis"] / 1000
    note("largest gap of a writer, with a freeze hook", f"{frozen.gap:.2f} s, frozen for {freeze:.2f} s (without a backup: {alone.gap:.2f} s)", "–", "5.3 s, cuts 5 s apart (without: 0.08 s)")
    checked = "select count(*), sum(amount) from rows"
    before = sql(checked)
    lose(NAMESPACE)
    with Measured() as m:
        begun = time.monotonic()
        restore("back", NAMESPACE)
        wait_ready("postgres")
        ready = time.monotonic() - begun
    remember("restore", m)
    if sql(checked) != before:
        raise SystemExit(f"the restored rows differ: before {before}, after {sql(checked)}")
    note("restore of the lost namespace: all and the database Ready", f"{ready:.1f} s; CPU {m.cpu:.1f} s", "141 s; database 53 s", "151 s; database 52 s")
    small_objects()
    with Measured() as backup:
        back_up("objects", OBJECTS_NAMESPACE)
    lose(OBJECTS_NAMESPACE)
    with Measured() as back:
        restored = restore("back", OBJECTS_NAMESPACE)
    if restored["status"]["objects"]["created"] != OBJECTS:
        raise SystemExit(f"not all objects came back: {restored['status']['objects']}")
    note(f"{OBJECTS:,} small objects: back up; restore", f"{backup.wall:.1f} s; {back.wall:.1f} s", "4.4 s; 125 s", "–")
    remember(f"{OBJECTS:,} objects", back)
    for count in VOLUMES:
        many_volumes(count)
        with Measured() as m:
            taken = back_up("many", VOLUMES_NAMESPACE)
        cut = taken["status"].get("cutMillis")
        note(f"{count} volumes of 1 MiB: asked for to committed; of it the cut", f"{figure(m)}; {cut} ms", "–", "–")
        remember(f"{count} volumes", m)
        kubectl("delete", "namespace", VOLUMES_NAMESPACE, "--timeout=600s")
    return rows, idle, memory


def page(rows, idle, memory):
    version = run("git", "-C", str(HERE), "describe", "--always", "--dirty").strip()
    lines = [
        "# A whole application, beside Velero",
        "",
        f"Written by `make bench-app` on {time.strftime('%Y-%m-%d')} at {version}; volumes were read by {f'the method `{METHOD}`' if METHOD else 'the default method'}. "
        f"Three-node cluster of `e2e/cluster` with {os.cpu_count()} cores that everything shares, an S3 server outside of the nodes. A namespace with PostgreSQL "
        f"({ROWS:,} rows), {FILES:,} random files of 1–8 KiB and a random file of {BLOB_MIB:,} MiB, each on a volume of its own. " + os.environ.get("NOTE", ""),
        "",
        "**Velero's figures were measured elsewhere**, once: main of May 2026 with the kopia uploader and defaults, the same data on a cluster of the same kind with "
        "2 cores. They are for the order of magnitude; only CPU seconds can be compared closely. CPU seconds are those of controller and agents (Velero: server, node agents, movers).",
        "",
        "| figure | Lifeboat | Velero, file-system backup | Velero, CSI snapshot + data mover |",
        "|---|---|---|---|",
        *(f"| {' | '.join(columns)} |" for columns in rows),
        f"| memory before, resident: controller; agents (3), the pages of their file once a node; once for each of their three processes | {mib(total(idle, 'resident', 'controller'))}; {mib(on_nodes(idle))}; {mib(total(idle, 'resident', 'agents'))} | 80–334 MiB; 223 MiB, one process a node | the same |",
        *(f"| peak memory, {what}: controller; all agents; largest agent | {mib(m.controller)}; {mib(m.agents)}; {mib(m.agent)} | movers 230 MiB each | the same |" for what, m in memory),
        "",
    ]
    return "\n".join(lines)


def main():
    for namespace in (NAMESPACE, OBJECTS_NAMESPACE, VOLUMES_NAMESPACE):
        kubectl("delete", "namespace", namespace, "--ignore-not-found", "--timeout=300s")
    repository()
    kubectl("create", "namespace", NAMESPACE)
    say(f"{ROWS:,} rows, {FILES:,} files, {BLOB_MIB:,} MiB, {OBJECTS:,} objects; method: {METHOD or 'default'}")
    application()
    say("the application is filled")
    rows, idle, memory = measure()
    text = page(rows, idle, memory)
    out = pathlib.Path(os.environ["OUT"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    for namespace in (NAMESPACE, OBJECTS_NAMESPACE):
        kubectl("delete", "namespace", namespace, "--timeout=300s")
    kubectl("delete", "clusterrepository", NAMESPACE)
    run(LAUNCHER, "s3", "remove-bucket", NAMESPACE)
    print(text)
    say(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
