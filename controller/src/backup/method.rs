//! How each claim is read: a pure function from the plan, the claims, the pods and what the storage offers.
//!
//! Nothing is read in a lesser way than the plan asks for without the plan allowing it and the status saying so.

use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use lifeboat_crds::backup::{Phase, VolumeBackupStatus, VolumeCut};
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::plan::{BackupPlan, Fallback, VolumeMatch, VolumeMethod, VolumeRule, selector_matches};

use super::resolve::{Refusal, is_readable};
use crate::holder::is_block;
use crate::storage::{Class, Storage, class_for};

/// The longest time from the cut until a snapshot can be read, unless a rule says otherwise.
const READY_WITHIN: Duration = Duration::from_hours(1);

/// A selected claim with its volume.
pub(super) struct Selected {
    pub(super) claim: PersistentVolumeClaim,
    pub(super) volume: Option<PersistentVolume>,
}

/// How all claims are read, or why one of them cannot be.
pub(super) fn choose(
    plan: &BackupPlan,
    selected: &[Selected],
    pods: &[Pod],
    storage: &Storage,
) -> Result<Vec<VolumeBackupStatus>, Refusal> {
    let mut all: Vec<_> =
        selected.iter().map(|one| volume(plan, one, pods, storage)).collect::<Result<_, Refusal>>()?;
    let is_free: Vec<_> = selected.iter().map(|one| rule(plan, &one.claim).is_none()).collect();
    for class in
        drivers_with_several(&all, &is_free).iter().filter_map(|driver| class_for(&storage.groups, driver, None))
    {
        for (status, _) in all.iter_mut().zip(&is_free).filter(|(_, is_free)| **is_free) {
            if let Some(cut) = status.cut.as_mut().filter(|cut| cut.driver == class.driver) {
                cut.class.clone_from(&class.name);
                status.method = VolumeMethod::Group;
            }
        }
    }
    Ok(all)
}

/// Drivers of more than one volume that no rule speaks about.
fn drivers_with_several(all: &[VolumeBackupStatus], is_free: &[bool]) -> Vec<String> {
    let mut drivers: Vec<_> = all
        .iter()
        .zip(is_free)
        .filter(|(status, is_free)| **is_free && status.method == VolumeMethod::Snapshot)
        .filter_map(|(status, _)| status.cut.as_ref().map(|cut| cut.driver.clone()))
        .collect();
    drivers.sort();
    let several = drivers.chunk_by(|a, b| a == b).filter(|same| same.len() > 1);
    several.filter_map(|same| same.first().cloned()).collect()
}

fn rule_matches(rule: &VolumeMatch, claim: &PersistentVolumeClaim) -> bool {
    let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_ref());
    rule.selector.as_ref().is_none_or(|selector| selector_matches(selector, claim.labels()))
        && rule.storage_class.as_ref().is_none_or(|wanted| class == Some(wanted))
        && rule.names.as_ref().is_none_or(|names| names.contains(&claim.name_any()))
}

fn rule<'a>(plan: &'a BackupPlan, claim: &PersistentVolumeClaim) -> Option<&'a VolumeRule> {
    plan.volumes.iter().find(|rule| rule_matches(&rule.matching, claim))
}

/// Whether the pod has the claim mounted, or its device if it is a raw block volume.
fn mounts(pod: &Pod, claim: &str, block: bool) -> bool {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).any(|volume| {
        let named = volume.persistent_volume_claim.as_ref().is_some_and(|source| source.claim_name == claim);
        let is_it = named || (volume.ephemeral.is_some() && format!("{}-{}", pod.name_any(), volume.name) == claim);
        is_it && (!block || has_device(pod, &volume.name))
    })
}

/// Whether a container of the pod has this volume as a device. Kubelet maps only those.
fn has_device(pod: &Pod, volume: &str) -> bool {
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    containers.flat_map(|container| container.volume_devices.iter().flatten()).any(|device| device.name == volume)
}

const WAY_OUT: &str = "or leave its data out with a rule {match: {names: [..]}, method: Skip}";

/// How a claim is read, or why it cannot be.
fn volume(
    plan: &BackupPlan,
    selected: &Selected,
    pods: &[Pod],
    storage: &Storage,
) -> Result<VolumeBackupStatus, Refusal> {
    let claim = &selected.claim;
    let rule = rule(plan, claim);
    let mut status = pending(claim);
    if rule.is_some_and(|rule| rule.method == VolumeMethod::Skip) {
        status.method = VolumeMethod::Skip;
        status.phase = Phase::Succeeded;
        status.message = Some("left out by a rule of the plan".into());
        return Ok(status);
    }
    check(claim)?;
    let wanted = rule.map(|rule| rule.method);
    if wanted == Some(VolumeMethod::Live) {
        return live(status, pods);
    }
    let lacking = match snapshot(rule, selected, storage) {
        Ok(cut) => {
            status.method = wanted.unwrap_or(VolumeMethod::Snapshot);
            status.cut = Some(cut);
            return Ok(status);
        }
        Err(lacking) => lacking,
    };
    match rule.map(|rule| rule.fallback) {
        Some(Fallback::Fail) => Err(Refusal::new(
            Reason::NoSnapshotClass,
            format!("{lacking}; write fallback: Live into its rule to have it read from a running pod, {WAY_OUT}"),
        )),
        Some(Fallback::Live) | None => {
            status.fallback = Some(lacking);
            live(status, pods)
        }
    }
}

fn pending(claim: &PersistentVolumeClaim) -> VolumeBackupStatus {
    let spec = claim.spec.clone().unwrap_or_default();
    VolumeBackupStatus {
        claim: claim.name_any(),
        claim_uid: claim.uid().unwrap_or_default(),
        volume: spec.volume_name,
        method: VolumeMethod::Live,
        fallback: None,
        block: is_block(claim),
        block_read: None,
        cut: None,
        attempt: 0,
        pod: None,
        pod_uid: None,
        node: None,
        dispatched_at: None,
        phase: Phase::Pending,
        snapshot: None,
        transfer: None,
        skipped: 0,
        skipped_sample: Vec::new(),
        message: None,
    }
}

/// What no method can read.
fn check(claim: &PersistentVolumeClaim) -> Result<(), Refusal> {
    let name = claim.name_any();
    if claim.metadata.deletion_timestamp.is_some() {
        let message = format!("the claim {name} is being deleted; wait for it, {WAY_OUT}");
        return Err(Refusal::new(Reason::VolumeUnavailable, message));
    }
    let spec = claim.spec.as_ref();
    let is_bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    if !is_bound || spec.is_none_or(|spec| spec.volume_name.is_none()) {
        let message = format!("the claim {name} is not bound to a volume; start a pod that uses it, {WAY_OUT}");
        return Err(Refusal::new(Reason::VolumeUnavailable, message));
    }
    Ok(())
}

/// How the claim's snapshot is made, or what is lacking for one.
fn snapshot(rule: Option<&VolumeRule>, selected: &Selected, storage: &Storage) -> Result<VolumeCut, String> {
    let name = selected.claim.name_any();
    let spec = selected.volume.as_ref().and_then(|volume| volume.spec.as_ref());
    let Some(csi) = spec.and_then(|spec| spec.csi.as_ref()) else {
        return Err(format!("the volume of the claim {name} comes from no CSI driver, and others have no snapshots"));
    };
    let driver = &csi.driver;
    let is_group = rule.is_some_and(|rule| rule.method == VolumeMethod::Group);
    let (kind, classes): (_, &[Class]) = if is_group {
        ("VolumeGroupSnapshotClass", &storage.groups)
    } else {
        ("VolumeSnapshotClass", &storage.singles)
    };
    let wanted = rule.and_then(|rule| rule.snapshot_class.as_deref());
    let Some(class) = class_for(classes, driver, wanted) else {
        let named = wanted.map(|wanted| format!(" `{wanted}`")).unwrap_or_default();
        return Err(format!("there is no {kind}{named} for the driver {driver} of the claim {name}"));
    };
    let own = selected.claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_ref());
    let of_driver = || storage.drivers.iter().filter(|(_, provisioner)| provisioner == driver);
    let Some((storage_class, _)) = of_driver().find(|(name, _)| Some(name) == own).or_else(|| of_driver().next())
    else {
        return Err(format!(
            "there is no StorageClass of the driver {driver} in which a snapshot of the claim {name} could be mounted"
        ));
    };
    let capacity = spec.and_then(|spec| spec.capacity.as_ref()).and_then(|capacity| capacity.get("storage"));
    // The schema refuses texts that are no durations.
    let ready_within = rule.and_then(|rule| rule.ready_within.as_ref()).and_then(|text| text.get().ok());
    Ok(VolumeCut {
        driver: driver.clone(),
        class: class.name.clone(),
        volume_handle: csi.volume_handle.clone(),
        storage_class: storage_class.clone(),
        size: capacity.map(|size| size.0.clone()).unwrap_or_default(),
        ready_within_seconds: ready_within.unwrap_or(READY_WITHIN).as_secs().max(1),
        audit_every: rule.and_then(|rule| rule.audit_every),
        handle: None,
        created_at: None,
    })
}

/// Reads the claim where a running pod has it.
fn live(mut status: VolumeBackupStatus, pods: &[Pod]) -> Result<VolumeBackupStatus, Refusal> {
    let name = &status.claim;
    let mut readers: Vec<_> = pods.iter().filter(|pod| is_readable(pod) && mounts(pod, name, status.block)).collect();
    readers.sort_by_key(|pod| pod.name_any());
    let Some(pod) = readers.first() else {
        let how = if status.block { "as a device" } else { "mounted" };
        let why = status.fallback.as_ref().map(|why| format!("{why}, and ")).unwrap_or_default();
        let message = format!(
            "{why}no running pod has the claim {name} {how}, so the method Live has nothing to read; start the pod, {WAY_OUT}"
        );
        return Err(Refusal::new(Reason::NoPodForVolume, message));
    };
    status.method = VolumeMethod::Live;
    status.pod = Some(pod.name_any());
    status.pod_uid = pod.uid();
    status.node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    Ok(status)
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const DRIVER: &str = "csi.example.com";

    fn selected(name: &str, driver: Option<&str>, change: Value) -> Selected {
        let mut claim = json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": {"app": "db"}},
            "spec": {"volumeName": format!("pv-{name}"), "storageClassName": "fast"}, "status": {"phase": "Bound"}
        });
        for (pointer, value) in change.as_object().into_iter().flatten() {
            *claim.pointer_mut(pointer).unwrap() = value.clone();
        }
        let csi = driver.map(|driver| json!({"driver": driver, "volumeHandle": format!("handle-{name}")}));
        let volume =
            json!({"metadata": {"name": format!("pv-{name}")}, "spec": {"csi": csi, "capacity": {"storage": "2Gi"}}});
        Selected { claim: serde_json::from_value(claim).unwrap(), volume: serde_json::from_value(volume).unwrap() }
    }

    fn pod(phase: &str, claim: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "db-0", "uid": "p"},
            "spec": {"nodeName": "n1", "containers": [], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]},
            "status": {"phase": phase}
        }))
        .unwrap()
    }

    fn plan(volumes: Value) -> BackupPlan {
        serde_json::from_value(json!({"volumes": volumes, "tiers": [{"repository": {"ref": {"name": "r"}}}]})).unwrap()
    }

    fn class(name: &str) -> Class {
        Class { name: name.into(), driver: DRIVER.into(), is_default: false }
    }

    fn storage(snapshots: bool, groups: bool) -> Storage {
        Storage {
            singles: snapshots.then(|| class("snap")).into_iter().collect(),
            groups: groups.then(|| class("group")).into_iter().collect(),
            drivers: vec![("fast".into(), DRIVER.into()), ("other".into(), "x".into())],
        }
    }

    fn one(rules: Value, selected: Selected, pods: &[Pod], storage: &Storage) -> Result<VolumeBackupStatus, Refusal> {
        choose(&plan(rules), &[selected], pods, storage).map(|mut all| all.remove(0))
    }

    #[test]
    fn the_best_method_that_the_driver_has_is_chosen() {
        let running = [pod("Running", "data")];
        let csi = || selected("data", Some(DRIVER), json!({}));
        let found = one(json!([]), csi(), &[], &storage(true, true)).unwrap();
        assert_eq!(found.method, VolumeMethod::Snapshot, "one volume needs no group");
        let cut = found.cut.unwrap();
        assert_eq!((cut.class.as_str(), cut.storage_class.as_str(), cut.size.as_str()), ("snap", "fast", "2Gi"));
        let found = one(json!([]), csi(), &running, &storage(false, false)).unwrap();
        assert_eq!((found.method, found.node.as_deref()), (VolumeMethod::Live, Some("n1")));
        assert!(found.fallback.unwrap().contains("no VolumeSnapshotClass"), "the status says why");
        let found = one(json!([]), selected("data", None, json!({})), &running, &storage(true, true)).unwrap();
        assert_eq!(found.method, VolumeMethod::Live);
    }

    #[test]
    fn several_volumes_of_a_driver_are_cut_as_a_group_where_it_can() {
        let all = |rules: Value, storage: &Storage| {
            let claims = [selected("a", Some(DRIVER), json!({})), selected("b", Some(DRIVER), json!({}))];
            let found = choose(&plan(rules), &claims, &[], storage).unwrap();
            found.into_iter().map(|one| (one.method, one.cut.unwrap().class)).collect::<Vec<_>>()
        };
        let (group, snap) = ((VolumeMethod::Group, "group".to_owned()), (VolumeMethod::Snapshot, "snap".to_owned()));
        assert_eq!(all(json!([]), &storage(true, true)), [group.clone(), group.clone()]);
        assert_eq!(all(json!([]), &storage(true, false)), [snap.clone(), snap.clone()]);
        let rule = json!([{"match": {"names": ["a"]}, "method": "Snapshot"}]);
        assert_eq!(all(rule, &storage(true, true)), [snap.clone(), snap], "what a rule says stays");
        let rule = json!([{"match": {"names": ["a"]}, "method": "Group"}, {"method": "Group"}]);
        assert_eq!(all(rule, &storage(true, true)), [group.clone(), group]);
    }

    #[test]
    fn what_the_driver_lacks_is_refused_or_read_live_as_the_rule_says() {
        let running = [pod("Running", "data")];
        for (method, driver, storage, says) in [
            ("Snapshot", Some(DRIVER), storage(false, true), "no VolumeSnapshotClass"),
            ("Group", Some(DRIVER), storage(true, false), "no VolumeGroupSnapshotClass"),
            ("Group", None, storage(true, true), "no CSI driver"),
            ("Snapshot", Some("unknown"), storage(true, true), "driver unknown"),
            ("Snapshot", Some(DRIVER), Storage { drivers: vec![], ..storage(true, true) }, "no StorageClass"),
        ] {
            let claim = || selected("data", driver, json!({}));
            let refusal = one(json!([{"method": method}]), claim(), &running, &storage).unwrap_err();
            assert_eq!(refusal.reason, Reason::NoSnapshotClass);
            assert!(refusal.message.contains(says) && refusal.message.contains("fallback"), "{}", refusal.message);
            let rule = json!([{"method": method, "fallback": "Live"}]);
            let found = one(rule.clone(), claim(), &running, &storage).unwrap();
            assert_eq!(found.method, VolumeMethod::Live);
            assert!(found.fallback.unwrap().contains(says));
            assert_eq!(one(rule, claim(), &[], &storage).unwrap_err().reason, Reason::NoPodForVolume);
        }
        let wanted = json!([{"method": "Snapshot", "snapshotClass": "absent"}]);
        let refusal =
            one(wanted, selected("data", Some(DRIVER), json!({})), &running, &storage(true, true)).unwrap_err();
        assert!(refusal.message.contains("`absent`"), "{}", refusal.message);
    }

    #[test]
    fn a_mounted_claim_is_read_where_its_pod_runs() {
        let pods = [pod("Pending", "data"), pod("Running", "other"), pod("Running", "data")];
        let claim = selected("data", Some(DRIVER), json!({}));
        let found = one(json!([{"method": "Live"}]), claim, &pods, &storage(true, true)).unwrap();
        assert_eq!(
            (found.node.as_deref(), found.pod_uid.as_deref(), found.volume.as_deref(), found.fallback),
            (Some("n1"), Some("p"), Some("pv-data"), None)
        );
    }

    #[test]
    fn a_raw_block_claim_is_read_where_a_pod_has_its_device() {
        let claim = || selected("data", Some(DRIVER), block());
        let mut with_device = pod("Running", "data");
        let container = json!({"name": "main", "volumeDevices": [{"name": "v", "devicePath": "/dev/data"}]});
        with_device.spec.as_mut().unwrap().containers = vec![serde_json::from_value(container).unwrap()];
        let pods = [pod("Running", "data"), with_device];
        let found = one(json!([]), claim(), &pods, &storage(true, true)).unwrap();
        assert!(found.block && found.method == VolumeMethod::Snapshot, "a snapshot is better");
        for (rules, storage) in [
            (json!([{"method": "Live"}]), storage(true, true)),
            (json!([]), storage(false, false)),
            (json!([{"method": "Snapshot", "fallback": "Live"}]), storage(false, false)),
        ] {
            let found = one(rules.clone(), claim(), &pods, &storage).unwrap();
            assert!(found.block && found.method == VolumeMethod::Live && found.cut.is_none(), "{rules}");
            // Kubelet maps no device for a pod that names the claim and does not use it.
            assert_eq!(one(rules, claim(), &pods[..1], &storage).unwrap_err().reason, Reason::NoPodForVolume);
        }
    }

    fn block() -> Value {
        json!({"/spec": {"volumeName": "pv", "storageClassName": "fast", "volumeMode": "Block"}})
    }

    #[test]
    fn claims_that_cannot_be_read_are_refused_with_the_way_out() {
        let pods = [pod("Pending", "data")];
        for (change, rules, reason) in [
            (json!({}), json!([{"method": "Live"}]), Reason::NoPodForVolume),
            (json!({"/status": {"phase": "Pending"}}), json!([]), Reason::VolumeUnavailable),
            (
                json!({"/metadata": {"name": "data", "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
                json!([]),
                Reason::VolumeUnavailable,
            ),
            (block(), json!([{"method": "Live"}]), Reason::NoPodForVolume),
        ] {
            let refusal = one(rules, selected("data", Some(DRIVER), change), &pods, &storage(true, true)).unwrap_err();
            assert_eq!(refusal.reason, reason);
            assert!(refusal.message.contains("data") && refusal.message.contains("Skip"), "{}", refusal.message);
        }
        let skipping = json!([{"match": {"storageClass": "fast"}, "method": "Skip"}]);
        let found = one(skipping, selected("data", None, json!({})), &[], &storage(true, true)).unwrap();
        assert_eq!(found.method, VolumeMethod::Skip);
    }
}
