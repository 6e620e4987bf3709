//! The leases of a backup: made for the guardians of the nodes, watched, released, removed.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::labels;
use lifeboat_crds::quiesce_lease::{LeaseEnd, LeasedWorkload, QuiesceLease, QuiesceLeaseSpec};
use serde_json::json;

use super::super::Run;
use super::workloads::Target;
use crate::context::Context;
use crate::task;

fn api(context: &Context) -> Api<QuiesceLease> {
    context.namespaced(&context.namespace)
}

/// The name of a workload's lease: the same after every restart.
pub(super) fn name(backup_uid: &str, step: u32, pod_uid: &str, container: &str) -> String {
    task::name('q', backup_uid, &format!("{step}/{pod_uid}/{container}"))
}

/// The nodes with a guardian, and whether it is ready.
pub(super) async fn guarded_nodes(context: &Context) -> Result<BTreeMap<String, bool>> {
    let agents = ListParams::default().labels("app.kubernetes.io/name=lifeboat,app.kubernetes.io/component=agent");
    let pods = context.namespaced::<Pod>(&context.namespace).list(&agents).await.context("cannot list the agents")?;
    let mut nodes = BTreeMap::new();
    for pod in pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
        let Some(node) = pod.spec.and_then(|spec| spec.node_name) else { continue };
        let statuses = pod.status.into_iter().flat_map(|status| status.container_statuses.unwrap_or_default());
        let is_ready = statuses.into_iter().any(|status| status.name == "guardian" && status.ready);
        *nodes.entry(node).or_default() |= is_ready;
    }
    Ok(nodes)
}

/// Asks the guardian of the workload's node to bring it to rest.
pub(super) async fn create(run: &Run, target: &Target, deadline: Timestamp, context: &Context) -> Result<()> {
    let left = Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default();
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let marks = [(labels::MANAGED_BY, "lifeboat".to_owned()), (labels::OWNER_UID, run.uid.clone())];
    let lease = QuiesceLease {
        metadata: ObjectMeta {
            name: Some(name(&run.uid, target.step, &target.pod_uid, &target.container)),
            annotations: Some([(labels::OWNER.to_owned(), format!("Backup/{}", run.name))].into()),
            labels: Some(marks.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ..ObjectMeta::default()
        },
        spec: QuiesceLeaseSpec {
            node_name: target.node.clone(),
            workload: LeasedWorkload {
                namespace: run.namespace.clone(),
                pod: target.pod.clone(),
                pod_uid: target.pod_uid.clone(),
                container: target.container.clone(),
            },
            action: target.action.clone(),
            deadline: Time(deadline),
            limit_millis: millis(left),
            timeout_millis: millis(target.timeout),
            release: false,
        },
        status: None,
    };
    match api(context).create(&PostParams::default(), &lease).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error).context("cannot make a QuiesceLease"),
    }
}

/// All leases of a backup, by name.
pub(super) async fn of_backup(uid: &str, context: &Context) -> Result<BTreeMap<String, QuiesceLease>> {
    let list = ListParams::default().labels(&format!("{}={uid}", labels::OWNER_UID));
    let leases = api(context).list(&list).await.context("cannot list leases")?;
    Ok(leases.into_iter().map(|lease| (lease.name_any(), lease)).collect())
}

/// Tells the guardian to let go.
pub(super) async fn release(name: &str, context: &Context) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": {"release": true}}));
    match api(context).patch(name, &PatchParams::default(), &patch).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error).context("cannot release a QuiesceLease"),
    }
}

/// Removes the leases of a backup; what one of them still held is let go thereby.
pub(in super::super) async fn remove(uid: &str, context: &Context) -> Result<()> {
    for name in of_backup(uid, context).await?.into_keys() {
        match api(context).delete(&name, &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).context("cannot delete a QuiesceLease"),
        }
    }
    Ok(())
}

/// The reason of a condition that tells of such an end.
pub(super) fn reason_of(end: LeaseEnd) -> Reason {
    match end {
        LeaseEnd::Released => Reason::Done,
        LeaseEnd::Failed | LeaseEnd::Gone => Reason::HookFailed,
        LeaseEnd::TimedOut => Reason::HookTimedOut,
        LeaseEnd::Deadline => Reason::FreezeDeadline,
        LeaseEnd::SessionLost | LeaseEnd::GuardianLost => Reason::FreezeBroken,
    }
}
