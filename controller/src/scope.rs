//! Which objects a plan's scope selects. Pure; nothing here speaks to a server.

use std::collections::BTreeMap;

use lifeboat_crds::plan::{ClusterScope, Scope, selector_matches};

use crate::object::{ResourceName, is_captured_cluster_resource, is_captured_resource};

/// A word of `includeResources` or `excludeResources`: a resource, or one object of it.
struct Word<'a> {
    resource: &'a str,
    name: Option<&'a str>,
}

impl<'a> Word<'a> {
    fn of(text: &'a str) -> Self {
        match text.split_once('/') {
            Some((resource, name)) => Self { resource, name: Some(name) },
            None => Self { resource: text, name: None },
        }
    }
}

fn lists(words: &[String], resource: &ResourceName, name: &str) -> bool {
    words
        .iter()
        .map(|word| Word::of(word))
        .any(|word| resource.is_meant_by(word.resource) && word.name.is_none_or(|meant| meant == name))
}

/// Whether a list of words may select some object of the resource.
fn touches(words: &[String], resource: &ResourceName) -> bool {
    words.iter().any(|word| resource.is_meant_by(Word::of(word).resource))
}

/// Whether a list of words means all objects of the resource.
fn covers(words: &[String], resource: &ResourceName) -> bool {
    words.iter().map(|word| Word::of(word)).any(|word| word.name.is_none() && resource.is_meant_by(word.resource))
}

/// Whether objects of this namespaced resource have to be looked at.
pub(crate) fn may_select(scope: &Scope, resource: &ResourceName) -> bool {
    is_captured_resource(resource)
        && scope.include_resources.as_ref().is_none_or(|words| touches(words, resource))
        && !scope.exclude_resources.as_ref().is_some_and(|words| covers(words, resource))
}

/// Whether an object of the namespace is selected.
pub(crate) fn selects(scope: &Scope, resource: &ResourceName, name: &str, labels: &BTreeMap<String, String>) -> bool {
    scope.include_resources.as_ref().is_none_or(|words| lists(words, resource, name))
        && !scope.exclude_resources.as_ref().is_some_and(|words| lists(words, resource, name))
        && scope.selector.as_ref().is_none_or(|selector| selector_matches(selector, labels))
}

/// Whether objects of this cluster-scoped resource are asked for whether or not the application names them.
pub(crate) fn may_include(scope: &ClusterScope, resource: &ResourceName) -> bool {
    is_captured_cluster_resource(resource)
        && scope.include_resources.as_ref().is_some_and(|words| touches(words, resource))
}

/// Whether such an object is asked for.
pub(crate) fn includes(
    scope: &ClusterScope,
    resource: &ResourceName,
    name: &str,
    labels: &BTreeMap<String, String>,
) -> bool {
    scope.include_resources.as_ref().is_some_and(|words| lists(words, resource, name))
        && scope.selector.as_ref().is_none_or(|selector| selector_matches(selector, labels))
}

/// Whether a cluster-scoped object is left out whatever else asks for it.
pub(crate) fn excludes(scope: &ClusterScope, resource: &ResourceName, name: &str) -> bool {
    scope.exclude_resources.as_ref().is_some_and(|words| lists(words, resource, name))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn resource(plural: &str, group: &str) -> ResourceName {
        ResourceName { plural: plural.into(), group: group.into() }
    }

    fn labels(app: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("app".to_owned(), app.to_owned())])
    }

    fn selected(scope: Value, resource: &ResourceName, name: &str) -> bool {
        let scope: Scope = serde_json::from_value(scope).unwrap();
        let selected = selects(&scope, resource, name, &labels("web"));
        // What is never looked at cannot be selected.
        assert!(!selected || may_select(&scope, resource), "{scope:?} {resource:?}");
        selected
    }

    #[test]
    fn labels_kinds_and_names_select() {
        let (maps, deployments) = (resource("configmaps", ""), resource("deployments", "apps"));
        for (scope, resource, name, expected) in [
            (json!({}), &maps, "a", true),
            (json!({"includeResources": ["configmaps"]}), &maps, "a", true),
            (json!({"includeResources": ["configmaps"]}), &deployments, "a", false),
            (json!({"includeResources": ["secrets", "configmaps/a"]}), &maps, "a", true),
            (json!({"includeResources": ["secrets", "configmaps/a"]}), &maps, "b", false),
            (json!({"includeResources": ["deployments.apps/web"]}), &deployments, "web", true),
            (json!({"excludeResources": ["configmaps"]}), &maps, "a", false),
            (json!({"excludeResources": ["configmaps/a"]}), &maps, "a", false),
            (json!({"excludeResources": ["configmaps/a"]}), &maps, "b", true),
            (json!({"includeResources": ["configmaps"], "excludeResources": ["configmaps/b"]}), &maps, "b", false),
            (json!({"selector": {"matchLabels": {"app": "web"}}}), &maps, "a", true),
            (json!({"selector": {"matchLabels": {"app": "db"}}}), &maps, "a", false),
        ] {
            assert_eq!(selected(scope.clone(), resource, name), expected, "{scope} {resource:?} {name}");
        }
    }

    #[test]
    fn a_resource_of_which_nothing_can_be_selected_is_not_looked_at() {
        let looked_at = |scope: Value| may_select(&serde_json::from_value(scope).unwrap(), &resource("configmaps", ""));
        assert!(looked_at(json!({"excludeResources": ["configmaps/a"]})));
        assert!(!looked_at(json!({"excludeResources": ["configmaps"]})));
        assert!(!looked_at(json!({"includeResources": ["secrets/configmaps"]})));
    }

    #[test]
    fn cluster_scoped_objects_are_asked_for_by_resource_name_and_label() {
        let scope: ClusterScope = serde_json::from_value(json!({
            "includeResources": ["clusterissuers.cert-manager.io", "ingressclasses/web", "nodes"], "readAs": "reader",
            "selector": {"matchLabels": {"app": "web"}}, "excludeResources": ["clusterissuers/old"],
        }))
        .unwrap();
        assert!(scope.related, "what is related is captured unless the scope says otherwise");
        let issuers = resource("clusterissuers", "cert-manager.io");
        let classes = resource("ingressclasses", "networking.k8s.io");
        assert!(may_include(&scope, &issuers) && may_include(&scope, &classes));
        assert!(!may_include(&scope, &resource("nodes", "")), "nodes are no part of an application");
        assert!(!may_include(&scope, &resource("storageclasses", "storage.k8s.io")));
        assert!(
            includes(&scope, &classes, "web", &labels("web")) && !includes(&scope, &classes, "other", &labels("web"))
        );
        assert!(!includes(&scope, &issuers, "new", &labels("db")));
        assert!(excludes(&scope, &issuers, "old") && !excludes(&scope, &issuers, "new"));
    }
}
