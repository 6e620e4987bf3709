//! What cannot be done on a real cluster ends in a condition with a reason and a sentence that says what to do.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use lifeboat_crds::{BackupPolicy, conditions};
use lifeboat_e2e::scenario::{INSTALLED_IN, Scenario, scenario};
use serde_json::json;

/// The scenario's `ClusterRepository` manifest with another name and something else changed.
fn variant(s: &Scenario, name: &str, change: impl Fn(String) -> String) -> String {
    let manifest = s.repository_manifest();
    let only = manifest.rsplit("---\n").next().unwrap_or_default().to_owned();
    change(only.replacen(&format!("name: {}}}", s.namespace), &format!("name: {name}}}"), 1))
}

async fn refused(
    s: &Scenario,
    suffix: &str,
    reason: &str,
    says: &str,
    change: impl Fn(String) -> String,
) -> Result<()> {
    // No name of a Secret is a part of it: `change` replaces those.
    let name = format!("{}-with-bad-{suffix}", s.namespace);
    s.apply(&variant(s, &name, change))?;
    let outcome = s.repository_refused(&name, reason).await;
    s.kubectl_cluster(&["delete", "clusterrepository", &name])?;
    let message = outcome?;
    ensure!(message.contains(says), "{reason}: the message does not say `{says}`: {message}");
    Ok(())
}

#[test]
fn a_repository_that_cannot_be_used_says_why() {
    scenario("bad-repository", async |s: Scenario| {
        let ns = s.namespace.clone();
        s.kubectl_cluster(&[
            "-n",
            INSTALLED_IN,
            "delete",
            "secret",
            &format!("{ns}-wrong"),
            &format!("{ns}-half"),
            "--ignore-not-found",
        ])?;
        s.kubectl_cluster(&[
            "-n",
            INSTALLED_IN,
            "create",
            "secret",
            "generic",
            &format!("{ns}-wrong"),
            "--from-literal=password=wrong",
            "--from-literal=AWS_ACCESS_KEY_ID=nobody",
            "--from-literal=AWS_SECRET_ACCESS_KEY=nothing",
        ])?;
        s.kubectl_cluster(&[
            "-n",
            INSTALLED_IN,
            "create",
            "secret",
            "generic",
            &format!("{ns}-half"),
            "--from-literal=AWS_ACCESS_KEY_ID=nobody",
        ])?;
        refused(&s, "key", "WrongKey", "password", |m| m.replace(&format!("{ns}-key"), &format!("{ns}-wrong"))).await?;
        refused(&s, "credentials", "AccessDenied", &format!("{ns}-wrong"), |m| {
            m.replace(&format!("{ns}-bucket"), &format!("{ns}-wrong"))
        })
        .await?;
        refused(&s, "half", "SecretInvalid", "AWS_SECRET_ACCESS_KEY", |m| {
            m.replace(&format!("{ns}-bucket"), &format!("{ns}-half"))
        })
        .await?;
        refused(&s, "secret", "SecretNotFound", "no-such-secret", |m| {
            m.replace(&format!("{ns}-bucket"), "no-such-secret")
        })
        .await?;
        refused(&s, "bucket", "BucketNotFound", "no-such-bucket", |m| {
            m.replace(&format!("bucket: {ns},"), "bucket: no-such-bucket,")
        })
        .await?;
        refused(&s, "endpoint", "Unreachable", "10.213.0.1:1", |m| m.replace("10.213.0.1:9100", "10.213.0.1:1"))
            .await?;
        s.kubectl_cluster(&["-n", INSTALLED_IN, "delete", "secret", &format!("{ns}-wrong"), &format!("{ns}-half")])?;
        // None of this has harmed the repository that shares the bucket.
        s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {a: b}\n")?;
        s.back_up("after").await.map(|_| ())
    });
}

#[test]
fn a_backup_that_cannot_start_says_why() {
    scenario("bad-backup", async |s: Scenario| {
        let ns = s.namespace.clone();
        let plan = |repository: &str, more: serde_json::Value| {
            let mut plan = json!({"tiers": [{"repository": {"ref": {"name": repository}}}]});
            for (key, value) in more.as_object().into_iter().flatten() {
                plan[key] = value.clone();
            }
            json!({"plan": plan})
        };
        s.start_backup("unknown", plan("no-such-repository", json!({}))).await?;
        let (_, message) = s.backup_failed("unknown", "RepositoryNotFound").await?;
        ensure!(message.contains("no-such-repository"), "{message}");

        s.start_backup("no-policy", json!({"policyRef": {"name": "nothing"}})).await?;
        let (_, message) = s.backup_failed("no-policy", "PolicyNotFound").await?;
        ensure!(message.contains("nothing"), "{message}");

        let nothing = json!({"scope": {"selector": {"matchLabels": {"no": "such-label"}}}});
        s.start_backup("empty", plan(&ns, nothing)).await?;
        s.backup_failed("empty", "NothingSelected").await?;

        s.apply("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: alone}\nspec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}\n")?;
        s.kubectl(&["wait", "--for=jsonpath={.status.phase}=Bound", "pvc/alone", "--timeout=60s"])?;
        s.start_backup("no-pod", plan(&ns, json!({"volumes": [{"method": "Live"}]}))).await?;
        let (_, message) = s.backup_failed("no-pod", "NoPodForVolume").await?;
        ensure!(message.contains("alone"), "{message}");
        // The way out that the message names works.
        s.start_backup("skipped", plan(&ns, json!({"volumes": [{"match": {"names": ["alone"]}, "method": "Skip"}]})))
            .await?;
        s.backup_succeeded("skipped").await?;

        for (name, change) in [
            ("closed", json!({"spec": {"allowedNamespaces": {"from": "None"}}})),
            ("frozen", json!({"spec": {"mode": "ReadOnly", "allowedNamespaces": {"from": "All"}}})),
        ] {
            s.kubectl_cluster(&["patch", "clusterrepository", &ns, "--type=merge", "-p", &change.to_string()])?;
            s.start_backup(name, plan(&ns, json!({}))).await?;
            let reason = if name == "closed" { "NamespaceNotAllowed" } else { "RepositoryReadOnly" };
            s.backup_failed(name, reason).await?;
        }
        ensure!(s.leftovers().await?.is_empty());
        Ok(())
    });
}

#[test]
fn a_schedule_that_makes_no_sense_is_refused_in_a_condition() {
    scenario("bad-schedule", async |s: Scenario| {
        for (name, schedule, reason, says) in [
            ("cron", "{cron: '61 * * * *'}", "InvalidSchedule", "61"),
            ("zone", "{cron: '0 3 * * *', timeZone: Europe/Atlantis}", "InvalidTimeZone", "Europe/Atlantis"),
        ] {
            s.apply(&format!(
                "apiVersion: lifeboat.dev/v1alpha1\nkind: BackupPolicy\nmetadata: {{name: {name}}}\nspec: {{schedule: {schedule}, tiers: [{{repository: {{ref: {{name: {}}}}}}}]}}\n",
                s.namespace
            ))?;
            let policy = s
                .wait(&s.namespaced::<BackupPolicy>(), name, reason, |p: &BackupPolicy| {
                    p.status.as_ref().is_some_and(|s| {
                        s.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "False" && c.reason == reason)
                    })
                })
                .await?;
            let status = policy.status.context("status")?;
            let message =
                &conditions::get(&status.conditions, conditions::ConditionType::Ready).context("Ready")?.message;
            ensure!(message.contains(says), "{message}");
            let events = s.kubectl(&[
                "get",
                "events",
                "--field-selector",
                &format!("involvedObject.name={name}"),
                "-o",
                "jsonpath={.items[*].reason}",
            ])?;
            ensure!(events.contains(reason), "no event says {reason}: {events}");
        }
        // A secret value never shows up in what users can see.
        let seen = s.kubectl_cluster(&["get", "clusterrepositories,events", "-A", "-o", "yaml"])?;
        ensure!(
            !seen.contains(lifeboat_e2e::scenario::PASSWORD) && !seen.contains(&lifeboat_e2e::scenario::store().2),
            "a secret leaked"
        );
        Ok(())
    });
}
