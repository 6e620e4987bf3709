//! CSI snapshots on a real cluster: short freezes, one instant for several volumes, volumes that nobody has mounted,
//! snapshots that stay on the storage, and that nothing is left behind.
#![cfg(feature = "cluster")]
#![allow(clippy::print_stdout)]

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use lifeboat_crds::Backup;
use lifeboat_crds::backup::{Consistency, VolumeBackupStatus};
use lifeboat_crds::conditions::{ConditionType, is_true};
use lifeboat_crds::plan::VolumeMethod;
use lifeboat_e2e::scenario::{BUSYBOX, INSTALLED_IN, Scenario, StoreHeld, scenario, sleeper_manifest};
use serde_json::{Value, json};

fn plan_with(s: &Scenario, volumes: &Value) -> Value {
    let mut plan = s.plan();
    plan["volumes"] = volumes.clone();
    plan
}

fn volume<'a>(backup: &'a Backup, claim: &str) -> Result<&'a VolumeBackupStatus> {
    let volumes = backup.status.iter().flat_map(|status| &status.volumes);
    volumes.into_iter().find(|volume| volume.claim == claim).with_context(|| format!("no volume {claim}"))
}

/// Everything that Lifeboat makes for a backup with snapshots and that should be gone afterwards.
fn left_behind(s: &Scenario) -> Result<Vec<String>> {
    let uids = s.kubectl(&["get", "backups", "-o", "jsonpath={.items[*].metadata.uid}"])?;
    let mut left = Vec::new();
    for uid in uids.split_whitespace() {
        let mine = format!("lifeboat.dev/owner-uid={uid}");
        let ours = "pods,persistentvolumeclaims,volumesnapshots";
        left.push(s.kubectl_cluster(&["-n", INSTALLED_IN, "get", ours, "-l", &mine, "-o", "name"])?);
        left.push(s.kubectl_cluster(&["get", "volumesnapshotcontents", "-l", &mine, "-o", "name"])?);
        let marked = format!("lifeboat.dev/group-{uid}");
        left.push(s.kubectl(&["get", "persistentvolumeclaims", "-l", &marked, "-o", "name"])?);
    }
    Ok(left.iter().flat_map(|names| names.lines()).map(str::to_owned).collect())
}

/// The snapshots in the scenario's namespace.
fn snapshots(s: &Scenario) -> Result<Vec<String>> {
    let found = s.kubectl(&["get", "volumesnapshots,volumegroupsnapshots", "-o", "name"])?;
    Ok(found.lines().map(str::to_owned).collect())
}

async fn nothing_is_left(s: &Scenario) -> Result<()> {
    s.eventually("everything to be gone", async || {
        Ok(left_behind(s)?.is_empty() && snapshots(s)?.is_empty() && s.leftovers().await?.is_empty())
    })
    .await
}

#[test]
fn the_application_rests_only_while_the_snapshot_is_cut() {
    scenario("snap-freeze", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=200 2>/dev/null; echo 1 > /data/generation; sync")?;
        let mut plan = s.plan();
        let hook = |command: &str| json!(["sh", "-c", command]);
        plan["quiesce"] = json!({"maxFreeze": "60s", "steps": [{
            "selector": {"matchLabels": {"app": "app"}},
            "exec": {"freeze": hook("touch /data/at-rest; sync"), "thaw": hook("rm -f /data/at-rest; echo 2 > /data/generation; sync; touch /tmp/thawed")},
        }]});
        s.start_backup("b", json!({"plan": plan})).await?;
        let cut = |b: &Backup| b.status.as_ref().is_some_and(|status| is_true(&status.conditions, ConditionType::Cut));
        s.wait(&s.namespaced(), "b", "the cut", cut).await?;
        // The application runs again although nothing can be uploaded.
        let held = StoreHeld::hold()?;
        s.eventually("the thaw", async || Ok(s.shell("app", "ls /tmp")?.contains("thawed"))).await?;
        drop(held);
        let backup = s.backup_succeeded("b").await?;
        let status = backup.status.clone().context("status")?;
        ensure!(status.consistency == Some(Consistency::Application), "{:?}", status.consistency);
        ensure!(volume(&backup, "app-data")?.method == VolumeMethod::Snapshot);
        let frozen = status.quiesce.and_then(|quiesce| quiesce.freeze_millis).context("freezeMillis")?;
        println!("frozen for {frozen} ms, the cut took {:?} ms", status.cut_millis);
        nothing_is_left(&s).await?;
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        ensure!(s.shell("app", "ls /data; cat /data/generation")?.contains("at-rest"), "the cut was not in the freeze");
        ensure!(s.shell("app", "cat /data/generation")?.trim() == "1", "the cut came after the thaw");
        ensure!(s.shell("app", "stat -c %s /data/big")?.trim() == "209715200");
        Ok(())
    });
}

/// Writes one counter to three volumes in turn; brought back, it leaves them as they are.
const WRITER: &str = r"
while [ -e /a/n ]; do sleep 3600; done
i=0
while :; do i=$((i + 1)); for v in a b c; do echo $i > /$v/n.new; sync /$v/n.new; mv /$v/n.new /$v/n; sync /$v/n; done; done
";

fn three_volumes() -> Result<String> {
    let claims = ["a", "b", "c"].map(|name| {
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}}})
    });
    let names = ["a", "b", "c"];
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "app"}, "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", WRITER],
            "volumeMounts": names.map(|name| json!({"name": name, "mountPath": format!("/{name}")}))}],
        "volumes": names.map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}})),
    }});
    let all: Vec<_> = claims.into_iter().chain([pod]).collect();
    Ok(serde_json::to_string(&json!({"apiVersion": "v1", "kind": "List", "items": all}))?)
}

/// The counters of the three volumes in the recovery points of a backup. `None`: there is no number.
fn counters(s: &Scenario, backup: &Backup) -> Result<[Option<u64>; 3]> {
    let mut counted = [None; 3];
    for (counter, claim) in counted.iter_mut().zip(["a", "b", "c"]) {
        let snapshot = volume(backup, claim)?.snapshot.clone().context("a volume without a recovery point")?;
        *counter = s.lifeboat(&["cat", &snapshot, "n"])?.trim().parse().ok();
    }
    Ok(counted)
}

/// The writer goes from the first volume to the last: at any moment they differ by one, and never the other way.
fn is_one_instant(counted: [Option<u64>; 3]) -> bool {
    let [Some(a), Some(b), Some(c)] = counted else { return false };
    a >= b && b >= c && c + 1 >= a
}

#[test]
fn three_volumes_of_one_application_show_one_instant() {
    scenario("snap-group", async |s: Scenario| {
        s.apply(&three_volumes()?)?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        s.eventually("the writer", async || Ok(s.shell("app", "cat /c/n 2>/dev/null; true")?.trim().len() > 1)).await?;
        let backup = s.back_up("b").await?;
        let status = backup.status.as_ref().context("status")?;
        ensure!(status.consistency == Some(Consistency::Crash), "{:?}", status.consistency);
        ensure!(status.volumes.iter().all(|volume| volume.method == VolumeMethod::Group), "{:?}", status.volumes);
        println!("the cut took {:?} ms", status.cut_millis);
        nothing_is_left(&s).await?;
        let counted = counters(&s, &backup)?;
        ensure!(is_one_instant(counted), "not one instant: {counted:?}");
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        let read = s.shell("app", "cat /a/n /b/n /c/n")?;
        ensure!(
            read.lines().eq(counted.iter().flatten().map(u64::to_string)),
            "restored {read}, backed up {counted:?}"
        );
        Ok(())
    });
}

/// The negative control: the storage copies one volume after the other, and what is asserted above must not hold.
#[test]
fn copies_made_one_after_the_other_are_seen_not_to_be_one_instant() {
    scenario("snap-torn", async |s: Scenario| {
        s.apply(&three_volumes()?)?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        // Copies take the longer.
        s.shell("app", "for v in a b c; do dd if=/dev/urandom of=/$v/fill bs=1M count=40 2>/dev/null; done; sync")?;
        s.fault("CreateVolumeGroupSnapshot mode=torn")?;
        let plan = plan_with(&s, &json!([{"method": "Group", "readyWithin": "30s"}]));
        for number in 0..10 {
            let name = format!("b{number}");
            s.start_backup(&name, json!({"plan": plan})).await?;
            let backup = s.backup_finished(&name).await?;
            let is_whole = is_true(&backup.status.as_ref().context("status")?.conditions, ConditionType::Succeeded);
            if !is_whole {
                println!("{name}: a torn file system cannot even be mounted");
                return Ok(());
            }
            let counted = counters(&s, &backup)?;
            println!("{name}: {counted:?}");
            if !is_one_instant(counted) {
                return Ok(());
            }
        }
        anyhow::bail!("copies went unnoticed ten times: the test of one instant cannot tell a cut from a copy")
    });
}

#[test]
fn a_claim_that_no_pod_has_mounted_is_backed_up() {
    scenario("snap-unmounted", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "echo precious > /data/file; sync")?;
        s.kubectl(&["delete", "pod", "app", "--wait"])?;
        let backup = s.back_up("b").await?;
        let found = volume(&backup, "app-data")?;
        ensure!(found.method == VolumeMethod::Snapshot && found.fallback.is_none(), "{found:?}");
        nothing_is_left(&s).await?;
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.apply(&sleeper_manifest("app"))?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        ensure!(s.shell("app", "cat /data/file")? == "precious\n");
        Ok(())
    });
}

#[test]
fn a_snapshot_that_is_kept_brings_the_volume_back_by_cloning() {
    scenario("snap-kept", async |s: Scenario| {
        s.sleeper("app")?;
        s.apply(&format!(
            "apiVersion: lifeboat.dev/v1alpha1
kind: BackupPolicy
metadata: {{name: keeps}}
spec:
  tiers: [{{snapshot: {{keep: {{last: 1}}}}}}, {{repository: {{ref: {{name: {}}}}}}}]
",
            s.namespace
        ))?;
        for name in ["one", "two"] {
            s.shell("app", &format!("echo {name} > /data/file; sync"))?;
            s.start_backup(name, json!({"policyRef": {"name": "keeps"}})).await?;
            s.backup_succeeded(name).await?;
            s.eventually("one snapshot", async || Ok(left_behind(&s)?.is_empty() && snapshots(&s)?.len() == 1)).await?;
        }
        s.kubectl(&["delete", "pod/app", "pvc/app-data", "--wait"])?;
        // The data comes from the storage: the repository has no part in it.
        s.start_restore("back", json!({"source": {"backupRef": {"name": "two"}}})).await?;
        let restore = s.restore_finished("back").await?;
        let status = restore.status.context("status")?;
        ensure!(is_true(&status.conditions, ConditionType::Succeeded), "{:?}", status.conditions);
        ensure!(
            status.volumes.iter().all(|volume| volume.clone_of.is_some() && volume.transfer.is_none()),
            "{status:?}"
        );
        let claim = s.namespaced::<PersistentVolumeClaim>().get("app-data").await?;
        ensure!(claim.spec.and_then(|spec| spec.data_source).is_some_and(|source| source.kind == "VolumeSnapshot"));
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        ensure!(s.shell("app", "cat /data/file")? == "two\n");
        // The snapshot goes with its Backup.
        s.delete(&s.namespaced::<Backup>(), "two").await?;
        nothing_is_left(&s).await
    });
}

#[test]
fn a_snapshot_that_is_never_ready_or_whose_backup_is_deleted_leaves_nothing() {
    scenario("snap-never-ready", async |s: Scenario| {
        s.sleeper("app")?;
        let class = format!("{}-slow", s.namespace);
        s.apply(&format!(
            "apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata: {{name: {class}}}
driver: csi.test.lifeboat.dev
deletionPolicy: Retain
parameters: {{readyAfter: 1h}}
"
        ))?;
        let rule = |within: &str| json!([{"method": "Snapshot", "snapshotClass": class, "readyWithin": within}]);
        s.start_backup("late", json!({"plan": plan_with(&s, &rule("5s"))})).await?;
        let (_, message) = s.backup_failed("late", "SnapshotNotReady").await?;
        ensure!(message.contains("app-data") && message.contains("readyWithin"), "{message}");
        nothing_is_left(&s).await?;
        s.start_backup("deleted", json!({"plan": plan_with(&s, &rule("1h"))})).await?;
        s.eventually("the snapshot to be mounted", async || Ok(!left_behind(&s)?.is_empty())).await?;
        s.delete(&s.namespaced::<Backup>(), "deleted").await?;
        nothing_is_left(&s).await?;
        s.eventually("the storage to have none of them", async || {
            let fields = "jsonpath={.items[*].spec.volumeSnapshotClassName}";
            let rest = s.kubectl_cluster(&["get", "volumesnapshotcontents", "-o", fields])?;
            Ok(!rest.contains(&class))
        })
        .await?;
        s.kubectl_cluster(&["delete", "volumesnapshotclass", &class]).map(|_| ())
    });
}

#[test]
fn what_the_storage_lacks_is_said() {
    scenario("snap-lacking", async |s: Scenario| {
        s.sleeper("app")?;
        let rule = json!([{"method": "Snapshot", "snapshotClass": "absent"}]);
        s.start_backup("fails", json!({"plan": plan_with(&s, &rule)})).await?;
        let (_, message) = s.backup_failed("fails", "NoSnapshotClass").await?;
        ensure!(message.contains("absent") && message.contains("fallback"), "{message}");
        let rule = json!([{"method": "Snapshot", "snapshotClass": "absent", "fallback": "Live"}]);
        s.start_backup("live", json!({"plan": plan_with(&s, &rule)})).await?;
        let backup = s.backup_succeeded("live").await?;
        let found = volume(&backup, "app-data")?;
        ensure!(
            found.method == VolumeMethod::Live && found.fallback.as_ref().is_some_and(|why| why.contains("absent"))
        );
        Ok(())
    });
}
