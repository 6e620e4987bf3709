//! Which cluster-scoped objects an application needs, by what its own objects say. Pure; nothing here speaks to a server.
//!
//! Only what an object of the application names, or what names the application, is related to it: a tenant's backup must not
//! gather what belongs to others.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::object::ResourceName;

const RBAC: &str = "rbac.authorization.k8s.io";

/// What the captured objects of one namespace name outside of it.
#[derive(Debug)]
pub(crate) struct Related {
    namespace: String,
    named: BTreeSet<(ResourceName, String)>,
    accounts: BTreeSet<String>,
}

fn resource(plural: &str, group: &str) -> ResourceName {
    ResourceName { plural: plural.to_owned(), group: group.to_owned() }
}

fn text<'a>(object: &'a Value, pointer: &str) -> Option<&'a str> {
    object.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty())
}

fn items<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

impl Related {
    /// Nothing but the namespace itself and its default service account.
    pub(crate) fn of(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            named: BTreeSet::from([(resource("namespaces", ""), namespace.to_owned())]),
            accounts: BTreeSet::from(["default".to_owned()]),
        }
    }

    fn name(&mut self, plural: &str, group: &str, name: Option<&str>) {
        if let Some(name) = name {
            self.named.insert((resource(plural, group), name.to_owned()));
        }
    }

    /// Notes what a captured object names.
    pub(crate) fn note(&mut self, of: &ResourceName, object: &Value) {
        // Only groups with a dot can be those of custom resources; others have no definition by that name.
        if of.group.contains('.') && of.group != lifeboat_crds::GROUP {
            self.name("customresourcedefinitions", "apiextensions.k8s.io", Some(&of.qualified()));
        }
        match (of.plural.as_str(), of.group.as_str()) {
            ("persistentvolumeclaims", "") => {
                self.name("persistentvolumes", "", text(object, "/spec/volumeName"));
                self.note_claim(object);
            }
            ("statefulsets", "apps") => {
                items(object, "/spec/volumeClaimTemplates").for_each(|claim| self.note_claim(claim));
            }
            ("serviceaccounts", "") => self.accounts.extend(text(object, "/metadata/name").map(str::to_owned)),
            ("rolebindings", RBAC) => self.note_role(object),
            ("ingresses", "networking.k8s.io") => {
                self.name("ingressclasses", "networking.k8s.io", text(object, "/spec/ingressClassName"));
            }
            _ => {}
        }
        for pointer in ["/spec", "/spec/template/spec", "/spec/jobTemplate/spec/template/spec"] {
            if let Some(pod) = object.pointer(pointer).filter(|spec| spec.get("containers").is_some()) {
                self.note_pod(pod);
            }
        }
    }

    fn note_claim(&mut self, claim: &Value) {
        self.name("storageclasses", "storage.k8s.io", text(claim, "/spec/storageClassName"));
    }

    fn note_pod(&mut self, pod: &Value) {
        self.name("priorityclasses", "scheduling.k8s.io", text(pod, "/priorityClassName"));
        self.name("runtimeclasses", "node.k8s.io", text(pod, "/runtimeClassName"));
        self.accounts.extend(text(pod, "/serviceAccountName").map(str::to_owned));
        for volume in items(pod, "/volumes") {
            if let Some(claim) = volume.pointer("/ephemeral/volumeClaimTemplate") {
                self.note_claim(claim);
            }
        }
    }

    /// Notes the role of a binding, if it is a cluster role.
    pub(crate) fn note_role(&mut self, binding: &Value) {
        if text(binding, "/roleRef/kind") == Some("ClusterRole") {
            self.name("clusterroles", RBAC, text(binding, "/roleRef/name"));
        }
    }

    /// What was named, sorted.
    pub(crate) fn named(&self) -> impl Iterator<Item = &(ResourceName, String)> {
        self.named.iter()
    }

    /// Whether an object that was named may be captured. A claim can name any volume, also that of somebody else.
    pub(crate) fn may_be_captured(&self, of: &ResourceName, object: &Value) -> bool {
        let is_volume = of.plural == "persistentvolumes" && of.group.is_empty();
        !is_volume || text(object, "/spec/claimRef/namespace") == Some(self.namespace.as_str())
    }

    /// The part of a cluster role binding that gives rights to this application; other subjects are nobody's business here.
    pub(crate) fn own_part(&self, mut binding: Value) -> Option<Value> {
        let group = format!("system:serviceaccounts:{}", self.namespace);
        let is_ours = |subject: &Value| match text(subject, "/kind") {
            Some("ServiceAccount") => {
                text(subject, "/namespace") == Some(&self.namespace)
                    && text(subject, "/name").is_some_and(|name| self.accounts.contains(name))
            }
            Some("Group") => text(subject, "/name") == Some(&group),
            _ => false,
        };
        let subjects = binding.pointer_mut("/subjects")?.as_array_mut()?;
        subjects.retain(is_ours);
        (!subjects.is_empty()).then_some(binding)
    }

    /// Whether a webhook configuration or an API service is answered by a Service of this namespace.
    pub(crate) fn answers(&self, extension: &Value) -> bool {
        let here = |service: Option<&Value>| {
            service.is_some_and(|service| text(service, "/namespace") == Some(self.namespace.as_str()))
        };
        here(extension.pointer("/spec/service"))
            || items(extension, "/webhooks").any(|webhook| here(webhook.pointer("/clientConfig/service")))
    }
}

/// Whether the cluster itself makes the object, so that every cluster has it.
pub(crate) fn is_built_in(of: &ResourceName, object: &Value) -> bool {
    match (of.plural.as_str(), of.group.as_str()) {
        ("clusterroles" | "clusterrolebindings", RBAC) => {
            object.pointer("/metadata/labels/kubernetes.io~1bootstrapping").is_some()
        }
        ("priorityclasses", "scheduling.k8s.io") => {
            text(object, "/metadata/name").is_some_and(|name| name.starts_with("system-"))
        }
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;
    use serde_json::json;

    fn named(of: (&str, &str), object: Value) -> Vec<String> {
        let mut related = Related::of("shop");
        related.note(&resource(of.0, of.1), &object);
        related
            .named()
            .map(|(of, name)| format!("{} {name}", of.plural))
            .filter(|one| one != "namespaces shop")
            .collect()
    }

    #[test]
    fn what_objects_name_is_related() {
        let pod = json!({"containers": [], "priorityClassName": "high", "runtimeClassName": "vm",
            "volumes": [{"ephemeral": {"volumeClaimTemplate": {"spec": {"storageClassName": "scratch"}}}}]});
        let of_pod = ["priorityclasses high", "runtimeclasses vm", "storageclasses scratch"];
        for (of, object) in [
            (("pods", ""), json!({"spec": pod})),
            (("deployments", "apps"), json!({"spec": {"template": {"spec": pod}}})),
            (("cronjobs", "batch"), json!({"spec": {"jobTemplate": {"spec": {"template": {"spec": pod}}}}})),
        ] {
            assert_eq!(named(of, object), of_pod, "{of:?}");
        }
        let claim = json!({"spec": {"storageClassName": "fast", "volumeName": "pv-1"}});
        assert_eq!(
            named(("persistentvolumeclaims", ""), claim.clone()),
            ["persistentvolumes pv-1", "storageclasses fast"]
        );
        assert_eq!(
            named(("statefulsets", "apps"), json!({"spec": {"volumeClaimTemplates": [claim]}})),
            ["storageclasses fast"]
        );
        let binding = |kind: &str| json!({"roleRef": {"kind": kind, "name": "reader"}});
        let of_binding = "customresourcedefinitions rolebindings.rbac.authorization.k8s.io";
        assert_eq!(named(("rolebindings", RBAC), binding("ClusterRole")), ["clusterroles reader", of_binding]);
        assert_eq!(named(("rolebindings", RBAC), binding("Role")), [of_binding]);
        assert_eq!(named(("widgets", "example.com"), json!({})), ["customresourcedefinitions widgets.example.com"]);
        assert!(named(("backuppolicies", "lifeboat.dev"), json!({})).is_empty());
        assert!(named(("configmaps", ""), json!("strange")).is_empty());
    }

    #[test]
    fn volumes_of_others_are_left_alone() {
        let related = Related::of("shop");
        let volumes = resource("persistentvolumes", "");
        let volume = |namespace: &str| json!({"spec": {"claimRef": {"namespace": namespace}}});
        assert!(related.may_be_captured(&volumes, &volume("shop")));
        assert!(!related.may_be_captured(&volumes, &volume("bank")) && !related.may_be_captured(&volumes, &json!({})));
        assert!(related.may_be_captured(&resource("storageclasses", "storage.k8s.io"), &json!({})));
    }

    #[test]
    fn of_a_binding_only_the_applications_subjects_are_kept() {
        let mut related = Related::of("shop");
        related.note(&resource("serviceaccounts", ""), &json!({"metadata": {"name": "web"}}));
        related.note(&resource("pods", ""), &json!({"spec": {"containers": [], "serviceAccountName": "worker"}}));
        let account =
            |name: &str, namespace: &str| json!({"kind": "ServiceAccount", "name": name, "namespace": namespace});
        let group = |name: &str| json!({"kind": "Group", "name": name});
        let kept = |subjects: Value| {
            related.own_part(json!({"subjects": subjects})).map(|binding| binding["subjects"].as_array().unwrap().len())
        };
        assert_eq!(kept(json!([account("web", "shop"), account("web", "bank"), group("system:masters")])), Some(1));
        assert_eq!(
            kept(json!([account("worker", "shop"), account("default", "shop"), group("system:serviceaccounts:shop")])),
            Some(3)
        );
        assert_eq!(kept(json!([account("other", "shop"), group("system:serviceaccounts")])), None);
        assert_eq!(related.own_part(json!({})), None);
    }

    #[test]
    fn extensions_belong_to_the_namespace_that_answers_them() {
        let related = Related::of("shop");
        let hook = |namespace: &str| json!({"webhooks": [{"clientConfig": {"url": "https://x"}}, {"clientConfig": {"service": {"namespace": namespace}}}]});
        assert!(related.answers(&hook("shop")) && !related.answers(&hook("bank")));
        assert!(related.answers(&json!({"spec": {"service": {"namespace": "shop"}}})));
        assert!(!related.answers(&json!({"spec": {}})));
    }

    #[test]
    fn what_every_cluster_has_is_known() {
        let bootstrapped =
            json!({"metadata": {"name": "edit", "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}}});
        assert!(is_built_in(&resource("clusterroles", RBAC), &bootstrapped));
        assert!(!is_built_in(&resource("clusterroles", RBAC), &json!({"metadata": {"name": "mine"}})));
        assert!(is_built_in(
            &resource("priorityclasses", "scheduling.k8s.io"),
            &json!({"metadata": {"name": "system-node-critical"}})
        ));
    }
}
