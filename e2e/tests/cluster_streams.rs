//! Streams: what a command prints becomes a file in the backup, and a file of a backup is given to a command. What breaks off is
//! never a success.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use lifeboat_crds::backup::{Phase, StreamBackupStatus};
use lifeboat_crds::conditions::{self, ConditionType};
use lifeboat_crds::{Backup, Restore};
use lifeboat_e2e::faults::{fresh_lifeboat, kill};
use lifeboat_e2e::scenario::{BUSYBOX, Scenario, scenario};
use serde_json::{Value, json};

const POSTGRES: &str = "docker.io/lifeboat-e2e/postgres:15";

/// A pod with a database of which nothing outlives the pod.
fn database() -> Value {
    let start = "set -e; export PGDATA=/data/db; [ -s $PGDATA/PG_VERSION ] || initdb -U postgres --auth=trust; exec postgres -c unix_socket_directories=/tmp -c dynamic_shared_memory_type=mmap";
    let is_ready = ["psql", "-U", "postgres", "-qAtc", "select 1"];
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "db", "labels": {"app": "db"}}, "spec": {
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsUser": 70, "runAsGroup": 70, "fsGroup": 70},
        "containers": [{"name": "db", "image": POSTGRES, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", start],
            "env": [{"name": "PGHOST", "value": "/tmp"}],
            "readinessProbe": {"exec": {"command": is_ready}, "periodSeconds": 1, "timeoutSeconds": 5},
            "securityContext": {"readOnlyRootFilesystem": true},
            "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}]}],
        "volumes": [{"name": "data", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
    }})
}

/// A pod that sleeps, without a volume of the cluster.
fn sleeper() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "app", "labels": {"app": "app"}}, "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "while :; do sleep 3600; done"]}],
    }})
}

fn sleeps(s: &Scenario) -> Result<()> {
    s.apply(&sleeper().to_string())?;
    s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"]).map(|_| ())
}

fn plan_of(s: &Scenario, streams: Value) -> Value {
    let mut plan = s.plan();
    plan["streams"] = streams;
    json!({"plan": plan})
}

/// One stream of the sleeping pod.
fn stream(script: &str) -> Value {
    json!({"name": "out.txt", "selector": {"matchLabels": {"app": "app"}}, "command": ["sh", "-c", script]})
}

fn stream_of(backup: &Backup) -> Result<&StreamBackupStatus> {
    backup.status.as_ref().and_then(|status| status.streams.first()).context("a stream in the status")
}

/// Waits until the stream's command runs in the pod and has written its process id to `/tmp/pids`.
async fn runs(s: &Scenario, name: &str) -> Result<String> {
    let api = s.namespaced::<Backup>();
    s.wait(&api, name, "the stream to run", |backup| {
        stream_of(backup).is_ok_and(|stream| stream.phase == Phase::Running)
    })
    .await?;
    let mut pid = String::new();
    s.eventually("the command in the pod", async || {
        s.shell("app", "[ ! -e /tmp/pids ] || tail -n 1 /tmp/pids")?.trim().clone_into(&mut pid);
        Ok(!pid.is_empty())
    })
    .await?;
    Ok(pid)
}

/// The process is not there any more.
async fn is_over(s: &Scenario, pid: &str) -> Result<()> {
    s.eventually("the command's process to be gone", async || {
        Ok(s.shell("app", &format!("[ ! -e /proc/{pid} ] || echo alive"))?.is_empty())
    })
    .await
}

/// No snapshot of the stream is visible in the repository.
fn nothing_is_stored(s: &Scenario) -> Result<()> {
    let found = s.lifeboat(&["--json", "snapshots", "--tag", "stream=out.txt"])?;
    ensure!(!found.contains("out.txt"), "a broken stream was stored: {found}");
    Ok(())
}

#[test]
fn a_database_comes_back_from_its_dumps() {
    scenario("stream-postgres", async |s: Scenario| {
        s.apply(&database().to_string())?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/db", "--timeout=120s"])?;
        let fill = "psql -U postgres -qc 'create database shop' && psql -U postgres -qc \"create table t as select n, md5(n::text) as v from generate_series(1, 200000) n\" && psql -U postgres -d shop -qc \"create table orders as select n, md5((n * 7)::text) as v from generate_series(1, 50000) n; alter table orders add primary key (n)\"";
        s.shell("db", fill)?;
        let ask = "psql -U postgres -qAtc 'select count(*), sum(n), md5(string_agg(v, chr(44) order by n)) from t'; psql -U postgres -d shop -qAtc 'select count(*), sum(n), md5(string_agg(v, chr(44) order by n)) from orders'";
        let before = s.shell("db", ask)?;
        ensure!(before.starts_with("200000|") && before.contains("\n50000|"), "{before}");
        let selector = json!({"matchLabels": {"app": "db"}});
        let plan = plan_of(
            &s,
            json!([
                // By itself pg_dump puts a random word into its first and last lines.
                {"name": "postgres.sql", "selector": selector, "command": ["pg_dump", "-U", "postgres", "--restrict-key=same", "postgres"],
                    "restore": {"command": ["psql", "-U", "postgres", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "postgres"]}},
                {"name": "shop.dump", "selector": selector, "container": "db", "timeout": "10m",
                    "command": ["pg_dump", "-U", "postgres", "--format=custom", "shop"],
                    "restore": {"command": ["pg_restore", "-U", "postgres", "--create", "--exit-on-error", "-d", "postgres"], "timeout": "10m"}},
            ]),
        );
        s.start_backup("first", plan.clone()).await?;
        let first = s.backup_succeeded("first").await?;
        let status = first.status.as_ref().context("status")?;
        let dumped = stream_of(&first)?;
        ensure!(dumped.pod.as_deref() == Some("db") && dumped.container.as_deref() == Some("db"), "{dumped:?}");
        let transfer = dumped.transfer.context("transfer")?;
        ensure!(
            transfer.files == 1 && transfer.bytes > 5_000_000 && transfer.read_bytes == transfer.bytes,
            "{transfer:?}"
        );
        ensure!(status.read_bytes >= Some(transfer.bytes), "{:?}", status.read_bytes);
        let snapshot = dumped.snapshot.as_deref().context("snapshot")?;
        let listed = s.lifeboat(&["ls", snapshot])?;
        ensure!(listed.contains("postgres.sql"), "{listed}");
        let printed = s.lifeboat(&["cat", snapshot, "postgres.sql"])?;
        ensure!(printed.len() as u64 == transfer.bytes, "{} bytes of {}", printed.len(), transfer.bytes);
        ensure!(printed.contains("PostgreSQL database dump complete"), "the dump has no end");
        // The same dump once more is not stored once more.
        s.start_backup("second", plan).await?;
        let second = s.backup_succeeded("second").await?;
        let again = stream_of(&second)?.transfer.context("transfer")?;
        ensure!(again.new_bytes < transfer.bytes / 10, "{again:?} after {transfer:?}");
        s.lifeboat(&["check", "--read-data"])?;

        s.lose_namespace()?;
        let restore = s.restore_newest("back").await?;
        let status = restore.status.context("status")?;
        ensure!(conditions::is_true(&status.conditions, ConditionType::StreamsRestored), "{:?}", status.conditions);
        ensure!(
            status.streams.len() == 2 && status.streams.iter().all(|one| one.phase == Phase::Succeeded),
            "{:?}",
            status.streams
        );
        let after = s.shell("db", ask)?;
        ensure!(after == before, "{after}\nwas\n{before}");
        Ok(())
    });
}

#[test]
fn a_command_that_fails_hangs_or_is_not_there_fails_the_backup() {
    scenario("stream-fails", async |s: Scenario| {
        sleeps(&s)?;
        s.start_backup("code", plan_of(&s, json!([stream("echo half; echo 'no such table' >&2; exit 3")]))).await?;
        let (backup, message) = s.backup_failed("code", "StreamFailed").await?;
        ensure!(message.contains("out.txt") && message.contains("exit code 3: no such table"), "{message}");
        ensure!(backup.status.context("status")?.recovery_point.is_none(), "a recovery point without its stream");
        let mut missing = stream("");
        missing["command"] = json!(["no-such-program"]);
        s.start_backup("missing", plan_of(&s, json!([missing]))).await?;
        let (_, message) = s.backup_failed("missing", "StreamFailed").await?;
        ensure!(message.contains("no `no-such-program`"), "{message}");
        let mut hanging = stream("echo $$ >> /tmp/pids; echo half; exec sleep 600");
        hanging["timeout"] = json!("8s");
        s.start_backup("hangs", plan_of(&s, json!([hanging]))).await?;
        let pid = runs(&s, "hangs").await?;
        let (_, message) = s.backup_failed("hangs", "TimedOut").await?;
        ensure!(message.contains("timeout"), "{message}");
        is_over(&s, &pid).await?;
        let mut nowhere = stream("true");
        nowhere["selector"] = json!({"matchLabels": {"app": "other"}});
        s.start_backup("nowhere", plan_of(&s, json!([nowhere]))).await?;
        let (_, message) = s.backup_failed("nowhere", "NoPodForStream").await?;
        ensure!(message.contains("ready"), "{message}");
        nothing_is_stored(&s)
    });
}

#[test]
fn a_dump_that_is_broken_off_is_never_a_success() {
    scenario("stream-broken", async |s: Scenario| {
        sleeps(&s)?;
        let endless = stream("echo $$ >> /tmp/pids; while :; do head -c 100000 /dev/urandom; sleep 0.1; done");
        s.start_backup("killed", plan_of(&s, json!([endless]))).await?;
        let pid = runs(&s, "killed").await?;
        s.shell("app", &format!("kill -9 {pid}"))?;
        let (_, message) = s.backup_failed("killed", "StreamFailed").await?;
        ensure!(message.contains("137"), "{message}");
        s.shell("app", "rm /tmp/pids")?;
        s.start_backup("deleted", plan_of(&s, json!([endless]))).await?;
        let pid = runs(&s, "deleted").await?;
        s.delete(&s.namespaced::<Backup>(), "deleted").await?;
        is_over(&s, &pid).await?;
        s.shell("app", "rm /tmp/pids")?;
        s.start_backup("gone", plan_of(&s, json!([endless]))).await?;
        runs(&s, "gone").await?;
        s.kubectl(&["delete", "pod", "app", "--grace-period=0", "--force"])?;
        s.backup_failed("gone", "PodVanished").await?;
        nothing_is_stored(&s)
    });
}

#[test]
fn when_agent_or_guardian_dies_the_command_ends_and_the_stream_begins_anew() {
    scenario("stream-agents", async |s: Scenario| {
        sleeps(&s)?;
        let slow = "echo $$ >> /tmp/pids; n=0; while [ $n -lt 100 ]; do head -c 50000 /dev/zero || exit 1; n=$((n + 1)); sleep 0.1; done";
        for (name, victim) in [("agent", "/lifeboat-agent run"), ("guardian", "/lifeboat-agent guard")] {
            s.start_backup(name, plan_of(&s, json!([stream(slow)]))).await?;
            let first = runs(&s, name).await?;
            ensure!(kill(victim)? > 0, "no {name} was killed");
            is_over(&s, &first).await?;
            let backup = s.backup_succeeded(name).await?;
            let stream = stream_of(&backup)?;
            ensure!(stream.transfer.is_some_and(|transfer| transfer.bytes == 5_000_000), "{stream:?}");
            let all = s.shell("app", "cat /tmp/pids; rm /tmp/pids")?;
            ensure!(all.lines().count() == 2, "the command was run by {all:?}");
            fresh_lifeboat(&s).await?;
        }
        Ok(())
    });
}

#[test]
fn a_restore_command_that_fails_fails_the_restore_and_a_stream_without_one_is_named() {
    scenario("stream-restores", async |s: Scenario| {
        sleeps(&s)?;
        let mut failing = stream("echo content");
        failing["restore"] = json!({"command": ["sh", "-c", "cat > /tmp/got; echo 'no role' >&2; exit 4"]});
        s.start_backup("failing", plan_of(&s, json!([failing]))).await?;
        s.backup_succeeded("failing").await?;
        let newest = json!({"repository": {"ref": {"name": s.namespace}}});
        s.start_restore("fails", json!({"source": newest})).await?;
        let message = s.restore_failed("fails", "StreamFailed").await?;
        ensure!(message.contains("out.txt") && message.contains("exit code 4: no role"), "{message}");
        ensure!(s.shell("app", "cat /tmp/got")? == "content\n", "the command was given something else");

        s.start_restore("ignored", json!({"source": newest, "streams": "Ignore"})).await?;
        let ignored = s.restore_finished("ignored").await?;
        let told = |restore: &Restore, why: &str| {
            let status = restore.status.as_ref().context("status")?;
            ensure!(conditions::is_true(&status.conditions, ConditionType::Succeeded), "{:?}", status.conditions);
            let condition =
                conditions::get(&status.conditions, ConditionType::StreamsRestored).context("StreamsRestored")?;
            ensure!(condition.status == "False" && condition.message.contains("out.txt"), "{condition:?}");
            let stream = status.streams.first().context("a stream")?;
            ensure!(stream.not_restored.as_ref().is_some_and(|said| said.contains(why)), "{stream:?}");
            Ok(())
        };
        told(&ignored, "Ignore")?;
        s.start_backup("silent", plan_of(&s, json!([stream("echo content")]))).await?;
        s.backup_succeeded("silent").await?;
        let silent = s.restore_newest("silent").await?;
        told(&silent, "no restore command")?;
        s.eventually("nothing to be left", async || Ok(s.leftovers().await?.is_empty())).await
    });
}
