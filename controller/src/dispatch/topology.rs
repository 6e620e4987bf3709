//! Which nodes can mount a volume: what a persistent volume says about nodes, and what nodes refuse.

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PersistentVolume, Taint, Toleration,
};
use kube::ResourceExt;

/// Whether a volume's topology allows a node. A volume without one is reached from everywhere.
pub(crate) fn is_reachable(volume: &PersistentVolume, node: &Node) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let Some(required) = affinity.and_then(|affinity| affinity.required.as_ref()) else { return true };
    required.node_selector_terms.iter().any(|term| matches(term, node))
}

/// Whether a volume says anything about nodes.
pub(crate) fn is_bound_to_nodes(volume: &PersistentVolume) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    affinity.is_some_and(|affinity| affinity.required.is_some())
}

fn matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let name = node.name_any();
    let by_label =
        |wanted: &NodeSelectorRequirement| fulfils(wanted, node.labels().get(&wanted.key).map(String::as_str));
    let by_field =
        |wanted: &NodeSelectorRequirement| wanted.key == "metadata.name" && fulfils(wanted, Some(name.as_str()));
    let is_empty = term.match_expressions.is_none() && term.match_fields.is_none();
    !is_empty
        && term.match_expressions.iter().flatten().all(by_label)
        && term.match_fields.iter().flatten().all(by_field)
}

/// An operator that is not known is fulfilled by nothing.
fn fulfils(wanted: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let among = |value: &str| wanted.values.iter().flatten().any(|one| one == value);
    let number = |text: &str| text.parse::<i64>().ok();
    let bound = || wanted.values.iter().flatten().next().and_then(|one| number(one));
    match wanted.operator.as_str() {
        "In" => value.is_some_and(among),
        "NotIn" => !value.is_some_and(among),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => value.and_then(number).zip(bound()).is_some_and(|(value, bound)| value > bound),
        "Lt" => value.and_then(number).zip(bound()).is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

/// Whether a pod with these tolerations can be sent to a node.
pub(crate) fn is_open(node: &Node, tolerations: &[Toleration]) -> bool {
    let Some(spec) = &node.spec else { return true };
    let is_hard = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
    let mut taints = spec.taints.iter().flatten().filter(is_hard);
    // A cordoned node carries a taint as well; the field is there before the taint is.
    spec.unschedulable != Some(true) && taints.all(|taint| tolerations.iter().any(|one| tolerates(one, taint)))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let same = |wanted: &Option<String>, found: &str| {
        wanted.as_deref().is_none_or(|wanted| wanted.is_empty() || wanted == found)
    };
    if !same(&toleration.effect, &taint.effect) || !same(&toleration.key, &taint.key) {
        return false;
    }
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => {
            toleration.key.is_some()
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(spec: &Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {"zone": "a", "disks": "4"}}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn the_topology_of_a_volume_decides_where_it_can_be_read() {
        let reachable = |terms: Value| {
            let affinity = json!({"required": {"nodeSelectorTerms": terms}});
            let volume = serde_json::from_value(json!({"spec": {"nodeAffinity": affinity}})).unwrap();
            is_reachable(&volume, &node(&json!({})))
        };
        let label = |key: &str, operator: &str, values: Value| json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]);
        assert!(reachable(label("zone", "In", json!(["a", "b"]))));
        assert!(!reachable(label("zone", "In", json!(["b"]))));
        assert!(reachable(label("zone", "NotIn", json!(["b"]))) && !reachable(label("zone", "NotIn", json!(["a"]))));
        assert!(reachable(label("zone", "Exists", json!([]))) && !reachable(label("zone", "DoesNotExist", json!([]))));
        assert!(reachable(label("disks", "Gt", json!(["3"]))) && !reachable(label("disks", "Lt", json!(["4"]))));
        assert!(!reachable(label("zone", "Unheard", json!(["a"]))) && !reachable(json!([{}])));
        assert!(reachable(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}])));
        assert!(!reachable(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]}])));
        assert!(is_reachable(&PersistentVolume::default(), &node(&json!({}))));
    }

    #[test]
    fn a_node_that_refuses_our_pods_is_not_chosen() {
        let open = |spec: Value, tolerations: Value| {
            is_open(&node(&spec), &serde_json::from_value::<Vec<Toleration>>(tolerations).unwrap())
        };
        let taint = json!({"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]});
        assert!(open(json!({}), json!([])));
        assert!(!open(json!({"unschedulable": true}), json!([{"operator": "Exists"}])));
        assert!(!open(taint.clone(), json!([])));
        for tolerated in [
            json!([{"operator": "Exists"}]),
            json!([{"key": "gpu", "operator": "Exists"}]),
            json!([{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]),
        ] {
            assert!(open(taint.clone(), tolerated.clone()), "{tolerated}");
        }
        for other in [
            json!([{"key": "gpu", "value": "no"}]),
            json!([{"key": "gpu", "operator": "Exists", "effect": "NoExecute"}]),
        ] {
            assert!(!open(taint.clone(), other.clone()), "{other}");
        }
        assert!(open(json!({"taints": [{"key": "gpu", "effect": "PreferNoSchedule"}]}), json!([])));
    }
}
