//! Rules about Kubernetes objects: which belong into a backup, what of them is kept, how they come back.
//!
//! Pure functions on JSON; nothing here speaks to a server.

use serde_json::{Map, Value};

/// The label value by which Lifeboat's own objects are known.
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// A resource of the API, as captures name it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ResourceName {
    /// The plural, such as `deployments`.
    pub(crate) plural: String,
    /// The group; empty for the core group.
    pub(crate) group: String,
}

impl ResourceName {
    /// As users write it in `includeResources`: `configmaps`, `deployments.apps`.
    pub(crate) fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// Whether a word of `includeResources` or `excludeResources` means this resource.
    pub(crate) fn is_meant_by(&self, word: &str) -> bool {
        word == self.qualified() || word == self.plural
    }

    /// The folder of its objects in the repository: `configmaps.core`.
    pub(crate) fn folder(&self) -> String {
        format!("{}.{}", self.plural, if self.group.is_empty() { "core" } else { &self.group })
    }
}

/// Resources that are never captured: others make them anew, or they speak about a moment that is over.
const NEVER: &[(&str, &str)] = &[
    ("events", ""),
    ("events", "events.k8s.io"),
    ("endpoints", ""),
    ("leases", "coordination.k8s.io"),
    ("bindings", ""),
    ("localsubjectaccessreviews", "authorization.k8s.io"),
    ("pods", "metrics.k8s.io"),
    ("backups", "lifeboat.dev"),
    ("restores", "lifeboat.dev"),
    ("volumetasks", "lifeboat.dev"),
    ("quiesceleases", "lifeboat.dev"),
    ("volumesnapshots", "snapshot.storage.k8s.io"),
    ("volumegroupsnapshots", "groupsnapshot.storage.k8s.io"),
    ("csistoragecapacities", "storage.k8s.io"),
    ("podcertificaterequests", "certificates.k8s.io"),
];

/// Whether objects of this resource are captured at all.
pub(crate) fn is_captured_resource(resource: &ResourceName) -> bool {
    !NEVER.iter().any(|(plural, group)| resource.plural == *plural && resource.group == *group)
}

/// Cluster-scoped resources that are never a part of an application, whatever a scope asks for: the cluster's own affairs, and what
/// volumes and snapshots of others lie in.
const NEVER_OF_CLUSTER: &[(&str, &str)] = &[
    ("nodes", ""),
    ("namespaces", ""),
    ("persistentvolumes", ""),
    ("componentstatuses", ""),
    ("csinodes", "storage.k8s.io"),
    ("volumeattachments", "storage.k8s.io"),
    ("certificatesigningrequests", "certificates.k8s.io"),
    ("clusterrepositories", "lifeboat.dev"),
    ("volumesnapshotcontents", "snapshot.storage.k8s.io"),
    ("volumegroupsnapshotcontents", "groupsnapshot.storage.k8s.io"),
    ("nodes", "metrics.k8s.io"),
    ("resourceslices", "resource.k8s.io"),
    ("ipaddresses", "networking.k8s.io"),
    ("servicecidrs", "networking.k8s.io"),
];

/// Whether objects of this cluster-scoped resource may be captured because a scope asks for them.
pub(crate) fn is_captured_cluster_resource(resource: &ResourceName) -> bool {
    !NEVER_OF_CLUSTER.iter().any(|(plural, group)| resource.plural == *plural && resource.group == *group)
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Whether the object has a controller that makes it anew.
fn has_controller(object: &Value) -> bool {
    object
        .pointer("/metadata/ownerReferences")
        .and_then(Value::as_array)
        .is_some_and(|owners| owners.iter().any(|owner| owner.get("controller") == Some(&Value::Bool(true))))
}

/// Whether a Job or Pod has ended: brought back, it would run a second time.
fn has_ended(resource: &ResourceName, object: &Value) -> bool {
    match (resource.plural.as_str(), resource.group.as_str()) {
        ("jobs", "batch") => object.pointer("/status/conditions").and_then(Value::as_array).is_some_and(|conditions| {
            conditions.iter().any(|c| matches!(text(c, "/type"), "Complete" | "Failed") && text(c, "/status") == "True")
        }),
        ("pods", "") => matches!(text(object, "/status/phase"), "Succeeded" | "Failed"),
        _ => false,
    }
}

/// Whether the object belongs into a backup.
pub(crate) fn is_captured(resource: &ResourceName, object: &Value) -> bool {
    let label = object.pointer("/metadata/labels").and_then(|labels| labels.get(MANAGED_BY)).and_then(Value::as_str);
    if label == Some("lifeboat") || has_controller(object) || has_ended(resource, object) {
        return false;
    }
    let name = text(object, "/metadata/name");
    match (resource.plural.as_str(), resource.group.as_str()) {
        ("configmaps", "") => name != "kube-root-ca.crt",
        ("serviceaccounts", "") => name != "default",
        ("secrets", "") => text(object, "/type") != "kubernetes.io/service-account-token",
        ("endpointslices", "discovery.k8s.io") => {
            let labels = object.pointer("/metadata/labels");
            labels.and_then(|labels| labels.get("endpointslice.kubernetes.io/managed-by")).is_none()
        }
        _ => true,
    }
}

/// Metadata that the server writes and that means nothing elsewhere.
const SERVER_METADATA: &[&str] = &[
    "managedFields",
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "selfLink",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
];

/// What of an object is kept: everything but the status and the server's metadata.
pub(crate) fn captured_form(mut object: Value) -> Value {
    if let Some(map) = object.as_object_mut() {
        map.remove("status");
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in SERVER_METADATA {
            metadata.remove(*field);
        }
        if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
            labels.retain(|key, _| !key.starts_with(lifeboat_crds::labels::GROUP_PREFIX));
        }
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    object
}

/// Labels and annotations by which `GitOps` tools know what they manage: brought back, the tools would prune the object.
fn is_gitops_mark(key: &str) -> bool {
    key == "argocd.argoproj.io/instance"
        || key == "argocd.argoproj.io/tracking-id"
        || key.starts_with("kustomize.toolkit.fluxcd.io/")
        || key.starts_with("helm.toolkit.fluxcd.io/")
}

/// Labels and annotations that controllers of another cluster wrote about another volume.
fn is_binding_mark(key: &str) -> bool {
    key.starts_with("pv.kubernetes.io/")
        || key.starts_with("volume.beta.kubernetes.io/")
        || key.starts_with("volume.kubernetes.io/")
}

fn retain(object: &mut Value, pointer: &str, keep: impl Fn(&str) -> bool) {
    if let Some(map) = object.pointer_mut(pointer).and_then(Value::as_object_mut) {
        map.retain(|key, _| keep(key));
    }
}

fn remove(object: &mut Value, pointer: &str, fields: &[&str]) {
    if let Some(map) = object.pointer_mut(pointer).and_then(Value::as_object_mut) {
        for field in fields {
            map.remove(*field);
        }
    }
}

/// An object as it is created again in `namespace`, marked with the recovery point that it came from.
pub(crate) fn restored_form(
    resource: &ResourceName,
    mut object: Value,
    namespace: &str,
    recovery_point: &str,
) -> Value {
    // Owners have other UIDs now, or do not exist: the garbage collector would delete the object at once.
    remove(&mut object, "/metadata", &["ownerReferences", "finalizers", "generateName"]);
    for pointer in ["/metadata/labels", "/metadata/annotations"] {
        retain(&mut object, pointer, |key| !is_gitops_mark(key));
    }
    match (resource.plural.as_str(), resource.group.as_str()) {
        ("persistentvolumeclaims", "") => {
            retain(&mut object, "/metadata/annotations", |key| !is_binding_mark(key));
            remove(&mut object, "/spec", &["volumeName", "dataSource", "dataSourceRef"]);
        }
        ("services", "") => restore_service(&mut object),
        ("pods", "") => restore_pod(&mut object),
        ("jobs", "batch") => {
            let generated = |key: &str| {
                !key.ends_with("controller-uid") && key != "job-name" && key != "batch.kubernetes.io/job-name"
            };
            for pointer in ["/metadata/labels", "/spec/template/metadata/labels"] {
                retain(&mut object, pointer, generated);
            }
            if object.pointer("/spec/manualSelector") != Some(&Value::Bool(true)) {
                remove(&mut object, "/spec", &["selector"]);
            }
        }
        _ => {}
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("namespace".into(), namespace.into());
    }
    mark(&mut object, recovery_point);
    object
}

/// A cluster-scoped object as it is created again. It must not change what others get: no class becomes everybody's default.
pub(crate) fn restored_cluster_form(mut object: Value, recovery_point: &str) -> Value {
    remove(&mut object, "/metadata", &["ownerReferences", "finalizers", "generateName"]);
    for pointer in ["/metadata/labels", "/metadata/annotations"] {
        retain(&mut object, pointer, |key| !is_gitops_mark(key) && !key.ends_with("/is-default-class"));
    }
    remove(&mut object, "", &["globalDefault"]);
    mark(&mut object, recovery_point);
    object
}

/// Notes on an object which recovery point it came from.
fn mark(object: &mut Value, recovery_point: &str) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let annotations = metadata.entry("annotations").or_insert_with(|| Value::Object(Map::new()));
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.insert(lifeboat_crds::labels::RESTORED_FROM.into(), recovery_point.into());
        }
    }
}

/// Addresses and ports may be taken by others meanwhile; a headless Service stays headless.
fn restore_service(object: &mut Value) {
    if text(object, "/spec/clusterIP") != "None" {
        remove(object, "/spec", &["clusterIP", "clusterIPs"]);
    }
    remove(object, "/spec", &["healthCheckNodePort"]);
    if let Some(ports) = object.pointer_mut("/spec/ports").and_then(Value::as_array_mut) {
        for port in ports.iter_mut().filter_map(Value::as_object_mut) {
            port.remove("nodePort");
        }
    }
}

/// A bare pod is scheduled anew and gets a token of its own.
fn restore_pod(object: &mut Value) {
    remove(object, "/spec", &["nodeName", "serviceAccount"]);
    let is_token = |volume: &Value| text(volume, "/name").starts_with("kube-api-access-");
    if let Some(volumes) = object.pointer_mut("/spec/volumes").and_then(Value::as_array_mut) {
        volumes.retain(|volume| !is_token(volume));
    }
    for list in ["/spec/containers", "/spec/initContainers"] {
        for container in object.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(mounts) = container.get_mut("volumeMounts").and_then(Value::as_array_mut) {
                mounts.retain(|mount| !is_token(mount));
            }
        }
    }
}

/// When a resource is created: what others refer to comes first, what runs comes last.
pub(crate) fn wave(resource: &ResourceName) -> u8 {
    match (resource.plural.as_str(), resource.group.as_str()) {
        ("serviceaccounts" | "secrets" | "configmaps" | "resourcequotas" | "limitranges", "") => 0,
        ("roles" | "rolebindings", "rbac.authorization.k8s.io") | ("networkpolicies", "networking.k8s.io") => 1,
        ("persistentvolumeclaims" | "services", "") => 2,
        ("replicasets" | "deployments" | "statefulsets" | "daemonsets", "apps")
        | ("pods" | "replicationcontrollers", "")
        | ("jobs" | "cronjobs", "batch") => 4,
        _ => 3,
    }
}

/// The first wave of what answers the API server, which must not be asked before the application runs.
pub(crate) const ANSWERING_WAVE: u8 = 5;

/// When a cluster-scoped resource is created; `None`: never, because the cluster makes it or the restore does.
pub(crate) fn cluster_wave(resource: &ResourceName) -> Option<u8> {
    match (resource.plural.as_str(), resource.group.as_str()) {
        ("persistentvolumes" | "namespaces", "") => None,
        ("customresourcedefinitions", "apiextensions.k8s.io")
        | ("clusterroles", "rbac.authorization.k8s.io")
        | ("storageclasses", "storage.k8s.io") => Some(0),
        ("apiservices", "apiregistration.k8s.io")
        | ("validatingwebhookconfigurations" | "mutatingwebhookconfigurations", "admissionregistration.k8s.io") => {
            Some(ANSWERING_WAVE)
        }
        _ => Some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn resource(plural: &str, group: &str) -> ResourceName {
        ResourceName { plural: plural.into(), group: group.into() }
    }

    #[test]
    fn what_others_make_anew_is_left_out() {
        let secrets = resource("secrets", "");
        for (resource, object, captured) in [
            (resource("configmaps", ""), json!({"metadata": {"name": "settings"}}), true),
            (resource("configmaps", ""), json!({"metadata": {"name": "kube-root-ca.crt"}}), false),
            (resource("serviceaccounts", ""), json!({"metadata": {"name": "default"}}), false),
            (secrets.clone(), json!({"metadata": {"name": "t"}, "type": "kubernetes.io/service-account-token"}), false),
            (secrets, json!({"metadata": {"name": "t"}, "type": "Opaque"}), true),
            (
                resource("pods", ""),
                json!({"metadata": {"name": "p", "ownerReferences": [{"controller": true}]}}),
                false,
            ),
            (
                resource("pods", ""),
                json!({"metadata": {"name": "p", "ownerReferences": [{"controller": false}]}}),
                true,
            ),
            (resource("pods", ""), json!({"metadata": {"name": "p"}, "status": {"phase": "Succeeded"}}), false),
            (
                resource("jobs", "batch"),
                json!({"metadata": {"name": "j"}, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}),
                false,
            ),
            (resource("jobs", "batch"), json!({"metadata": {"name": "j"}, "status": {"active": 1}}), true),
            (resource("configmaps", ""), json!({"metadata": {"name": "x", "labels": {MANAGED_BY: "lifeboat"}}}), false),
        ] {
            assert_eq!(is_captured(&resource, &object), captured, "{resource:?} {object}");
        }
        assert!(!is_captured_resource(&resource("events", "events.k8s.io")));
        assert!(!is_captured_resource(&resource("backups", "lifeboat.dev")));
        assert!(is_captured_resource(&resource("backuppolicies", "lifeboat.dev")));
        assert!(is_captured_resource(&resource("backups", "postgresql.example.com")));
    }

    #[test]
    fn the_servers_fields_are_not_kept() {
        let kept = captured_form(json!({
            "metadata": {"name": "a", "uid": "1", "resourceVersion": "2", "managedFields": [], "labels": {"x": "y"}},
            "spec": {"a": 1}, "status": {"b": 2}
        }));
        assert_eq!(kept, json!({"metadata": {"name": "a", "labels": {"x": "y"}}, "spec": {"a": 1}}));
        assert_eq!(captured_form(json!("strange")), json!("strange"));
    }

    #[test]
    fn claims_come_back_unbound() {
        let claim = json!({
            "metadata": {"name": "data", "namespace": "old", "annotations": {"pv.kubernetes.io/bind-completed": "yes", "mine": "1"}},
            "spec": {"volumeName": "pv-1", "storageClassName": "fast", "resources": {"requests": {"storage": "1Gi"}}}
        });
        let back = restored_form(&resource("persistentvolumeclaims", ""), claim, "new", "rp");
        assert_eq!(back.pointer("/spec/volumeName"), None);
        assert_eq!(text(&back, "/metadata/namespace"), "new");
        assert_eq!(back["metadata"]["annotations"], json!({"mine": "1", "lifeboat.dev/restored-from": "rp"}));
    }

    #[test]
    fn services_keep_what_is_theirs() {
        let service = |ip: &str| json!({"metadata": {"name": "s"}, "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "nodePort": 30000}]}});
        let back = restored_form(&resource("services", ""), service("10.0.0.1"), "n", "rp");
        assert_eq!(back["spec"], json!({"ports": [{"port": 80}]}));
        let headless = restored_form(&resource("services", ""), service("None"), "n", "rp");
        assert_eq!(text(&headless, "/spec/clusterIP"), "None");
    }

    #[test]
    fn pods_are_scheduled_anew() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {
            "nodeName": "n1",
            "volumes": [{"name": "kube-api-access-x"}, {"name": "data"}],
            "containers": [{"name": "c", "volumeMounts": [{"name": "kube-api-access-x"}, {"name": "data"}]}]
        }});
        let back = restored_form(&resource("pods", ""), pod, "n", "rp");
        assert_eq!(
            back["spec"],
            json!({"volumes": [{"name": "data"}], "containers": [{"name": "c", "volumeMounts": [{"name": "data"}]}]})
        );
    }

    #[test]
    fn what_comes_back_outside_of_the_namespace_changes_nothing_for_others() {
        let class = json!({"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true", "mine": "1"}}, "provisioner": "p"});
        let back = restored_cluster_form(class, "rp");
        assert_eq!(back["metadata"]["annotations"], json!({"mine": "1", "lifeboat.dev/restored-from": "rp"}));
        assert_eq!((text(&back, "/provisioner"), back.pointer("/metadata/namespace")), ("p", None));
        let priority =
            restored_cluster_form(json!({"metadata": {"name": "high"}, "value": 5, "globalDefault": true}), "rp");
        assert_eq!((priority.get("globalDefault"), priority.get("value")), (None, Some(&json!(5))));
        assert_eq!(restored_cluster_form(json!("strange"), "rp"), json!("strange"));
    }

    #[test]
    fn definitions_come_first_and_webhooks_last() {
        let wave_of = |plural, group| cluster_wave(&resource(plural, group));
        let definitions = wave_of("customresourcedefinitions", "apiextensions.k8s.io");
        assert!(definitions < wave_of("clusterissuers", "cert-manager.io"));
        let (role, binding) = ("clusterroles", "clusterrolebindings");
        assert!(wave_of(role, "rbac.authorization.k8s.io") < wave_of(binding, "rbac.authorization.k8s.io"));
        let hooks = wave_of("validatingwebhookconfigurations", "admissionregistration.k8s.io");
        assert_eq!(hooks, Some(ANSWERING_WAVE));
        assert!(ANSWERING_WAVE > wave(&resource("deployments", "apps")));
        assert_eq!((wave_of("persistentvolumes", ""), wave_of("namespaces", "")), (None, None));
    }

    #[test]
    fn gitops_marks_stay_behind() {
        let object = json!({"metadata": {"name": "a", "labels": {"argocd.argoproj.io/instance": "x", "app": "y"}}});
        let back = restored_form(&resource("configmaps", ""), object, "n", "rp");
        assert_eq!(back["metadata"]["labels"], json!({"app": "y"}));
    }

    #[test]
    fn users_may_write_short_or_long_names() {
        let deployments = resource("deployments", "apps");
        assert!(deployments.is_meant_by("deployments.apps") && deployments.is_meant_by("deployments"));
        assert!(!deployments.is_meant_by("deployments.example.com"));
        assert_eq!(resource("pods", "").folder(), "pods.core");
    }
}
