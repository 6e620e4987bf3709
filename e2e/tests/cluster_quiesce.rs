//! Freezing and thawing on a real cluster: order, deadlines, and that nothing stays frozen.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use lifeboat_crds::{Backup, backup::Consistency};
use lifeboat_e2e::scenario::{INSTALLED_IN, Scenario, StoreHeld, scenario};
use serde_json::{Value, json};

fn plan_with(s: &Scenario, quiesce: &Value) -> Value {
    let mut plan = s.plan();
    plan["quiesce"] = quiesce.clone();
    // The freeze spans the reading, so that there is time for what is tested.
    plan["volumes"] = json!([{"method": "Live"}]);
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
        ensure!(quiesce.workloads.iter().all(|w| !w.frozen), "{quiesce:?}");
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
        let quiesce = json!({"maxFreeze": "1s", "steps": [step("date +%s > /tmp/frozen", "date +%s > /tmp/thawed")]});
        s.start_backup("b", plan_with(&s, &quiesce)).await?;
        s.eventually("the freeze", async || Ok(s.shell("app", "cat /tmp/frozen 2>/dev/null; true")?.contains('1')))
            .await?;
        // However fast the volume is read, it does not end before the deadline.
        let held = StoreHeld::hold()?;
        s.backup_failed("b", "FreezeDeadline").await?;
        drop(held);
        let frozen: u64 = s.shell("app", "cat /tmp/frozen")?.trim().parse()?;
        let thawed: u64 = s.shell("app", "cat /tmp/thawed")?.trim().parse()?;
        ensure!(thawed - frozen <= 3, "frozen for {} s", thawed - frozen);
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
