//! Raw block volumes on a real cluster: they come back byte by byte; what their storage lists as unchanged is not read; a
//! list that lies, a volume that grew and a storage without lists are told apart in the status. Without snapshots they are read
//! where their pod has them, and they come back also into a namespace that admits only restricted pods.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use kube::Api;
use kube::api::ListParams;
use lifeboat_crds::backup::{BlockRead, Consistency, ReadBy, VolumeBackupStatus};
use lifeboat_crds::conditions::{ConditionType, get};
use lifeboat_crds::plan::VolumeMethod;
use lifeboat_crds::{Backup, Restore, VolumeTask};
use lifeboat_e2e::scenario::{BUSYBOX, INSTALLED_IN, Scenario, StoreHeld, scenario};
use serde_json::{Value, json};

/// A pod that sleeps, with a raw block claim at `/dev/data`.
fn block_pod(size: &str) -> Result<String> {
    block_pod_with(size, "ReadWriteOnce")
}

/// As [`block_pod`], with another access mode.
fn block_pod_with(size: &str, access: &str) -> Result<String> {
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"}, "spec": {
        "accessModes": [access], "volumeMode": "Block", "storageClassName": "cut-block", "resources": {"requests": {"storage": size}}}});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "app"}, "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "while :; do sleep 3600; done"],
            "volumeDevices": [{"name": "disk", "devicePath": "/dev/data"}]}],
        "volumes": [{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}],
    }});
    Ok(serde_json::to_string(&json!({"apiVersion": "v1", "kind": "List", "items": [claim, pod]}))?)
}

fn ready(s: &Scenario) -> Result<()> {
    s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"]).map(|_| ())
}

/// Writes `count` blocks of 4 KiB of noise from block `seek` on.
fn write(s: &Scenario, seek: u64, count: u64) -> Result<()> {
    s.shell("app", &format!("dd if=/dev/urandom of=/dev/data bs=4096 seek={seek} count={count} conv=fsync 2>/dev/null"))
        .map(|_| ())
}

/// The hash of the device's first bytes, in MiB.
fn hash(s: &Scenario, mib: u64) -> Result<String> {
    s.shell("app", &format!("dd if=/dev/data bs=1048576 count={mib} 2>/dev/null | sha256sum"))
}

/// The hash of those parts of 10 GiB that are written to, and of some beside them.
fn hash_of_parts(s: &Scenario) -> Result<String> {
    let part = "dd if=/dev/data bs=1048576 skip=$at count=40 2>/dev/null";
    s.shell("app", &format!("for at in 0 2720 5000 7812 10200; do {part}; done | sha256sum"))
}

/// A plan that keeps the newest snapshot on the storage: only from there can the next list of changes begin.
fn plan(s: &Scenario, audit_every: u32) -> Value {
    let mut plan = s.plan();
    plan["volumes"] = json!([{"method": "Snapshot", "auditEvery": audit_every}]);
    plan["tiers"] = json!([{"snapshot": {"keep": {"last": 1}}}, {"repository": {"ref": {"name": s.namespace}}}]);
    plan
}

#[allow(clippy::print_stdout, reason = "the figures of a scenario")]
async fn back_up(s: &Scenario, name: &str, plan: Value) -> Result<(Backup, VolumeBackupStatus, BlockRead)> {
    s.start_backup(name, json!({"plan": plan})).await?;
    let backup = s.backup_succeeded(name).await?;
    let volume = backup.status.iter().flat_map(|status| &status.volumes).next().context("a volume")?.clone();
    ensure!(volume.block, "{volume:?}");
    let read = volume.block_read.clone().context("blockRead")?;
    println!("{name}: {:?} bytes read, {read:?}", volume.transfer.map(|transfer| transfer.read_bytes));
    Ok((backup, volume, read))
}

fn read_bytes(volume: &VolumeBackupStatus) -> Result<u64> {
    Ok(volume.transfer.context("transfer")?.read_bytes)
}

async fn restored(s: &Scenario, name: &str) -> Result<Restore> {
    s.lose_namespace()?;
    let restore = s.restore_newest(name).await?;
    ready(s)?;
    Ok(restore)
}

async fn nothing_is_left(s: &Scenario, uid: &str) -> Result<()> {
    let mine = format!("lifeboat.dev/owner-uid={uid}");
    s.eventually("the pods and claims of the backup to be gone", async || {
        let ours = "pods,persistentvolumeclaims,volumesnapshots";
        let left = s.kubectl_cluster(&["-n", INSTALLED_IN, "get", ours, "-l", &mine, "-o", "name"])?;
        Ok(left.trim().is_empty() && s.leftovers().await?.is_empty())
    })
    .await
}

#[test]
fn a_raw_block_volume_comes_back_byte_by_byte() {
    scenario("block-roundtrip", async |s: Scenario| {
        s.apply(&block_pod("64Mi")?)?;
        ready(&s)?;
        write(&s, 0, 600)?;
        write(&s, 9000, 777)?;
        let before = hash(&s, 64)?;
        let (backup, volume, read) = back_up(&s, "b", s.plan()).await?;
        ensure!(volume.transfer.is_some_and(|transfer| transfer.bytes == 64 << 20), "{volume:?}");
        ensure!(read.by == ReadBy::Allocated && read.reason.is_some_and(|why| why.contains("first backup")));
        ensure!(read_bytes(&volume)? < 16 << 20, "holes are not read");
        nothing_is_left(&s, backup.metadata.uid.as_deref().unwrap_or_default()).await?;
        let restore = restored(&s, "back").await?;
        ensure!(hash(&s, 64)? == before, "the device is another");
        ensure!(restore.status.context("status")?.volumes.iter().all(|volume| volume.transfer.is_some()));
        Ok(())
    });
}

#[test]
fn of_an_unchanged_volume_nothing_is_read_and_of_a_changed_one_the_changes() {
    scenario("block-delta", async |s: Scenario| {
        s.apply(&block_pod("10Gi")?)?;
        ready(&s)?;
        write(&s, 0, 4096)?;
        write(&s, 2_000_000, 8192)?;
        let (_, _, first) = back_up(&s, "first", plan(&s, 100)).await?;
        ensure!(first.by == ReadBy::Allocated, "{first:?}");
        let (_, unchanged, read) = back_up(&s, "unchanged", plan(&s, 100)).await?;
        ensure!(read.by == ReadBy::Delta && read.listed_bytes == Some(0) && read.reason.is_none(), "{read:?}");
        // All that is read is the sample that is audited: about one in 2,048.
        ensure!(read_bytes(&unchanged)? == read.audited_bytes && read.audited_bytes <= 24 << 20, "{unchanged:?}");
        for block in [1, 3000, 700_001, 2_000_100, 2_621_439] {
            write(&s, block, 1)?;
        }
        let before = hash_of_parts(&s)?;
        let (_, changed, read) = back_up(&s, "changed", plan(&s, 100)).await?;
        ensure!(read.by == ReadBy::Delta && read.listed_bytes.is_some_and(|bytes| bytes <= 1 << 20), "{read:?}");
        ensure!(read_bytes(&changed)? - read.audited_bytes <= 1 << 20, "{changed:?}");
        ensure!(changed.transfer.is_some_and(|transfer| transfer.new_bytes < 1 << 20), "{changed:?}");
        // Without the snapshot that the newest backup shows there is no list of changes.
        s.kubectl(&["delete", "volumesnapshots", "--all", "--timeout=60s"])?;
        let (_, _, read) = back_up(&s, "baseless", plan(&s, 100)).await?;
        ensure!(read.by == ReadBy::Allocated, "{read:?}");
        ensure!(read.reason.is_some_and(|why| why.contains("no list of what changed")));
        restored(&s, "back").await?;
        ensure!(hash_of_parts(&s)? == before, "the device is another");
        Ok(())
    });
}

#[test]
fn a_list_that_leaves_out_a_change_is_found_and_the_volume_is_read_in_full() {
    scenario("block-lie", async |s: Scenario| {
        s.apply(&block_pod("32Mi")?)?;
        ready(&s)?;
        write(&s, 0, 2000)?;
        back_up(&s, "first", plan(&s, 100)).await?;
        write(&s, 100, 1)?;
        write(&s, 1500, 1)?;
        let before = hash(&s, 32)?;
        s.fault("GetMetadataDelta lie=incomplete")?;
        let (backup, volume, read) = back_up(&s, "lied-to", plan(&s, 1)).await?;
        ensure!(read.by == ReadBy::Full && read.wrong_list.is_some(), "{read:?}");
        ensure!(read_bytes(&volume)? >= 32 << 20, "{volume:?}");
        let status = backup.status.context("status")?;
        let condition = get(&status.conditions, ConditionType::BlockLists).context("BlockLists")?;
        ensure!(condition.status == "False" && condition.reason == "WrongBlockList", "{condition:?}");
        // Lists that cannot be right are not believed without any audit.
        for (fault, says) in [("beyond", "behind the volume"), ("broken", "Unavailable")] {
            s.heal()?;
            s.fault(&format!("GetMetadataDelta lie={fault}"))?;
            let (_, _, read) = back_up(&s, fault, plan(&s, 100)).await?;
            ensure!(
                read.by == ReadBy::Allocated && read.reason.as_ref().is_some_and(|why| why.contains(says)),
                "{read:?}"
            );
        }
        s.heal()?;
        restored(&s, "back").await?;
        ensure!(hash(&s, 32)? == before, "the device is another");
        Ok(())
    });
}

#[test]
fn a_volume_that_grew_and_a_storage_without_lists_are_read_in_full_and_the_status_says_why() {
    scenario("block-grown", async |s: Scenario| {
        s.apply(&block_pod("32Mi")?)?;
        ready(&s)?;
        write(&s, 0, 1000)?;
        back_up(&s, "first", plan(&s, 100)).await?;
        s.kubectl(&["patch", "pvc", "disk", "-p", r#"{"spec":{"resources":{"requests":{"storage":"64Mi"}}}}"#])?;
        s.eventually("the volume to grow", async || {
            Ok(s.shell("app", "dd if=/dev/data bs=1048576 2>/dev/null | wc -c")?.trim() == "67108864")
        })
        .await?;
        write(&s, 12000, 10)?;
        let before = hash(&s, 64)?;
        let (_, _, read) = back_up(&s, "grown", plan(&s, 100)).await?;
        ensure!(read.by == ReadBy::Allocated, "{read:?}");
        ensure!(read.reason.is_some_and(|why| why.contains("33554432") && why.contains("67108864")));
        let service = s.kubectl_cluster(&["get", "snapshotmetadataservices", "-o", "json"])?;
        s.kubectl_cluster(&["delete", "snapshotmetadataservices", "--all"])?;
        let full = back_up(&s, "without", plan(&s, 100)).await;
        s.kubectl_cluster_with(&["apply", "-f", "-"], &without_versions(&service)?)?;
        let (_, volume, read) = full?;
        ensure!(read.by == ReadBy::Full && read.reason.is_some_and(|why| why.contains("no SnapshotMetadataService")));
        ensure!(read_bytes(&volume)? == 64 << 20, "{volume:?}");
        restored(&s, "back").await?;
        ensure!(hash(&s, 64)? == before, "the device is another");
        Ok(())
    });
}

/// A list of objects as it can be applied again.
fn without_versions(list: &str) -> Result<String> {
    let mut list: Value = serde_json::from_str(list)?;
    for item in list["items"].as_array_mut().into_iter().flatten() {
        if let Some(metadata) = item["metadata"].as_object_mut() {
            metadata.retain(|key, _| key == "name");
        }
    }
    Ok(list.to_string())
}

/// A command that keeps the pod `app` at rest. It writes nothing, so it has nothing to do.
fn held() -> Value {
    json!({"maxFreeze": "60s", "steps": [{
        "selector": {"matchLabels": {"app": "block"}}, "hold": {"command": ["sh", "-c", "echo frozen; cat >/dev/null"]}}]})
}

#[test]
fn a_raw_block_volume_without_snapshots_is_read_where_its_pod_has_it() {
    scenario("block-live", async |s: Scenario| {
        // No second pod may have this claim.
        s.apply(&block_pod_with("64Mi", "ReadWriteOncePod")?)?;
        ready(&s)?;
        s.kubectl(&["label", "pod", "app", "app=block"])?;
        write(&s, 0, 600)?;
        write(&s, 9000, 777)?;
        let (backup, volume, read) = back_up(&s, "first", s.live_plan()).await?;
        ensure!(volume.method == VolumeMethod::Live && volume.pod.as_deref() == Some("app"), "{volume:?}");
        ensure!(read.by == ReadBy::Full && read.reason.is_some_and(|why| why.contains("snapshots only")));
        ensure!(read_bytes(&volume)? == 64 << 20, "{volume:?}");
        ensure!(volume.transfer.is_some_and(|transfer| transfer.new_bytes < 16 << 20), "holes take room: {volume:?}");
        let level = |backup: &Backup| backup.status.as_ref().and_then(|status| status.consistency);
        ensure!(level(&backup) == Some(Consistency::None), "nothing kept it at rest: {backup:?}");

        write(&s, 100, 3)?;
        let before = hash(&s, 64)?;
        let mut plan = s.plan();
        plan["volumes"] = json!([{"method": "Snapshot", "snapshotClass": "absent", "fallback": "Live"}]);
        plan["quiesce"] = held();
        let (backup, volume, _) = back_up(&s, "second", plan).await?;
        ensure!(volume.method == VolumeMethod::Live && volume.fallback.is_some(), "{volume:?}");
        ensure!(volume.transfer.is_some_and(|transfer| transfer.new_bytes < 1 << 20), "not compared: {volume:?}");
        ensure!(level(&backup) == Some(Consistency::Application), "{backup:?}");
        s.eventually("everything of the backup to be gone", async || Ok(s.leftovers().await?.is_empty())).await?;
        restored(&s, "back").await?;
        ensure!(hash(&s, 64)? == before, "the device is another");
        Ok(())
    });
}

#[test]
fn the_pod_whose_device_is_read_may_go_and_the_next_backup_reads_its_successor() {
    scenario("block-vanishes", async |s: Scenario| {
        s.apply(&block_pod("10Gi")?)?;
        ready(&s)?;
        write(&s, 0, 4096)?;
        s.start_backup("lost", json!({"plan": s.live_plan()})).await?;
        let tasks = Api::<VolumeTask>::namespaced(s.client.clone(), INSTALLED_IN);
        s.eventually("the device to be read", async || {
            let all = tasks.list(&ListParams::default()).await?;
            let mut ours = all.iter().filter(|task| task.spec.namespace() == Some(s.namespace.as_str()));
            Ok(ours.any(|task| task.status.as_ref().is_some_and(|status| status.session.is_some())))
        })
        .await?;
        // It cannot end before the pod does.
        let held = StoreHeld::hold()?;
        s.kubectl(&["delete", "pod", "app", "--timeout=120s"])?;
        s.backup_failed("lost", "PodVanished").await?;
        drop(held);
        // Nobody holds the device any more.
        s.apply(&block_pod("10Gi")?)?;
        ready(&s)?;
        let (_, volume, _) = back_up(&s, "after", s.live_plan()).await?;
        ensure!(volume.method == VolumeMethod::Live, "{volume:?}");
        s.kubectl(&["delete", "pod", "app", "--timeout=120s"])?;
        s.start_backup("nobody", json!({"plan": s.live_plan()})).await?;
        let (_, message) = s.backup_failed("nobody", "NoPodForVolume").await?;
        ensure!(message.contains("as a device") && message.contains("start the pod"), "{message}");
        Ok(())
    });
}

#[test]
fn a_raw_block_volume_comes_back_into_a_namespace_for_restricted_pods_only() {
    scenario("block-restricted", async |s: Scenario| {
        s.apply(&block_pod("64Mi")?)?;
        ready(&s)?;
        write(&s, 0, 600)?;
        write(&s, 9000, 777)?;
        let before = hash(&s, 64)?;
        // The pod that writes and hashes is root's, so it cannot come back there.
        let mut plan = s.plan();
        plan["scope"] = json!({"includeResources": ["persistentvolumeclaims"]});
        back_up(&s, "b", plan).await?;
        s.lose_namespace()?;
        let restricted = "pod-security.kubernetes.io/enforce=restricted";
        s.kubectl_cluster(&["label", "namespace", &s.namespace, restricted])?;
        ensure!(s.apply(&block_pod("64Mi")?).is_err(), "a pod of root was admitted");
        s.kubectl(&["delete", "pvc", "disk", "--ignore-not-found", "--timeout=60s"])?;
        let restore = s.restore_newest("back").await?;
        let volumes = restore.status.context("status")?.volumes;
        ensure!(volumes.len() == 1 && volumes.iter().all(|volume| volume.transfer.is_some()), "{volumes:?}");
        s.eventually("the pods of the restore to be gone", async || Ok(s.leftovers().await?.is_empty())).await?;
        s.kubectl_cluster(&["label", "namespace", &s.namespace, "pod-security.kubernetes.io/enforce-"])?;
        s.apply(&block_pod("64Mi")?)?;
        ready(&s)?;
        ensure!(hash(&s, 64)? == before, "the device is another");
        Ok(())
    });
}
