//! The installation itself on a real cluster: the demo store, metrics, one leader.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use lifeboat_e2e::scenario::{INSTALLED_IN, Scenario, run, scenario};

fn chart() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/lifeboat").to_owned()
}

#[test]
fn the_demo_store_gives_a_repository_without_a_bucket() {
    scenario("demo-store", async |s: Scenario| {
        let chart = chart();
        let values = "demoStore.enabled=true,image.pullPolicy=Never,demoStore.storage=1Gi";
        let only = [
            "template",
            "lifeboat",
            &chart,
            "-n",
            INSTALLED_IN,
            "--set",
            values,
            "--show-only",
            "templates/demo-store.yaml",
        ];
        let manifest = run("helm", &only, "")?;
        run("kubectl", &["apply", "-f", "-"], &manifest)?;
        let result = async {
            s.repository_ready("demo").await?;
            s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {colour: blue}\n")?;
            let plan = serde_json::json!({"plan": {"tiers": [{"repository": {"ref": {"name": "demo"}}}]}});
            s.start_backup("b", plan).await?;
            s.backup_succeeded("b").await?;
            s.kubectl(&["delete", "configmap", "settings"])?;
            s.start_restore("r", serde_json::json!({"source": {"backupRef": {"name": "b"}}})).await?;
            s.restore_finished("r").await?;
            ensure!(s.kubectl(&["get", "configmap", "settings", "-o", "jsonpath={.data.colour}"])? == "blue");
            Ok(())
        }
        .await;
        run("kubectl", &["delete", "--wait=false", "-f", "-"], &manifest)?;
        result
    });
}

fn pods(component: &str) -> Result<Vec<String>> {
    let selector = format!("app.kubernetes.io/component={component}");
    let names = run("kubectl", &["-n", INSTALLED_IN, "get", "pods", "-l", &selector, "-o", "name"], "")?;
    Ok(names.lines().map(|name| name.trim_start_matches("pod/").to_owned()).collect())
}

#[test]
fn controller_and_agents_show_metrics_and_one_controller_leads() {
    scenario("metrics", async |_: Scenario| {
        let mut all = pods("controller")?;
        all.extend(pods("agent")?);
        ensure!(all.len() >= 4, "{all:?}");
        for pod in &all {
            let path = format!("/api/v1/namespaces/{INSTALLED_IN}/pods/{pod}:8080/proxy/metrics");
            let metrics = run("kubectl", &["get", "--raw", &path], "").with_context(|| pod.clone())?;
            for name in ["process_resident_memory_bytes", "lifeboat_"] {
                ensure!(metrics.contains(name), "{pod} shows no {name}:\n{metrics}");
            }
        }
        let holder =
            ["-n", INSTALLED_IN, "get", "lease", "lifeboat-controller", "-o", "jsonpath={.spec.holderIdentity}"];
        let holder = run("kubectl", &holder, "")?;
        ensure!(pods("controller")?.contains(&holder), "`{holder}` leads");
        Ok(())
    });
}
