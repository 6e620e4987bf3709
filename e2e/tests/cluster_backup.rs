//! Backups on a real cluster: what is captured, what is read again, what a selection covers.
#![cfg(feature = "cluster")]

use anyhow::{Context, ensure};
use lifeboat_crds::{Backup, BackupPolicy, backup::Phase};
use lifeboat_e2e::scenario::{BUSYBOX, Scenario, scenario, sleeper_manifest};

/// Every kind of file that a busybox shell can make, in `/data`.
const MAKE_TREE: &str = r#"
set -e
cd /data
mkdir -p plain/deep/er empty 'with space'
echo hello > plain/a; echo world > plain/deep/b; : > empty/none
dd if=/dev/urandom of=plain/random bs=1M count=5 2>/dev/null
ln -s ../plain/a 'with space/link'; ln -s /nowhere dangling
ln plain/a plain/hard
mkfifo plain/pipe
truncate -s 64M plain/sparse; echo middle | dd of=plain/sparse bs=1 seek=33554432 conv=notrunc 2>/dev/null
printf x > "$(printf 'caf\351')"
chown 1000:2000 plain/deep/b; chmod 4751 plain/random; chmod 700 plain/deep
touch -d '2001-02-03 04:05:06' plain/deep/b empty
sync
"#;

/// One line for each entry: name, type, mode, owner, time and, for files, size and links; then every file's hash.
const FINGERPRINT: &str = r"
cd /data
find . ! -path './lost+found*' ! -type d -exec stat -c '%n|%F|%a|%u:%g|%s|%Y|%h' {} + | sort
find . -mindepth 1 ! -path './lost+found*' -type d -exec stat -c '%n|%F|%a|%u:%g|%Y' {} + | sort
find . -type f -exec sha256sum {} + | sort
find . -type l -exec readlink {} \; | sort
";

fn phase(backup: &Backup) -> Option<Phase> {
    backup.status.as_ref().map(|s| s.phase)
}

#[test]
fn every_kind_of_file_survives_the_loss_of_the_namespace() {
    scenario("files", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", MAKE_TREE)?;
        s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {colour: blue}\n")?;
        let before = s.shell("app", FINGERPRINT)?;
        ensure!(before.lines().count() > 15, "the fingerprint is not empty: {before}");
        let backup = s.back_up("all").await?;
        ensure!(phase(&backup) == Some(Phase::Succeeded), "{:?}", backup.status);
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        let after = s.shell("app", FINGERPRINT)?;
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
        ensure!(
            s.shell("app", "du -k /data/plain/sparse | cut -f1")?.trim().parse::<u64>()? < 1024,
            "the holes are gone"
        );
        ensure!(s.kubectl(&["get", "configmap", "settings", "-o", "jsonpath={.data.colour}"])? == "blue");
        ensure!(s.leftovers().await?.is_empty(), "left behind: {:?}", s.leftovers().await?);
        Ok(())
    });
}

#[test]
fn a_second_backup_reads_only_what_changed() {
    scenario("incremental", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell(
            "app",
            "for i in 1 2 3 4; do dd if=/dev/urandom of=/data/big$i bs=1M count=10 2>/dev/null; done; sync",
        )?;
        s.back_up("first").await?;
        let unchanged = s.back_up("second").await?;
        let read = unchanged.status.as_ref().and_then(|s| s.read_bytes).context("readBytes")?;
        ensure!(read == 0, "read {read} bytes of an unchanged volume");
        s.shell("app", "dd if=/dev/urandom of=/data/big2 bs=1M count=10 2>/dev/null; sync")?;
        let changed = s.back_up("third").await?;
        let status = changed.status.as_ref().context("status")?;
        let (read, stored) = (status.read_bytes.context("readBytes")?, status.stored_bytes.context("storedBytes")?);
        ensure!((10 << 20..11 << 20).contains(&read), "read {read}");
        ensure!((10 << 20..12 << 20).contains(&stored), "stored {stored}");
        Ok(())
    });
}

#[test]
fn a_selection_decides_which_objects_and_claims_are_covered() {
    scenario("selection", async |s: Scenario| {
        s.apply(&sleeper_manifest("wanted"))?;
        s.apply(&sleeper_manifest("other"))?;
        s.apply("apiVersion: v1\nkind: Secret\nmetadata: {name: token, labels: {app: wanted}}\nstringData: {a: b}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings, labels: {app: wanted}}\ndata: {a: b}\n")?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/wanted", "pod/other", "--timeout=120s"])?;
        let mut plan = s.plan();
        plan["scope"] =
            serde_json::json!({"selector": {"matchLabels": {"app": "wanted"}}, "excludeResources": ["secrets"]});
        s.start_backup("some", serde_json::json!({"plan": plan})).await?;
        let backup = s.backup_succeeded("some").await?;
        let claims: Vec<_> = backup.status.iter().flat_map(|s| &s.volumes).map(|v| v.claim.clone()).collect();
        ensure!(claims == ["wanted-data"], "{claims:?}");
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/wanted", "--timeout=120s"])?;
        let found = s.kubectl(&["get", "pods,configmaps,secrets,pvc", "-l", "app", "-o", "name"])?;
        let mut found: Vec<_> = found.lines().collect();
        found.sort_unstable();
        ensure!(found == ["configmap/settings", "persistentvolumeclaim/wanted-data", "pod/wanted"], "{found:?}");
        Ok(())
    });
}

#[test]
fn replicas_on_several_nodes_are_backed_up_by_their_agents() {
    scenario("replicas", async |s: Scenario| {
        s.apply(&format!(
            "apiVersion: apps/v1
kind: StatefulSet
metadata: {{name: web}}
spec:
  serviceName: web
  replicas: 3
  podManagementPolicy: Parallel
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints: [{{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {{matchLabels: {{app: web}}}}}}]
      containers:
      - {{name: main, image: '{BUSYBOX}', imagePullPolicy: IfNotPresent, command: [sh, -c, 'hostname > /data/name; sleep 100000'], volumeMounts: [{{name: data, mountPath: /data}}]}}
  volumeClaimTemplates: [{{metadata: {{name: data}}, spec: {{accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 128Mi}}}}}}}}]
"
        ))?;
        s.kubectl(&["rollout", "status", "statefulset/web", "--timeout=150s"])?;
        s.start_backup("all", serde_json::json!({"plan": s.live_plan()})).await?;
        let backup = s.backup_succeeded("all").await?;
        let volumes = &backup.status.as_ref().context("status")?.volumes;
        let mut nodes: Vec<_> = volumes.iter().filter_map(|v| v.node.clone()).collect();
        nodes.sort();
        nodes.dedup();
        ensure!(volumes.len() == 3 && nodes.len() == 3, "{volumes:?}");
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["rollout", "status", "statefulset/web", "--timeout=150s"])?;
        for name in ["web-0", "web-1", "web-2"] {
            ensure!(s.shell(name, "cat /data/name")?.trim() == name);
        }
        ensure!(s.kubectl(&["get", "pvc", "-o", "name"])?.lines().count() == 3, "no new claims were made");
        Ok(())
    });
}

#[test]
fn a_schedule_runs_by_itself_and_a_suspended_one_does_not() {
    scenario("schedule", async |s: Scenario| {
        s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {a: b}\n")?;
        for (name, suspend) in [("runs", false), ("rests", true)] {
            s.apply(&format!(
                "apiVersion: lifeboat.dev/v1alpha1
kind: BackupPolicy
metadata: {{name: {name}}}
spec:
  suspend: {suspend}
  schedule: {{cron: '* * * * *', timeZone: Asia/Kathmandu, jitter: 1s}}
  tiers: [{{repository: {{ref: {{name: {}}}}}}}]
",
                s.namespace
            ))?;
        }
        let policy = s
            .wait(&s.namespaced::<BackupPolicy>(), "runs", "a scheduled backup that succeeded", |p: &BackupPolicy| {
                p.status.as_ref().is_some_and(|s| s.last_success_time.is_some())
            })
            .await?;
        let name = policy.status.and_then(|s| s.last_successful_backup).context("lastSuccessfulBackup")?;
        s.backup_succeeded(&name).await?;
        let rested = s.kubectl(&["get", "backups", "-l", "lifeboat.dev/policy=rests", "-o", "name"])?;
        ensure!(rested.is_empty(), "a suspended policy ran: {rested}");
        Ok(())
    });
}

#[test]
fn a_plain_machine_restores_the_clusters_backup() {
    scenario("without-cluster", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "echo precious > /data/file; sync")?;
        let backup = s.back_up("all").await?;
        let snapshot = backup.status.as_ref().and_then(|s| s.volumes.first()?.snapshot.clone()).context("snapshot")?;
        let target = tempfile::tempdir()?;
        let output = s.lifeboat(&["restore", &snapshot, &target.path().to_string_lossy()])?;
        ensure!(std::fs::read_to_string(target.path().join("file"))? == "precious\n", "{output}");
        Ok(())
    });
}
