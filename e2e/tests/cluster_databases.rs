//! Real databases under write load: what is restored ends with the last transaction that was acknowledged before the cut.
#![cfg(feature = "cluster")]
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use lifeboat_crds::backup::{BackupStatus, Consistency};
use lifeboat_crds::conditions::{ConditionType, is_true};
use lifeboat_e2e::faults::number;
use lifeboat_e2e::scenario::{Scenario, scenario};
use serde_json::{Value, json};

/// A database and how it is written to and asked.
struct Database {
    name: &'static str,
    image: &'static str,
    start: &'static str,
    is_ready: &'static str,
    /// Makes what the writer needs.
    prepare: &'static str,
    /// Ends well when transaction `$n` is acknowledged.
    write: &'static str,
    /// Prints the highest transaction and how many there are.
    ask: &'static str,
    template: Value,
}

fn manifest(database: &Database) -> String {
    let Database { name, image, start, is_ready, .. } = database;
    format!(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: data}}
spec: {{accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 1Gi}}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: db, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {{runAsUser: 70, runAsGroup: 70, fsGroup: 70, fsGroupChangePolicy: OnRootMismatch}}
  containers:
  - name: db
    image: {image}
    imagePullPolicy: IfNotPresent
    command: [sh, -c, {start}]
    env: [{{name: PGHOST, value: /tmp}}, {{name: MYSQL_UNIX_PORT, value: /tmp/db.sock}}]
    readinessProbe: {{exec: {{command: [sh, -c, {is_ready}]}}, periodSeconds: 1, timeoutSeconds: 5}}
    securityContext: {{readOnlyRootFilesystem: true}}
    volumeMounts: [{{name: data, mountPath: /data}}, {{name: tmp, mountPath: /tmp}}]
  volumes:
  - {{name: data, persistentVolumeClaim: {{claimName: data}}}}
  - {{name: tmp, emptyDir: {{}}}}
",
        start = json!(start),
        is_ready = json!(is_ready),
    )
}

/// Writes one transaction after the other; notes each that is acknowledged, and when, beside the volume.
fn writer(database: &Database) -> String {
    format!(
        r#"(n=1
while {{ {}; }} >/dev/null 2>&1; do
  read up rest </proc/uptime
  echo "$n ${{up%.*}}${{up#*.}}" >> /tmp/acknowledged
  n=$((n + 1))
done) </dev/null >/dev/null 2>&1 &"#,
        database.write
    )
}

/// When each transaction was acknowledged, in hundredths of a second by the application's own clock.
fn times(acknowledged: &str) -> BTreeMap<u64, u64> {
    let parse = |line: &str| {
        let (number, time) = line.split_once(' ')?;
        Some((number.parse().ok()?, time.parse().ok()?))
    };
    acknowledged.lines().filter_map(parse).collect()
}

/// The pause between a transaction and the next, in milliseconds; 0 when there is none.
fn pause_after(times: &BTreeMap<u64, u64>, number: u64) -> u64 {
    let next = times.get(&(number + 1)).zip(times.get(&number));
    next.map_or(0, |(next, this)| (next - this) * 10)
}

/// How long the application was at rest by the guardians' clocks, and how much of it the cut took, in milliseconds.
fn freeze(status: &BackupStatus) -> Result<(u64, u64)> {
    let workloads = status.quiesce.iter().flat_map(|quiesce| &quiesce.workloads);
    let frozen = workloads.filter_map(|workload| workload.freeze_millis).max().context("freezeMillis")?;
    Ok((frozen, status.cut_millis.context("cutMillis")?))
}

/// Median, 99th percentile and maximum, by the nearest rank.
fn spread(mut values: Vec<u64>) -> String {
    values.sort_unstable();
    let rank = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
    format!("p50 {}, p99 {}, longest {}", rank(50), rank(99), rank(100))
}

/// Starts the database and a writer.
async fn under_load(s: &Scenario, database: &Database) -> Result<()> {
    s.apply(&manifest(database))?;
    s.kubectl(&["wait", "--for=condition=Ready", "pod/db", "--timeout=120s"])?;
    s.shell("db", database.prepare)?;
    s.shell("db", &writer(database))?;
    s.eventually("some load", async || {
        Ok(s.shell("db", "wc -l < /tmp/acknowledged || echo 0")?.trim().parse::<u64>()? > 50)
    })
    .await
}

/// What was acknowledged, when transactions after the cut are among it.
async fn acknowledged(s: &Scenario) -> Result<BTreeMap<u64, u64>> {
    let so_far = times(&s.shell("db", "cat /tmp/acknowledged")?).len();
    let mut found = BTreeMap::new();
    s.eventually("transactions after the cut", async || {
        found = times(&s.shell("db", "cat /tmp/acknowledged")?);
        Ok(found.len() > so_far + 20)
    })
    .await?;
    Ok(found)
}

/// Brings the database back and fails unless it ends with the last transaction before the cut. Returns that one, and how long
/// the application was at rest there by its own clock, in milliseconds.
async fn restored_to_the_cut(
    s: &Scenario,
    database: &Database,
    acknowledged: &BTreeMap<u64, u64>,
    cut: u64,
) -> Result<(u64, u64)> {
    s.lose_namespace()?;
    s.restore_newest("back").await?;
    s.kubectl(&["wait", "--for=condition=Ready", "pod/db", "--timeout=120s"])?;
    let found = s.shell("db", database.ask)?;
    let found: Vec<_> = found.split_whitespace().collect();
    let [last, count] = found.as_slice() else { bail!("the database says {found:?}") };
    ensure!(last == count, "transactions are missing below the last: {found:?}");
    let last: u64 = last.parse()?;
    // Every pause in which a snapshot was cut lasted at least as long as cutting it. The transaction that was under way then
    // may have been acknowledged after it.
    let pause = pause_after(acknowledged, last).max(pause_after(acknowledged, last - 1));
    // The clock has steps of 10 ms.
    ensure!(
        pause + 20 >= cut,
        "restored up to {last}, where the application went on after {pause} ms, while the cut took {cut} ms"
    );
    Ok((last, pause))
}

/// With `LIFEBOAT_FREEZE_ROUNDS` so many backups are made, and the last is restored; default 1.
fn protects(database: &Database) {
    let rounds = number("LIFEBOAT_FREEZE_ROUNDS", 1);
    scenario(&format!("database-{}", database.name), async |s: Scenario| {
        under_load(&s, database).await?;
        let selector = json!({"matchLabels": {"app": database.name}});
        let mut plan = s.plan();
        plan["quiesce"] = json!({"maxFreeze": "60s", "steps": [
            {"selector": selector, "template": database.template}, {"selector": selector, "fsfreeze": {}}]});
        let mut freezes = Vec::new();
        for round in 0..rounds {
            let name = format!("b{round}");
            s.start_backup(&name, json!({"plan": plan})).await?;
            let status = s.backup_succeeded(&name).await?.status.context("status")?;
            ensure!(status.consistency == Some(Consistency::Application), "{:?}", status.conditions);
            freezes.push(freeze(&status)?);
        }
        let (_, cut) = *freezes.last().context("LIFEBOAT_FREEZE_ROUNDS must be 1 or more")?;
        let acknowledged = acknowledged(&s).await?;
        let (last, pause) = restored_to_the_cut(&s, database, &acknowledged, cut).await?;
        println!(
            "{}: restored up to {last} of {}; at rest there {pause} ms by its own clock; of {rounds} backups, in ms: at rest {}, of which the cut {}, the rest {}",
            database.name,
            acknowledged.len(),
            spread(freezes.iter().map(|(frozen, _)| *frozen).collect()),
            spread(freezes.iter().map(|(_, cut)| *cut).collect()),
            spread(freezes.iter().map(|(frozen, cut)| frozen.saturating_sub(*cut)).collect()),
        );
        Ok(())
    });
}

const POSTGRES: &str = "docker.io/lifeboat-e2e/postgres:15";
const MARIADB: &str = "docker.io/lifeboat-e2e/mariadb:10.11";
const REDIS: &str = "docker.io/lifeboat-e2e/redis:7";
const ETCD: &str = "docker.io/lifeboat-e2e/etcd:3.4";

fn postgresql(name: &'static str, template: &str) -> Database {
    Database {
        name,
        image: POSTGRES,
        start: "set -e; export PGDATA=/data/db; [ -s $PGDATA/PG_VERSION ] || initdb -U postgres --auth=trust; exec postgres -c unix_socket_directories=/tmp -c dynamic_shared_memory_type=mmap",
        is_ready: "psql -U postgres -qAtc 'select 1'",
        prepare: "psql -U postgres -qc 'create table t (n bigint primary key)'",
        write: "psql -U postgres -qc \"insert into t values ($n)\"",
        ask: "psql -U postgres -qAtc 'select max(n), count(*) from t' | tr '|' ' '",
        template: json!({"name": template}),
    }
}

#[test]
fn postgresql_in_backup_mode_is_restored_to_the_cut() {
    protects(&postgresql("postgresql", "postgresql"));
}

#[test]
fn postgresql_after_a_checkpoint_is_restored_to_the_cut() {
    protects(&postgresql("postgresql-checkpoint", "postgresql-checkpoint"));
}

/// The negative control: copied while it is written, a database is not restored to a cut, and the test above sees it.
#[test]
fn a_database_that_was_copied_while_it_wrote_is_seen_not_to_be_a_cut() {
    let database = postgresql("postgresql-torn", "postgresql");
    scenario("database-torn", async |s: Scenario| {
        under_load(&s, &database).await?;
        // Copying takes the longer.
        s.shell("db", "dd if=/dev/urandom of=/data/fill bs=1M count=300 2>/dev/null; sync")?;
        s.fault("CreateSnapshot mode=torn")?;
        let mut plan = s.plan();
        plan["volumes"] = json!([{"method": "Snapshot"}]);
        s.start_backup("b", json!({"plan": plan})).await?;
        let backup = s.backup_finished("b").await?;
        let status = backup.status.context("status")?;
        if !is_true(&status.conditions, ConditionType::Succeeded) {
            println!("a torn file system cannot even be mounted");
            return Ok(());
        }
        ensure!(status.consistency != Some(Consistency::Application), "{:?}", status.consistency);
        let acknowledged = acknowledged(&s).await?;
        let cut = status.cut_millis.context("cutMillis")?;
        match restored_to_the_cut(&s, &database, &acknowledged, cut).await {
            Ok((last, pause)) => bail!("a copy went unnoticed: restored up to {last}, at rest for {pause} ms"),
            Err(seen) => println!("seen: {seen:#}"),
        }
        Ok(())
    });
}

#[test]
fn mariadb_under_a_read_lock_is_restored_to_the_cut() {
    protects(&Database {
        name: "mariadb",
        image: MARIADB,
        start: "set -e; [ -d /data/db/mysql ] || mariadb-install-db --no-defaults --auth-root-authentication-method=normal --datadir=/data/db --skip-test-db >/tmp/install 2>&1 || { cat /tmp/install; exit 1; }; exec mariadbd --no-defaults --datadir=/data/db --socket=/tmp/db.sock --pid-file=/tmp/db.pid --tmpdir=/tmp --skip-networking --innodb-buffer-pool-size=32M",
        is_ready: "mariadb -u root -e 'select 1'",
        prepare: "mariadb -u root -e 'create database d; create table d.t (n bigint primary key) engine=innodb'",
        write: "mariadb -u root -e \"insert into d.t values ($n)\"",
        ask: "mariadb -u root -NBe 'select max(n), count(*) from d.t'",
        template: json!({"name": "mariadb"}),
    });
}

#[test]
fn redis_with_paused_writes_is_restored_to_the_cut() {
    protects(&Database {
        name: "redis",
        image: REDIS,
        start: "exec redis-server --dir /data --save '' --port 6379",
        is_ready: "redis-cli ping",
        prepare: "true",
        write: "[ \"$(redis-cli incr n)\" = \"$n\" ]",
        ask: "n=$(redis-cli get n); echo $n $n",
        template: json!({"name": "redis"}),
    });
}

#[test]
fn sqlite_locked_by_a_session_is_restored_to_the_cut() {
    protects(&Database {
        name: "sqlite",
        image: REDIS,
        start: "while :; do sleep 3600; done",
        is_ready: "true",
        prepare: "sqlite3 /data/app.db 'pragma journal_mode=wal; create table t (n integer primary key)'",
        write: "sqlite3 -cmd '.timeout 60000' /data/app.db \"insert into t values ($n)\"",
        ask: "sqlite3 -separator ' ' /data/app.db 'select max(n), count(*) from t'",
        template: json!({"name": "sqlite", "parameters": {"file": "/data/app.db"}}),
    });
}

#[test]
fn etcd_with_a_quorum_is_restored_to_the_cut() {
    protects(&Database {
        name: "etcd",
        image: ETCD,
        start: "exec etcd --data-dir /data/db --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379",
        is_ready: "etcdctl endpoint health",
        prepare: "true",
        write: "etcdctl put t/$n x",
        ask: "etcdctl get --prefix t/ --keys-only | sed -n 's,^t/,,p' | sort -n | awk '{ n = $1 } END { print n, NR }'",
        template: json!({"name": "etcd"}),
    });
}
