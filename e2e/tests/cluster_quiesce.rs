//! Freezing and thawing on a real cluster: order, deadlines, and that nothing stays frozen whatever dies.
#![cfg(feature = "cluster")]
#![allow(clippy::print_stdout)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::ListParams;
use lifeboat_crds::backup::{Consistency, Through};
use lifeboat_crds::quiesce_lease::Watchdog;
use lifeboat_crds::{Backup, QuiesceLease};
use lifeboat_e2e::faults::{BEAT, CONTROLLER, NODES, chance, fresh_lifeboat, is_at_work, kill, longest_gap, number};
use lifeboat_e2e::scenario::{INSTALLED_IN, Scenario, StoreHeld, scenario, sleeper_manifest};
use serde_json::{Value, json};

fn plan_with(s: &Scenario, quiesce: &Value) -> Value {
    // The freeze spans the reading, so that there is time for what is tested.
    let mut plan = s.live_plan();
    plan["quiesce"] = quiesce.clone();
    json!({"plan": plan})
}

fn step(freeze: &str, thaw: &str) -> Value {
    json!({"selector": {"matchLabels": {"app": "app"}}, "exec": {"freeze": ["sh", "-c", freeze], "thaw": ["sh", "-c", thaw], "timeout": "10s"}})
}

/// The lines that hooks wrote beside the volume, in order.
fn log(s: &Scenario) -> Result<Vec<String>> {
    Ok(s.shell("app", "cat /tmp/log")?.lines().map(str::to_owned).collect())
}

#[test]
fn steps_freeze_in_order_and_thaw_in_reverse() {
    scenario("quiesce-order", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "echo data > /data/file")?;
        let steps: Vec<_> = ["one", "two"]
            .iter()
            .map(|n| step(&format!("echo freeze {n} >> /tmp/log"), &format!("echo thaw {n} >> /tmp/log")))
            .collect();
        s.start_backup("b", plan_with(&s, &json!({"maxFreeze": "60s", "steps": steps}))).await?;
        let backup = s.backup_succeeded("b").await?;
        ensure!(log(&s)? == ["freeze one", "freeze two", "thaw two", "thaw one"], "{:?}", log(&s)?);
        let status = backup.status.context("status")?;
        ensure!(status.consistency == Some(Consistency::Application), "{:?}", status.consistency);
        let quiesce = status.quiesce.context("quiesce")?;
        ensure!(quiesce.freeze_millis.context("freezeMillis")? > 0 && quiesce.thawed_at.is_some());
        ensure!(quiesce.workloads.iter().all(|w| !w.frozen && w.freeze_millis.is_some()), "{quiesce:?}");
        let guarded = |w: &lifeboat_crds::backup::QuiescedWorkload| {
            w.through == Some(Through::Guardian) && w.watchdog == Some(Watchdog::Container)
        };
        ensure!(quiesce.workloads.iter().all(guarded), "{quiesce:?}");
        Ok(())
    });
}

#[test]
fn a_failing_step_thaws_what_was_frozen_and_fails_the_backup() {
    scenario("quiesce-fails", async |s: Scenario| {
        s.sleeper("app")?;
        let steps = [
            step("echo freeze one >> /tmp/log", "echo thaw one >> /tmp/log"),
            step("echo broken hook >&2; exit 3", "echo thaw two >> /tmp/log"),
        ];
        s.start_backup("b", plan_with(&s, &json!({"steps": steps}))).await?;
        let (_, message) = s.backup_failed("b", "HookFailed").await?;
        ensure!(message.contains("app") && message.contains('3'), "{message}");
        let lines = log(&s)?;
        ensure!(
            lines.first().map(String::as_str) == Some("freeze one")
                && lines.last().map(String::as_str) == Some("thaw one"),
            "{lines:?}"
        );
        Ok(())
    });
}

#[test]
fn a_hanging_step_is_given_up_and_thawed() {
    scenario("quiesce-hangs", async |s: Scenario| {
        s.sleeper("app")?;
        let mut hanging = step("echo freeze >> /tmp/log; sleep 1000", "echo thaw >> /tmp/log");
        hanging["exec"]["timeout"] = json!("2s");
        s.start_backup("b", plan_with(&s, &json!({"steps": [hanging]}))).await?;
        s.backup_failed("b", "HookTimedOut").await?;
        ensure!(log(&s)? == ["freeze", "thaw"], "{:?}", log(&s)?);
        Ok(())
    });
}

#[test]
fn the_longest_freeze_is_kept_even_when_the_reading_takes_longer() {
    scenario("quiesce-deadline", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=800 2>/dev/null; sync")?;
        let quiesce = json!({"maxFreeze": "5s", "steps": [step("date +%s > /tmp/frozen", "date +%s > /tmp/thawed")]});
        s.start_backup("b", plan_with(&s, &quiesce)).await?;
        s.eventually("the freeze", async || Ok(s.shell("app", "cat /tmp/frozen 2>/dev/null; true")?.contains('1')))
            .await?;
        // However fast the volume is read, it does not end before the deadline.
        let held = StoreHeld::hold()?;
        s.backup_failed("b", "FreezeDeadline").await?;
        drop(held);
        let frozen: u64 = s.shell("app", "cat /tmp/frozen")?.trim().parse()?;
        let thawed: u64 = s.shell("app", "cat /tmp/thawed")?.trim().parse()?;
        ensure!(thawed - frozen <= 6, "frozen for {} s", thawed - frozen);
        s.eventually("the task to be gone", async || Ok(s.leftovers().await?.is_empty())).await
    });
}

#[test]
fn a_controller_killed_while_the_application_is_frozen_thaws_it_when_it_is_back() {
    scenario("quiesce-killed", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=400 2>/dev/null; sync")?;
        s.start_backup(
            "b",
            plan_with(
                &s,
                &json!({"maxFreeze": "60s", "steps": [step("echo freeze >> /tmp/log", "echo thaw >> /tmp/log")]}),
            ),
        )
        .await?;
        s.eventually("the freeze", async || Ok(s.shell("app", "cat /tmp/log 2>/dev/null; true")?.contains("freeze")))
            .await?;
        s.kubectl_cluster(&[
            "-n",
            INSTALLED_IN,
            "delete",
            "pod",
            "-l",
            "app.kubernetes.io/component=controller",
            "--grace-period=0",
            "--force",
        ])?;
        s.eventually("the thaw", async || Ok(log(&s)?.last().map(String::as_str) == Some("thaw"))).await?;
        let backup: Backup = s.backup_finished("b").await?;
        let status = backup.status.context("status")?;
        ensure!(status.quiesce.context("quiesce")?.workloads.iter().all(|w| !w.frozen));
        ensure!(log(&s)?.first().map(String::as_str) == Some("freeze"));
        Ok(())
    });
}

#[test]
fn deleting_a_running_backup_thaws_and_leaves_nothing() {
    scenario("quiesce-deleted", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=400 2>/dev/null; sync")?;
        s.start_backup(
            "b",
            plan_with(
                &s,
                &json!({"maxFreeze": "60s", "steps": [step("echo freeze >> /tmp/log", "echo thaw >> /tmp/log")]}),
            ),
        )
        .await?;
        s.eventually("the freeze", async || Ok(s.shell("app", "cat /tmp/log 2>/dev/null; true")?.contains("freeze")))
            .await?;
        s.delete(&s.namespaced::<Backup>(), "b").await?;
        ensure!(log(&s)?.last().map(String::as_str) == Some("thaw"), "{:?}", log(&s)?);
        s.eventually("the tasks to be gone", async || Ok(s.leftovers().await?.is_empty())).await
    });
}

// The second one's command line goes on with `--second`.
const FIRST: &str = "/lifeboat-agent guard --kubelet-dir";
const BOTH: &str = "/lifeboat-agent guard";

fn beating_app(s: &Scenario) -> Result<()> {
    s.sleeper("app")?;
    s.shell("app", BEAT).map(|_| ())
}

/// The application by its own means, then its file system: the plan, frozen for at most this long.
fn both_ways(s: &Scenario, max_freeze: &str, selector: &Value) -> Value {
    let mut own = step("touch /tmp/frozen", "rm -f /tmp/frozen");
    own["selector"] = selector.clone();
    let kernel = json!({"selector": selector, "fsfreeze": {}});
    plan_with(s, &json!({"maxFreeze": max_freeze, "steps": [own, kernel]}))
}

/// Waits until so many workloads of a backup are at rest.
async fn frozen(s: &Scenario, name: &str, workloads: usize) -> Result<()> {
    let api: kube::Api<QuiesceLease> = kube::Api::namespaced(s.client.clone(), INSTALLED_IN);
    s.eventually("the freeze", async || {
        let leases = api.list(&ListParams::default()).await?;
        let is_frozen = |lease: &&QuiesceLease| {
            lease.annotations().get("lifeboat.dev/owner").is_some_and(|owner| *owner == format!("Backup/{name}"))
                && lease
                    .status
                    .as_ref()
                    .is_some_and(|status| status.phase == Some(lifeboat_crds::quiesce_lease::LeasePhase::Frozen))
        };
        Ok(leases.iter().filter(is_frozen).count() == workloads)
    })
    .await
}

/// The longest freeze of the plan.
const ALLOWED: Duration = Duration::from_secs(6);
/// When both guardians of a node are dead, its frozen volumes wait until kubelet starts one of them again; that one has this
/// long to thaw them. Kubernetes tells whole seconds.
const AT_ITS_START: Duration = Duration::from_millis(1500);

/// When a guardian of the node was started again by kubelet.
async fn guardian_started(s: &Scenario, node: &str, killed: Timestamp) -> Result<Timestamp> {
    let pods: kube::Api<Pod> = kube::Api::namespaced(s.client.clone(), INSTALLED_IN);
    let on_node =
        ListParams::default().labels("app.kubernetes.io/component=agent").fields(&format!("spec.nodeName={node}"));
    let mut first = None;
    s.eventually("a guardian to be back", async || {
        let found = pods.list(&on_node).await?.items.into_iter().filter_map(|pod| pod.status?.container_statuses);
        let guardians = found.flatten().filter(|status| status.name.starts_with("guardian"));
        let started = guardians.filter_map(|status| Some(status.state?.running?.started_at?.0));
        first = started.filter(|started| *started > killed - SignedDuration::from_secs(1)).min();
        Ok(first.is_some())
    })
    .await?;
    first.context("no guardian")
}

/// An application on each node, with the node's name.
fn an_app_on_each_node(s: &Scenario) -> Result<()> {
    for node in NODES {
        let there = format!("spec:\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  terminationGrace");
        s.apply(&sleeper_manifest(node).replace("spec:\n  terminationGrace", &there))?;
    }
    for node in NODES {
        s.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{node}"), "--timeout=120s"])?;
        ensure!(s.kubectl(&["get", "pod", node, "-o", "jsonpath={.spec.nodeName}"])? == node);
        s.shell(node, BEAT)?;
    }
    Ok(())
}

/// All applications are frozen, and while they are, the API server, the controller and guardians of all nodes die. Returns
/// the longest gap of each application in ms.
async fn die_while_frozen(s: &Scenario, name: &str, plan: Value, after: Duration, both: bool) -> Result<Vec<u64>> {
    for node in NODES {
        longest_gap(s, node)?;
    }
    let begun = Timestamp::now();
    s.start_backup(name, plan).await?;
    frozen(s, name, 2 * NODES.len()).await?;
    tokio::time::sleep(after).await;
    // The API server first: nobody can be told anything any more.
    let dead = s.kill_api_server()?;
    ensure!(kill(CONTROLLER)? > 0, "no controller was killed");
    let killed = Timestamp::now();
    let (guardians, there) = if both { (BOTH, 2 * NODES.len()) } else { (FIRST, NODES.len()) };
    let died = kill(guardians)?;
    ensure!(died == there, "{died} of {there} guardians were killed");
    tokio::time::sleep(ALLOWED + Duration::from_millis(500)).await;
    drop(dead);
    s.api_server_answers().await?;
    let mut gaps = Vec::new();
    for node in NODES {
        let mut allowed = ALLOWED;
        if both {
            let back = guardian_started(s, node, killed).await?.duration_since(begun);
            allowed = allowed.max(Duration::try_from(back)? + AT_ITS_START);
        }
        s.eventually("the application at work", async || is_at_work(s, node)).await?;
        let gap = longest_gap(s, node)?;
        ensure!(gap > 0, "{name}: the application on {node} was never frozen");
        ensure!(
            u128::from(gap) <= allowed.as_millis(),
            "{name}: the application on {node} was frozen for {gap} ms, allowed are {allowed:?}"
        );
        gaps.push(gap);
    }
    Ok(gaps)
}

#[test]
fn nothing_that_dies_keeps_an_application_frozen_longer_than_allowed() {
    let (rounds, seed) = (number("LIFEBOAT_KILL_ROUNDS", 5), number("LIFEBOAT_KILL_SEED", 1));
    scenario("quiesce-all-die", async |s: Scenario| {
        an_app_on_each_node(&s)?;
        let mut longest = 0;
        let all = json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]});
        let mut plan = both_ways(&s, &format!("{}s", ALLOWED.as_secs()), &all);
        // A step that never comes to rest, after those that do: it stays frozen, however fast the volumes are read.
        let mut last = step("sleep 1000", "true");
        last["selector"] = json!({"matchLabels": {"app": NODES[0]}});
        plan["plan"]["quiesce"]["steps"].as_array_mut().context("steps")?.push(last);
        for round in 0..rounds {
            let name = format!("b{round}");
            let after = Duration::from_millis(chance(seed + round) % 1500);
            let gaps = die_while_frozen(&s, &name, plan.clone(), after, round % 2 == 0).await?;
            println!("round {round} of {rounds}: frozen for {gaps:?} ms");
            longest = gaps.into_iter().fold(longest, u64::max);
            fresh_lifeboat(&s).await?;
            let status = s.backup_finished(&name).await?.status.context("status")?;
            // What was not at rest until it was released does not count as such.
            ensure!(status.consistency != Some(Consistency::Application), "{:?}", status.quiesce);
            ensure!(status.quiesce.context("quiesce")?.workloads.iter().all(|w| !w.frozen), "{:?}", status.conditions);
        }
        println!("{rounds} rounds with {} applications, the longest freeze took {longest} ms", NODES.len());
        Ok(())
    });
}

#[test]
fn a_guardian_killed_while_frozen_is_covered_by_the_second_and_the_backup_fails() {
    scenario("quiesce-guardian", async |s: Scenario| {
        beating_app(&s)?;
        // More than is read before the store is held.
        s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=400 2>/dev/null; sync")?;
        longest_gap(&s, "app")?;
        s.start_backup("b", both_ways(&s, "60s", &json!({"matchLabels": {"app": "app"}}))).await?;
        frozen(&s, "b", 2).await?;
        let held = StoreHeld::hold()?;
        ensure!(kill(FIRST)? == NODES.len(), "not every first guardian was killed");
        let mut gap = 0;
        s.eventually("the application at work", async || {
            gap = longest_gap(&s, "app")?;
            Ok(gap > 0)
        })
        .await?;
        drop(held);
        ensure!(gap < 20_000, "frozen for {gap} ms");
        let (backup, message) = s.backup_failed("b", "FreezeBroken").await?;
        ensure!(message.contains("did not stay at rest"), "{message}");
        ensure!(backup.status.context("status")?.quiesce.context("quiesce")?.workloads.iter().all(|w| !w.frozen));
        fresh_lifeboat(&s).await
    });
}

#[test]
fn without_a_guardian_commands_go_through_the_api_server_and_the_status_says_so() {
    scenario("quiesce-direct", async |s: Scenario| {
        s.sleeper("app")?;
        agents_on(&s, NO_NODE)?;
        s.eventually("no agent", async || {
            let selector = "app.kubernetes.io/component=agent";
            Ok(s.kubectl_cluster(&["-n", INSTALLED_IN, "get", "pods", "-l", selector, "-o", "name"])?.is_empty())
        })
        .await?;
        let commands = step("echo freeze >> /tmp/log", "echo thaw >> /tmp/log");
        let kernel = json!({"selector": {"matchLabels": {"app": "app"}}, "fsfreeze": {}});
        // Without agents nothing can be read; the freeze is what counts here.
        let plan = |steps: &[&Value]| {
            let mut spec = plan_with(&s, &json!({"steps": steps}));
            spec["plan"]["volumes"] = json!([{"match": {}, "method": "Skip"}]);
            spec
        };
        let result = async {
            s.start_backup("b", plan(&[&commands])).await?;
            let status = s.backup_succeeded("b").await?.status.context("status")?;
            ensure!(log(&s)? == ["freeze", "thaw"], "{:?}", log(&s)?);
            let workload = &status.quiesce.context("quiesce")?.workloads[0];
            ensure!(workload.through == Some(Through::ApiServer) && workload.freeze_millis.is_some(), "{workload:?}");
            let quiesced = status.conditions.iter().find(|c| c.type_ == "Quiesced").context("Quiesced")?;
            ensure!(quiesced.message.contains("API server"), "{}", quiesced.message);
            // What needs a guardian waits for one, and nothing before it is frozen in vain.
            s.start_backup("c", plan(&[&commands, &kernel])).await?;
            let (_, message) = s.backup_failed("c", "HookFailed").await?;
            ensure!(message.contains("no guardian"), "{message}");
            ensure!(log(&s)? == ["freeze", "thaw"], "{:?}", log(&s)?);
            s.start_backup("d", plan(&[&commands, &kernel])).await?;
            s.wait(&s.namespaced(), "d", "its wait for a guardian", |b: &Backup| {
                let conditions = b.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
                conditions.iter().any(|c| c.type_ == "Quiesced" && c.reason == "Waiting")
            })
            .await?;
            ensure!(kill(CONTROLLER)? > 0, "no controller was killed");
            agents_on(&s, "null")?;
            let status = s.backup_succeeded("d").await?.status.context("status")?;
            let workloads = status.quiesce.context("quiesce")?.workloads;
            let by_guardians = workloads.iter().all(|w| w.through == Some(Through::Guardian));
            ensure!(workloads.len() == 2 && by_guardians, "{workloads:?}");
            ensure!(log(&s)? == ["freeze", "thaw", "freeze", "thaw"], "{:?}", log(&s)?);
            Ok(())
        }
        .await;
        agents_on(&s, "null")?;
        fresh_lifeboat(&s).await?;
        result
    });
}

const NO_NODE: &str = r#"{"no":"node"}"#;

/// Agents only on nodes with these labels.
fn agents_on(s: &Scenario, selector: &str) -> Result<()> {
    let patch = format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{selector}}}}}}}}}"#);
    s.kubectl_cluster(&["-n", INSTALLED_IN, "patch", "daemonset", "lifeboat-agent", "-p", &patch]).map(|_| ())
}

#[test]
fn hooks_that_cannot_work_are_told_in_a_condition_before_or_after_a_thaw() {
    scenario("quiesce-bad-input", async |s: Scenario| {
        s.sleeper("app")?;
        let app = json!({"matchLabels": {"app": "app"}});
        let cases = [
            (
                json!({"selector": app, "container": "db", "template": {"name": "redis"}}),
                "HookFailed",
                "no container `db`; it has main",
            ),
            (
                json!({"selector": app, "template": {"name": "oracle"}}),
                "TemplateNotFound",
                "no QuiesceTemplate `oracle`",
            ),
            (json!({"selector": app, "template": {"name": "sqlite"}}), "HookInvalid", "parameter `file`"),
            (
                json!({"selector": app, "template": {"name": "redis", "parameters": {"host": "x"}}}),
                "HookInvalid",
                "no parameter `host`",
            ),
            (json!({"selector": app, "template": {"name": "postgresql"}}), "HookFailed", "psql"),
            (
                json!({"selector": app, "exec": {"freeze": ["no-such-command"]}}),
                "HookFailed",
                "does not have the command",
            ),
            (json!({"selector": app, "hold": {"command": ["true"]}}), "HookFailed", "without the line `frozen`"),
        ];
        for (number, (step, reason, says)) in cases.into_iter().enumerate() {
            let name = format!("b{number}");
            s.start_backup(&name, plan_with(&s, &json!({"steps": [step]}))).await?;
            let (_, message) = s.backup_failed(&name, reason).await?;
            ensure!(message.contains(says), "{message}");
        }
        Ok(())
    });
}

#[test]
fn a_pod_declares_its_hooks_by_annotations() {
    scenario("quiesce-declared", async |s: Scenario| {
        let annotations = r#"annotations: {quiesce.lifeboat.dev/freeze: '["sh", "-c", "echo freeze >> /tmp/log"]', quiesce.lifeboat.dev/thaw: '["sh", "-c", "echo thaw >> /tmp/log"]'}, "#;
        s.apply(
            &sleeper_manifest("app")
                .replace("kind: Pod\nmetadata: {", &format!("kind: Pod\nmetadata: {{{annotations}")),
        )?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        let backup = s.back_up("b").await?;
        ensure!(log(&s)? == ["freeze", "thaw"], "{:?}", log(&s)?);
        ensure!(backup.status.context("status")?.consistency == Some(Consistency::Application));
        s.kubectl(&["annotate", "pod", "app", "quiesce.lifeboat.dev/frezze=[]"])?;
        s.start_backup("c", json!({"plan": s.plan()})).await?;
        let (_, message) = s.backup_failed("c", "HookInvalid").await?;
        ensure!(message.contains("quiesce.lifeboat.dev/frezze is not known"), "{message}");
        Ok(())
    });
}
