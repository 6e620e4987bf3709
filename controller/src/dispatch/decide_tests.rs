//! Who has its turn: tables, and what holds for every queue.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use lifeboat_crds::conditions::Reason;
use proptest::prelude::*;

use super::decide::{Kind, Limits, Need, Place, Running, Share, Verdict, Work, decide};

const NODES: [&str; 3] = ["n1", "n2", "n3"];

fn nodes() -> BTreeSet<String> {
    NODES.iter().map(|node| (*node).to_owned()).collect()
}

fn limits(node: u32, rests: u32, all: u32, namespace: u32) -> Limits {
    Limits { node, rests, repositories: BTreeMap::from([("r".to_owned(), Share { all, namespace })]) }
}

fn work(key: &str, kind: Kind, namespace: &str, due: i64, need: Need) -> Work {
    Work {
        key: key.into(),
        kind,
        repository: "r".into(),
        namespace: namespace.into(),
        due: Timestamp::from_second(due).unwrap(),
        need,
    }
}

fn anywhere(key: &str, namespace: &str, due: i64) -> Work {
    work(key, Kind::Backup, namespace, due, Need::Volume(Place::Anywhere))
}

fn on(key: &str, kind: Kind, node: &str, due: i64) -> Work {
    work(key, kind, "a", due, Need::Volume(Place::On(node.into())))
}

fn rest(key: &str, due: i64, live: &[&str]) -> Work {
    work(key, Kind::Backup, "a", due, Need::Rest(live.iter().map(|node| (*node).to_owned()).collect()))
}

fn running(kind: Kind, namespace: &str, nodes: &[&str]) -> Running {
    let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
    Running { key: "running".into(), kind, repository: "r".into(), namespace: namespace.into(), nodes, rests: false }
}

/// The keys that begin, in the order of keys, and the reasons of the others.
fn decided(waiting: &[Work], going: &[Running], limits: &Limits) -> (Vec<String>, BTreeMap<String, Reason>) {
    let (mut started, mut waits) = (Vec::new(), BTreeMap::new());
    for (key, verdict) in decide(waiting, going, &nodes(), limits) {
        match verdict {
            Verdict::Start(_) => started.push(key.to_owned()),
            Verdict::Wait { reason, .. } => {
                waits.insert(key.to_owned(), reason);
            }
        }
    }
    (started, waits)
}

#[test]
fn work_that_can_go_anywhere_is_spread_over_the_nodes() {
    let waiting: Vec<_> = (0..6).map(|number| anywhere(&format!("w{number}"), "a", number)).collect();
    let mut taken: BTreeMap<String, u32> = BTreeMap::new();
    for verdict in decide(&waiting, &[], &nodes(), &limits(2, 9, 99, 99)).into_values() {
        let Verdict::Start(Some(node)) = verdict else { panic!("{verdict:?}") };
        *taken.entry(node).or_default() += 1;
    }
    assert_eq!(taken.into_values().collect::<Vec<_>>(), [2, 2, 2]);
    let busy = [running(Kind::Backup, "a", &["n1"]), running(Kind::Backup, "a", &["n3"])];
    let alone = [anywhere("w", "a", 1)];
    let verdicts = decide(&alone, &busy, &BTreeSet::from_iter(nodes()), &limits(2, 9, 99, 99)).remove("w");
    assert_eq!(verdicts, Some(Verdict::Start(Some("n2".into()))));
}

#[test]
fn what_is_bound_to_a_node_or_to_some_stays_there() {
    let full = [running(Kind::Backup, "a", &["n1", "n1"])];
    let some = |nodes: &[&str]| Need::Volume(Place::Among(nodes.iter().map(|node| (*node).to_owned()).collect()));
    let waiting = [
        on("bound", Kind::Backup, "n1", 1),
        work("zone", Kind::Backup, "a", 2, some(&["n1", "n2"])),
        work("full", Kind::Backup, "a", 3, some(&["n1"])),
        work("nowhere", Kind::Backup, "a", 4, some(&["gone"])),
    ];
    let (started, waits) = decided(&waiting, &full, &limits(2, 9, 99, 99));
    assert_eq!(started, ["zone"]);
    assert_eq!(waits["bound"], Reason::NodeBusy);
    assert_eq!(waits["full"], Reason::NodeBusy);
    assert_eq!(waits["nowhere"], Reason::NoAgent);
}

#[test]
fn a_tenant_with_a_thousand_volumes_does_not_hold_up_another() {
    let mut waiting: Vec<_> = (0..1000).map(|number| anywhere(&format!("big{number:04}"), "big", number)).collect();
    waiting.push(anywhere("small", "small", 5000));
    let (started, _) = decided(&waiting, &[], &limits(1, 9, 99, 99));
    assert_eq!(started, ["big0000", "big0001", "small"]);
    let going = [running(Kind::Backup, "big", &["n1"]), running(Kind::Backup, "big", &["n2"])];
    assert_eq!(decided(&waiting, &going, &limits(1, 9, 99, 99)).0, ["small"]);
}

#[test]
fn those_that_wait_are_told_how_many_are_before_them_in_fair_order() {
    let full =
        [running(Kind::Backup, "x", &["n1"]), running(Kind::Backup, "x", &["n2"]), running(Kind::Backup, "x", &["n3"])];
    let mut waiting: Vec<_> = (0..100).map(|number| anywhere(&format!("big{number:02}"), "big", number)).collect();
    waiting.push(anywhere("small", "small", 5000));
    let verdicts =
        decide(&waiting, &full, &NODES.iter().map(|node| (*node).to_owned()).collect(), &limits(1, 9, 99, 99))
            .into_iter()
            .map(|(key, verdict)| (key.to_owned(), verdict))
            .collect::<BTreeMap<_, _>>();
    let ahead = |key: &str| match &verdicts[key] {
        Verdict::Wait { ahead, .. } => *ahead,
        Verdict::Start(_) => panic!("{key} begins"),
    };
    assert_eq!((ahead("big00"), ahead("small"), ahead("big99")), (0, 1, 100));
}

#[test]
fn restores_come_first_and_find_a_place_beside_long_backups() {
    let waiting = [on("backup", Kind::Backup, "n1", 1), on("restore", Kind::Restore, "n1", 2)];
    assert_eq!(decided(&waiting, &[], &limits(1, 9, 99, 99)).0, ["restore"]);
    let full = [running(Kind::Backup, "a", &["n1", "n1"])];
    let (started, waits) = decided(&waiting, &full, &limits(2, 9, 2, 2));
    assert_eq!(started, ["restore"], "limits that backups fill hold up no restore");
    assert_eq!(waits["backup"], Reason::RepositoryBusy);
    let both = [running(Kind::Backup, "a", &["n1", "n1"]), running(Kind::Restore, "a", &["n1"])];
    assert_eq!(decided(&waiting, &both, &limits(2, 9, 99, 99)).1["restore"], Reason::NodeBusy);
    let restores = [running(Kind::Restore, "a", &["n2", "n3"])];
    assert_eq!(decided(&waiting, &restores, &limits(2, 9, 2, 2)).1["restore"], Reason::RepositoryBusy);
}

#[test]
fn repositories_and_namespaces_have_limits() {
    let going = [running(Kind::Backup, "a", &["n1"])];
    let (started, waits) = decided(&[anywhere("a", "a", 1), anywhere("b", "b", 2)], &going, &limits(9, 9, 9, 1));
    assert_eq!((started, waits["a"]), (vec!["b".to_owned()], Reason::NamespaceBusy));
    let (started, waits) = decided(&[anywhere("a", "a", 1), anywhere("b", "b", 2)], &going, &limits(9, 9, 2, 9));
    assert_eq!((started, waits["a"]), (vec!["b".to_owned()], Reason::RepositoryBusy));
}

#[test]
fn so_many_applications_rest_at_once_and_bring_their_volumes_along() {
    let waiting = [rest("first", 1, &["n1", "n1"]), rest("second", 2, &[]), rest("third", 3, &[])];
    let (started, waits) = decided(&waiting, &[], &limits(2, 2, 99, 99));
    assert_eq!((started, waits["third"]), (vec!["first".to_owned(), "second".to_owned()], Reason::QuiesceBusy));
    let many = [rest("many", 1, &["n1", "n1", "n1"])];
    assert_eq!(decided(&many, &[], &limits(2, 2, 2, 2)).0, ["many"], "an empty node takes any number");
}

#[test]
fn an_application_that_needs_several_places_is_not_overtaken_for_ever() {
    let half = [running(Kind::Backup, "b", &["n1"])];
    let waiting = [rest("pair", 1, &["n1", "n1"]), on("single", Kind::Backup, "n1", 2)];
    let (started, waits) = decided(&waiting, &half, &limits(2, 9, 99, 99));
    assert_eq!((started.len(), waits["pair"], waits["single"]), (0, Reason::NodeBusy, Reason::NodeBusy));
    assert_eq!(decided(&waiting, &[], &limits(2, 9, 99, 99)).0, ["pair"]);
}

fn needs() -> impl Strategy<Value = Need> {
    let node = (0..3_usize).prop_map(|at| NODES[at].to_owned());
    prop_oneof![
        Just(Need::Volume(Place::Anywhere)),
        node.clone().prop_map(|node| Need::Volume(Place::On(node))),
        proptest::collection::btree_set(node.clone(), 0..3).prop_map(|some| Need::Volume(Place::Among(some))),
        proptest::collection::vec(node, 0..3).prop_map(Need::Rest),
    ]
}

fn queue() -> impl Strategy<Value = Vec<Work>> {
    let one = (any::<bool>(), 0..4_u8, 0..20_i64, needs());
    proptest::collection::vec(one, 0..30).prop_map(|all| {
        all.into_iter()
            .enumerate()
            .map(|(number, (is_restore, namespace, due, need))| {
                let kind = if is_restore && matches!(need, Need::Volume(_)) { Kind::Restore } else { Kind::Backup };
                work(&format!("{number:02}"), kind, &format!("ns{namespace}"), due, need)
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn whatever_waits_limits_hold_and_nobody_waits_for_nothing(
        waiting in queue(), node in 1..4_u32, rests in 1..4_u32, all in 1..12_u32, namespace in 1..6_u32,
    ) {
        let limits = limits(node, rests, all, namespace);
        let known = nodes();
        let verdicts = decide(&waiting, &[], &known, &limits);
        prop_assert_eq!(verdicts.len(), waiting.len());
        let mut on_node: BTreeMap<String, u32> = BTreeMap::new();
        let mut largest: BTreeMap<String, u32> = BTreeMap::new();
        let (mut resting, mut begun) = (0, 0);
        for one in &waiting {
            let Verdict::Start(place) = &verdicts[one.key.as_str()] else { continue };
            begun += 1;
            let taken: Vec<String> = match &one.need {
                Need::Rest(live) => { resting += 1; live.clone() }
                Need::Volume(place_wanted) => {
                    let place = place.clone().expect("a volume is given a node");
                    let fits = match place_wanted {
                        Place::On(node) => *node == place,
                        Place::Among(some) => some.contains(&place),
                        Place::Anywhere => known.contains(&place),
                    };
                    prop_assert!(fits, "{:?} on {}", one, place);
                    vec![place]
                }
            };
            for name in &known {
                let more = u32::try_from(taken.iter().filter(|one| *one == name).count()).unwrap();
                *on_node.entry(name.clone()).or_default() += more;
                let most = largest.entry(name.clone()).or_default();
                *most = (*most).max(more);
            }
        }
        prop_assert!(resting <= rests);
        for (name, taken) in &on_node {
            prop_assert!(*taken <= (node + 1).max(largest[name]), "{} has {}", name, taken);
        }
        let possible = waiting.iter().any(|one| !matches!(&one.need, Need::Volume(Place::Among(some)) if some.is_empty()));
        prop_assert!(begun > 0 || !possible, "everybody waits and nothing goes on");
        let ahead: BTreeSet<usize> = verdicts.values().filter_map(|verdict| match verdict {
            Verdict::Wait { ahead, .. } => Some(*ahead),
            Verdict::Start(_) => None,
        }).collect();
        prop_assert_eq!(ahead.len(), waiting.len() - begun, "each has its own place in the queue");
    }

    #[test]
    fn between_namespaces_that_want_the_same_turns_differ_by_one(counts in proptest::collection::vec(1..20_usize, 2..5), slots in 1..12_u32) {
        let mut waiting = Vec::new();
        for (namespace, count) in counts.iter().enumerate() {
            for number in 0..*count {
                waiting.push(anywhere(&format!("{namespace}-{number:02}"), &format!("ns{namespace}"), i64::try_from(number).unwrap()));
            }
        }
        let known = nodes();
        let verdicts = decide(&waiting, &[], &known, &limits(99, 9, slots, 99)).into_iter().map(|(key, verdict)| (key.to_owned(), verdict)).collect::<Vec<_>>();
        let begun = |namespace: usize| {
            let prefix = format!("{namespace}-");
            verdicts.iter().filter(|(key, verdict)| key.starts_with(&prefix) && matches!(verdict, Verdict::Start(_))).count()
        };
        let most = (0..counts.len()).map(begun).max().unwrap();
        for (namespace, count) in counts.iter().enumerate() {
            prop_assert!(begun(namespace) + 1 >= most || begun(namespace) == *count, "namespace {} has {} of {}, another has {}", namespace, begun(namespace), count, most);
        }
    }
}
