//! A pod that does nothing but keep a claim mounted, so that an agent finds the volume on the pod's node.

use anyhow::Result;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use serde_json::{Value, json};

use crate::child::Owner;
use crate::context::Context;

/// What a holder keeps mounted, and where it may run.
pub(crate) struct Hold<'a> {
    pub(crate) owner: Owner<'a>,
    pub(crate) pod: &'a str,
    /// The claim whose data it is about: of the application.
    pub(crate) claim: &'a str,
    /// The claim that is mounted: the same, or the copy of a snapshot.
    pub(crate) mounted: &'a str,
    pub(crate) read_only: bool,
    /// Whether the claim is a raw block device.
    pub(crate) block: bool,
    /// Only beside an agent, and away from a node that fell silent.
    pub(crate) beside_agent: bool,
    /// The node that it should run on, if its volume can be mounted there.
    pub(crate) node: Option<&'a str>,
}

/// It fulfils the `restricted` pod security standard and has no token. A block device is not its to open either: kubelet maps it
/// for the pod, and the guardian of the node opens it.
pub(crate) fn pod(context: &Context, hold: &Hold<'_>) -> Result<Pod> {
    let mut spec = json!({
        "restartPolicy": "Never",
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{
            "name": "hold",
            "image": context.image,
            "imagePullPolicy": context.image_pull_policy,
            "command": ["/lifeboat-agent", "hold"],
            "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "32Mi"}},
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": hold.read_only}],
        }],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": hold.mounted, "readOnly": hold.read_only}}],
    });
    if hold.block {
        map_device(&mut spec, hold);
    }
    let mut tolerations: Vec<_> = context.dispatch.tolerations.iter().map(|one| json!(one)).collect();
    if hold.beside_agent {
        spec["affinity"] = beside_agent(hold.node);
        tolerations.extend(leave_lost_nodes());
    }
    spec["tolerations"] = tolerations.into();
    let secrets: Vec<_> = context.image_pull_secrets.iter().map(|name| json!({"name": name})).collect();
    spec["imagePullSecrets"] = secrets.into();
    let metadata = hold.owner.metadata(hold.pod, hold.claim);
    Ok(serde_json::from_value(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))?)
}

/// Whether a claim is a raw block device.
pub(crate) fn is_block(claim: &PersistentVolumeClaim) -> bool {
    claim.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref()) == Some("Block")
}

fn map_device(spec: &mut Value, hold: &Hold<'_>) {
    let container = &mut spec["containers"][0];
    container["volumeDevices"] = json!([{"name": "data", "devicePath": "/dev/volume"}]);
    container["volumeMounts"] = json!([]);
    // A claim of mode Block is never mounted read-only; the device is opened so.
    spec["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": hold.mounted}}]);
}

/// The node is a wish: the scheduler knows all that a volume needs.
fn beside_agent(node: Option<&str>) -> Value {
    let mut affinity = json!({"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "lifeboat", "app.kubernetes.io/component": "agent"}},
    }]}});
    if let Some(node) = node {
        let here = json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]});
        affinity["nodeAffinity"] =
            json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": here}]});
    }
    affinity
}

/// The default is to wait for five minutes; the snapshot can be mounted elsewhere at once.
fn leave_lost_nodes() -> impl Iterator<Item = Value> {
    ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]
        .into_iter()
        .map(|key| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 10}))
}
