//! What dies in the middle, on a real cluster: agent, controller, object store, pod, and files that move while they are read.
#![cfg(feature = "cluster")]
#![allow(clippy::print_stdout)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, PostParams};
use lifeboat_crds::{
    VolumeTask,
    backup::{Phase, Through},
    conditions::{self, ConditionType},
};
use lifeboat_e2e::faults::{CONTROLLER, fresh_lifeboat, kill};
use lifeboat_e2e::scenario::{INSTALLED_IN, Scenario, StoreHeld, launcher, run, scenario};
use serde_json::json;

/// Objects that take some seconds to be created.
const MANY: usize = 3000;
/// How long the API server is away.
const OUTAGE: Duration = Duration::from_secs(15);
/// Data that takes some seconds to read: it cannot be compressed.
const FILL: &str = "for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/data/big$i bs=1M count=100 2>/dev/null; done; sync";

/// Starts a backup of a large volume, waits until an agent is in the middle of it, and holds the store so that it stays there.
async fn in_the_middle(s: &Scenario, name: &str) -> Result<(VolumeTask, StoreHeld)> {
    s.start_backup(name, json!({"plan": s.live_plan()})).await?;
    let api: kube::Api<VolumeTask> = kube::Api::namespaced(s.client.clone(), INSTALLED_IN);
    let mut found = None;
    s.eventually("an agent in the middle of the volume", async || {
        let tasks = api.list(&kube::api::ListParams::default()).await?;
        found = tasks.into_iter().find(|task| {
            let is_ours = task.spec.namespace() == Some(s.namespace.as_str());
            is_ours && task.status.as_ref().is_some_and(|status| status.session.is_some())
        });
        Ok(found.is_some())
    })
    .await?;
    let held = StoreHeld::hold()?;
    let task = api.get(&found.context("the task")?.name_any()).await?;
    let conditions = task.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    ensure!(
        !conditions::is_finished(conditions),
        "the agent was done before the store was held: make the volume larger"
    );
    Ok((task, held))
}

fn kill_pods(selector: &str) -> Result<()> {
    run("kubectl", &["-n", INSTALLED_IN, "delete", "pod", "-l", selector, "--grace-period=0", "--force"], "")
        .map(|_| ())
}

async fn restores(s: &Scenario) -> Result<()> {
    let before = s.shell("app", "cd /data && sha256sum big*")?;
    s.lose_namespace()?;
    s.restore_newest("back").await?;
    s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
    ensure!(s.shell("app", "cd /data && sha256sum big*")? == before, "the restored files differ");
    Ok(())
}

#[test]
fn an_agent_killed_in_the_middle_is_succeeded_by_another() {
    scenario("agent-killed", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", FILL)?;
        let (task, held) = in_the_middle(&s, "b").await?;
        let node = format!("--field-selector=spec.nodeName={}", task.spec.node_name);
        let agents = [
            "-n",
            INSTALLED_IN,
            "delete",
            "pod",
            "-l",
            "app.kubernetes.io/component=agent",
            &node,
            "--grace-period=0",
            "--force",
        ];
        run("kubectl", &agents, "")?;
        drop(held);
        s.backup_succeeded("b").await?;
        restores(&s).await
    });
}

#[test]
fn a_controller_killed_in_the_middle_is_succeeded_by_another() {
    scenario("controller-killed", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", FILL)?;
        let (_, held) = in_the_middle(&s, "b").await?;
        kill_pods("app.kubernetes.io/component=controller")?;
        drop(held);
        s.backup_succeeded("b").await?;
        s.eventually("the tasks to be gone", async || Ok(s.leftovers().await?.is_empty())).await
    });
}

#[test]
fn a_controller_killed_while_it_restores_objects_goes_on_and_skips_none() {
    scenario("restore-killed", async |s: Scenario| {
        // Over one client: kubectl allows itself few requests a second.
        let api: kube::Api<ConfigMap> = s.namespaced();
        let create = async |n| {
            let metadata = json!({"name": format!("many-{n}"), "labels": {"many": "1"}});
            api.create(&PostParams::default(), &serde_json::from_value(json!({"metadata": metadata}))?).await?;
            Ok::<_, anyhow::Error>(())
        };
        for some in (0..MANY).collect::<Vec<_>>().chunks(50) {
            try_join_all(some.iter().map(create)).await?;
        }
        s.back_up("b").await?;
        let many = ListParams::default().labels("many=1");
        api.delete_collection(&DeleteParams::default(), &many).await?;
        let count = async || Ok::<_, anyhow::Error>(api.list_metadata(&many).await?.items.len());
        s.start_restore("r", json!({"source": {"backupRef": {"name": "b"}}})).await?;
        s.eventually("some objects", async || Ok(count().await? > 0)).await?;
        let died = kill(CONTROLLER)?;
        let there = count().await?;
        ensure!(died == 1 && there < MANY, "{died} controllers died when {there} of {MANY} objects were there");
        let status = s.restore_finished("r").await?.status.context("status")?;
        ensure!(status.phase == Phase::Succeeded, "{:?}: {:?}", status.phase, status.objects);
        let objects = status.objects.context("objects")?;
        ensure!(objects.created >= MANY as u64 && objects.skipped == 0 && count().await? == MANY, "{objects:?}");
        fresh_lifeboat(&s).await
    });
}

#[test]
fn an_object_store_that_goes_away_for_a_while_costs_time_only() {
    scenario("store-away", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", FILL)?;
        let (_, held) = in_the_middle(&s, "b").await?;
        drop(held);
        launcher(&["s3", "stop"])?;
        tokio::time::sleep(std::time::Duration::from_secs(4)).await;
        launcher(&["s3", "start"])?;
        s.backup_succeeded("b").await?;
        restores(&s).await
    });
}

#[test]
fn after_an_outage_of_the_api_server_the_next_freeze_is_heard() {
    scenario("api-server-away", async |s: Scenario| {
        s.sleeper("app")?;
        let dead = s.kill_api_server()?;
        // Pauses that grow to a minute would be long by now.
        tokio::time::sleep(OUTAGE).await;
        drop(dead);
        let app = json!({"matchLabels": {"app": "app"}});
        let mut plan = s.live_plan();
        plan["quiesce"] =
            json!({"steps": [{"selector": app, "exec": {"freeze": ["true"]}}, {"selector": app, "fsfreeze": {}}]});
        s.start_backup("b", json!({"plan": plan})).await?;
        let status = s.backup_succeeded("b").await?.status.context("status")?;
        let workloads = status.quiesce.context("quiesce")?.workloads;
        let by_guardians = workloads.iter().all(|w| w.through == Some(Through::Guardian));
        ensure!(workloads.len() == 2 && by_guardians, "{workloads:?}");
        Ok(())
    });
}

#[test]
fn a_pod_that_vanishes_in_the_middle_fails_the_backup_and_harms_nothing() {
    scenario("pod-vanishes", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "echo first > /data/file; sync")?;
        s.back_up("first").await?;
        s.shell("app", FILL)?;
        let (_, held) = in_the_middle(&s, "second").await?;
        s.kubectl(&["delete", "pod", "app", "--grace-period=0", "--force"])?;
        let (_, message) = s.backup_failed("second", "PodVanished").await?;
        drop(held);
        ensure!(message.contains("app"), "{message}");
        s.eventually("the tasks to be gone", async || Ok(s.leftovers().await?.is_empty())).await?;
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        ensure!(s.shell("app", "cat /data/file")? == "first\n");
        Ok(())
    });
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_named_and_never_half_restored() {
    scenario("file-shrinks", async |s: Scenario| {
        s.sleeper("app")?;
        // Far more than an agent holds in memory, so that most of it is not read yet when the store is held.
        s.shell(
            "app",
            "echo quiet > /data/quiet; dd if=/dev/urandom of=/data/moving bs=1M count=600 2>/dev/null; sync",
        )?;
        let (_, held) = in_the_middle(&s, "b").await?;
        s.shell("app", ": > /data/moving")?;
        drop(held);
        let status = s.backup_succeeded("b").await?.status.context("status")?;
        let condition = conditions::get(&status.conditions, ConditionType::Succeeded).context("Succeeded")?;
        ensure!(
            status.phase == Phase::Partial && condition.reason == "UnreadFiles" && condition.message.contains("moving"),
            "{condition:?}"
        );
        ensure!(status.volumes[0].skipped_sample.iter().any(|file| file.path == "moving"), "{:?}", status.volumes);
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        ensure!(
            s.shell("app", "ls /data")?.split_whitespace().all(|name| name != "moving"),
            "half a file was restored"
        );
        ensure!(s.shell("app", "cat /data/quiet")? == "quiet\n");
        Ok(())
    });
}

/// A small file system in place of the bucket, gone when it is dropped.
struct SmallBucket(String);

impl SmallBucket {
    fn mount(folder: String, size: &str) -> Result<Self> {
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "small-bucket", &folder], "")?;
        Ok(Self(folder))
    }
}

impl Drop for SmallBucket {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &["--lazy", &self.0], "") {
            println!("the small bucket is still mounted: {error:#}");
        }
    }
}

#[test]
fn a_full_store_is_told_and_harms_nothing_that_is_there() {
    scenario("store-full", async |s: Scenario| {
        s.sleeper("app")?;
        s.shell("app", "echo first > /data/file; sync")?;
        let name = format!("{}-small", s.namespace);
        launcher(&["s3", "remove-bucket", &name])?;
        launcher(&["s3", "bucket", &name])?;
        let folder = launcher(&["s3", "folder", &name])?.trim().to_owned();
        let small = SmallBucket::mount(folder, "24m")?;
        let manifest = s.repository_manifest();
        let only = manifest.rsplit("---\n").next().context("the repository")?;
        s.apply(
            &only
                .replace(&format!("metadata: {{name: {}}}", s.namespace), &format!("metadata: {{name: {name}}}"))
                .replace(&format!("bucket: {},", s.namespace), &format!("bucket: {name},")),
        )?;
        let result = async {
            s.repository_ready(&name).await?;
            let plan = json!({"plan": {"tiers": [{"repository": {"ref": {"name": name}}}]}});
            s.start_backup("first", plan.clone()).await?;
            s.backup_succeeded("first").await?;
            s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=100 2>/dev/null; sync")?;
            s.start_backup("second", plan).await?;
            let (_, message) = s.backup_failed("second", "StoreFull").await?;
            ensure!(message.contains("free space"), "{message}");
            s.lose_namespace()?;
            s.start_restore("back", json!({"source": {"repository": {"ref": {"name": name}}}})).await?;
            s.restore_finished("back").await?;
            s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
            ensure!(s.shell("app", "cat /data/file; ls /data | wc -l")?.starts_with("first\n"));
            Ok(())
        }
        .await;
        s.kubectl_cluster(&["delete", "clusterrepository", &name])?;
        drop(small);
        launcher(&["s3", "remove-bucket", &name])?;
        result
    });
}
