//! Retention on a real cluster: what a policy does not keep goes, its space comes back beside running backups, and what stays is whole.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use kube::{Api, ResourceExt};
use lifeboat_crds::conditions::{ConditionType, is_true};
use lifeboat_crds::{Backup, BackupPolicy, ClusterRepository};
use lifeboat_e2e::scenario::{Scenario, launcher, run, scenario};
use serde_json::json;

fn policy(s: &Scenario) -> String {
    let repository = &s.namespace;
    format!(
        "apiVersion: lifeboat.dev/v1alpha1
kind: BackupPolicy
metadata: {{name: two}}
spec:
  tiers:
  - repository: {{ref: {{name: {repository}}}, keep: {{last: 2}}}}
"
    )
}

/// The bytes in the scenario's bucket.
fn stored(s: &Scenario) -> Result<u64> {
    let folder = launcher(&["s3", "folder", &s.namespace])?;
    let size = run("du", &["-sb", folder.trim()], "")?;
    size.split_whitespace().next().context("du says nothing")?.parse().context("no number")
}

async fn backups(s: &Scenario) -> Result<Vec<String>> {
    let all = s.namespaced::<Backup>().list(&kube::api::ListParams::default()).await?;
    Ok(all.iter().map(ResourceExt::name_any).collect())
}

/// Fresh data that nothing is deduplicated against, and its sum.
fn fresh(s: &Scenario) -> Result<String> {
    s.shell("app", "head -c 20000000 /dev/urandom > /data/file && sync && sha256sum /data/file")
}

async fn back_up(s: &Scenario, name: &str) -> Result<()> {
    s.start_backup(name, json!({"policyRef": {"name": "two"}})).await?;
    s.backup_succeeded(name).await.map(|_| ())
}

#[test]
fn two_of_five_backups_stay_the_bucket_shrinks_and_backups_go_on_meanwhile() {
    scenario("retention", async |s: Scenario| {
        s.sleeper("app")?;
        s.apply(&policy(&s))?;
        for number in 1..=5 {
            fresh(&s)?;
            back_up(&s, &format!("b{number}")).await?;
        }
        s.eventually("two backups to stay", async || Ok(backups(&s).await? == ["b4", "b5"])).await?;
        let settled = |p: &BackupPolicy| {
            p.status.as_ref().and_then(|status| status.retention.as_ref()).is_some_and(|done| done.kept == 2)
        };
        s.wait(&s.namespaced(), "two", "retention to be shown", settled).await?;
        let before = stored(&s)?;

        let often = json!({"spec": {"maintenance": {"cron": "* * * * *", "jitter": "0s"}}}).to_string();
        s.kubectl_cluster(&["patch", "clusterrepository", &s.namespace, "--type=merge", "-p", &often])?;
        let sum = fresh(&s)?;
        back_up(&s, "b6").await?;
        let repositories: Api<ClusterRepository> = Api::all(s.client.clone());
        let maintained = |r: &ClusterRepository| {
            let shown = r.status.as_ref().and_then(|status| status.maintenance.as_ref());
            shown.and_then(|shown| shown.last_result).is_some_and(|result| result.deleted_bytes > 50_000_000)
        };
        s.wait(&repositories, &s.namespace, "space to come back", maintained).await?;
        let after = stored(&s)?;
        // Three of 20 MB went and one came.
        ensure!(after + 35_000_000 < before, "the bucket had {before} bytes and has {after}");
        s.eventually("two backups to stay", async || Ok(backups(&s).await? == ["b5", "b6"])).await?;

        s.kubectl(&["delete", "pod/app", "pvc/app-data"])?;
        s.start_restore("r", json!({"source": {"backupRef": {"name": "b6"}}})).await?;
        s.restore_finished("r").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        let restored = s.shell("app", "sha256sum /data/file")?;
        ensure!(restored == sum, "{sum} came back as {restored}");
        Ok(())
    });
}

#[test]
fn the_deletion_policy_of_a_backup_decides_about_its_data() {
    scenario("deletion", async |s: Scenario| {
        s.kubectl(&["create", "configmap", "settings", "--from-literal=a=1"])?;
        let mut points = Vec::new();
        for (name, policy) in [("goes", "Delete"), ("stays", "Retain")] {
            s.start_backup(name, json!({"plan": s.plan(), "deletionPolicy": policy})).await?;
            let backup = s.backup_succeeded(name).await?;
            points.push(backup.status.and_then(|status| status.recovery_point).context("recovery point")?);
            s.delete(&s.namespaced::<Backup>(), name).await?;
        }
        let source =
            |point: &str| json!({"source": {"repository": {"ref": {"name": s.namespace}, "recoveryPoint": point}}});
        s.start_restore("gone", source(&points[0])).await?;
        s.restore_failed("gone", "RecoveryPointNotFound").await?;
        s.start_restore("there", source(&points[1])).await?;
        let status = s.restore_finished("there").await?.status.context("status")?;
        ensure!(is_true(&status.conditions, ConditionType::Succeeded), "{:?}", status.conditions);
        ensure!(status.objects.is_some(), "the retained one was not restored");
        Ok(())
    });
}
