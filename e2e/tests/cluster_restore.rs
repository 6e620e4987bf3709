//! Restores on a real cluster: what is refused before anything changes, what happens to what exists, and that a
//! restore runs once.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use lifeboat_crds::Restore;
use lifeboat_e2e::scenario::{Scenario, scenario};
use serde_json::json;

const SETTINGS: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {colour: blue}\n";

fn colour(s: &Scenario) -> Result<String> {
    s.kubectl(&["get", "configmap", "settings", "-o", "jsonpath={.data.colour}"])
}

#[test]
fn an_existing_claim_is_never_written_to() {
    scenario("claim-exists", async |s: Scenario| {
        s.sleeper("app")?;
        s.apply(SETTINGS)?;
        s.shell("app", "echo old > /data/file; sync")?;
        s.back_up("b").await?;
        s.shell("app", "echo new > /data/file")?;
        s.kubectl(&["delete", "configmap", "settings"])?;
        s.start_restore("r", json!({"source": {"backupRef": {"name": "b"}}})).await?;
        let message = s.restore_failed("r", "VolumeExists").await?;
        ensure!(message.contains("app-data"), "{message}");
        ensure!(s.shell("app", "cat /data/file")? == "new\n");
        ensure!(
            s.kubectl(&["get", "configmap", "settings", "--ignore-not-found"])?.is_empty(),
            "objects were restored all the same"
        );
        Ok(())
    });
}

#[test]
fn existing_objects_are_skipped_updated_or_refused_as_the_spec_says() {
    scenario("objects-exist", async |s: Scenario| {
        s.apply(SETTINGS)?;
        // More than are asked for by name.
        let more = (0..6).map(|n| format!("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: more-{n}}}\n"));
        s.apply(&more.collect::<String>())?;
        s.back_up("b").await?;
        s.kubectl(&["delete", "configmap", "more-0"])?;
        let red =
            || s.kubectl(&["patch", "configmap", "settings", "--type=merge", "-p", "{\"data\":{\"colour\":\"red\"}}"]);
        red()?;
        s.start_restore("fail", json!({"source": {"backupRef": {"name": "b"}}, "existing": {"resources": "Fail"}}))
            .await?;
        let message = s.restore_failed("fail", "ObjectExists").await?;
        ensure!(message.contains("settings") && message.contains("more-5") && !message.contains("more-0"), "{message}");
        ensure!(colour(&s)? == "red");
        s.start_restore("skip", json!({"source": {"backupRef": {"name": "b"}}})).await?;
        let skipped = s.restore_finished("skip").await?.status.and_then(|s| s.objects).context("objects")?;
        ensure!(skipped.skipped >= 1 && skipped.problems.iter().any(|p| p.contains("settings")), "{skipped:?}");
        ensure!(colour(&s)? == "red");
        s.start_restore("update", json!({"source": {"backupRef": {"name": "b"}}, "existing": {"resources": "Update"}}))
            .await?;
        s.restore_finished("update").await?;
        ensure!(colour(&s)? == "blue");
        Ok(())
    });
}

#[test]
fn a_restore_that_has_ended_does_nothing_when_it_is_applied_again() {
    scenario("restore-once", async |s: Scenario| {
        s.apply(SETTINGS)?;
        s.back_up("b").await?;
        s.kubectl(&["delete", "configmap", "settings"])?;
        let manifest = "apiVersion: lifeboat.dev/v1alpha1\nkind: Restore\nmetadata: {name: r}\nspec: {source: {backupRef: {name: b}}}\n";
        s.apply(manifest)?;
        let first = s.restore_finished("r").await?;
        s.kubectl(&["delete", "configmap", "settings"])?;
        s.apply(manifest)?;
        // The controller has seen the second apply when it has seen an annotation that came after it.
        s.kubectl(&["annotate", "restore", "r", "seen=1"])?;
        s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: other}\ndata: {a: b}\n")?;
        s.back_up("later").await?;
        ensure!(s.kubectl(&["get", "configmap", "settings", "--ignore-not-found"])?.is_empty(), "it ran again");
        let second = s.namespaced::<Restore>().get("r").await?;
        ensure!(
            first.status.as_ref().map(|s| &s.completion_time) == second.status.as_ref().map(|s| &s.completion_time)
        );
        Ok(())
    });
}

#[test]
fn a_point_in_time_is_chosen_by_time_and_an_unknown_one_is_refused() {
    scenario("as-of", async |s: Scenario| {
        s.apply(SETTINGS)?;
        s.back_up("blue").await?;
        // Times in manifests have whole seconds: the next recovery point must be of a later one.
        let between = jiff::Timestamp::now();
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        s.kubectl(&["patch", "configmap", "settings", "--type=merge", "-p", "{\"data\":{\"colour\":\"red\"}}"])?;
        s.back_up("red").await?;
        let repository = json!({"name": s.namespace});
        s.kubectl(&["delete", "configmap", "settings"])?;
        s.start_restore("old", json!({"source": {"repository": {"ref": repository, "asOf": between.to_string()}}}))
            .await?;
        s.restore_finished("old").await?;
        ensure!(colour(&s)? == "blue", "{}", colour(&s)?);
        s.start_restore("none", json!({"source": {"repository": {"ref": repository, "recoveryPoint": "00000000"}}}))
            .await?;
        s.restore_failed("none", "RecoveryPointNotFound").await?;
        s.start_restore(
            "too-old",
            json!({"source": {"repository": {"ref": repository, "asOf": "2001-01-01T00:00:00Z"}}}),
        )
        .await?;
        s.restore_failed("too-old", "RecoveryPointNotFound").await?;
        s.start_restore("no-backup", json!({"source": {"backupRef": {"name": "nothing"}}})).await?;
        s.restore_failed("no-backup", "SourceUnusable").await?;
        Ok(())
    });
}

#[test]
fn a_namespace_sees_only_its_own_recovery_points() {
    scenario("foreign", async |s: Scenario| {
        s.apply(SETTINGS)?;
        let backup = s.back_up("b").await?;
        let id = backup.status.and_then(|s| s.recovery_point).context("recoveryPoint")?;
        let other = format!("{}-other", s.namespace);
        s.kubectl_cluster(&["create", "namespace", &other])?;
        let result = async {
            let api: kube::Api<Restore> = kube::Api::namespaced(s.client.clone(), &other);
            let source = json!({"source": {"repository": {"ref": {"name": s.namespace}, "recoveryPoint": id}}});
            api.create(&kube::api::PostParams::default(), &Restore::new("r", serde_json::from_value(source)?)).await?;
            let ended = s
                .wait(&api, "r", "the end", |r: &Restore| {
                    r.status.as_ref().is_some_and(|s| lifeboat_crds::conditions::is_finished(&s.conditions))
                })
                .await?;
            let conditions = ended.status.context("status")?.conditions;
            ensure!(
                conditions.iter().any(|c| c.type_ == "Succeeded" && c.reason == "RecoveryPointNotFound"),
                "{conditions:?}"
            );
            Ok(())
        }
        .await;
        s.kubectl_cluster(&["delete", "namespace", &other])?;
        result
    });
}
