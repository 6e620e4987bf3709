//! The chart: linted, its values checked by the schema, and everything that it renders accepted by a real API server.
#![cfg(feature = "api")]

use anyhow::{Context, Result, ensure};
use lifeboat_crds::quiesce_template::{QuiesceTemplate, fill};
use lifeboat_e2e::api_server::{ApiServer, repository_root};
use lifeboat_e2e::scenario::{run, run_raw};
use serde_json::json;

fn chart() -> String {
    repository_root().join("charts/lifeboat").to_string_lossy().into_owned()
}

fn render(values: &[&str]) -> Result<String> {
    let chart = chart();
    let mut arguments = vec!["template", "lifeboat", &chart, "--namespace", "lifeboat-system"];
    for value in values {
        arguments.extend(["--set-json", value]);
    }
    run("helm", &arguments, "")
}

#[test]
fn the_chart_is_linted() -> Result<()> {
    let said = run("helm", &["lint", "--strict", &chart()], "")?;
    ensure!(said.contains("1 chart(s) linted, 0 chart(s) failed"), "{said}");
    Ok(())
}

#[test]
fn wrong_values_are_refused_by_name() -> Result<()> {
    let chart = chart();
    for (value, says) in [
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("agent.maxTasks=0", "maxTasks"),
        ("controller.replicas=9", "replicas"),
        ("contoller.replicas=1", "contoller"),
        ("demoStore.bucket=UPPER", "bucket"),
        ("agent.kubeletDir=relative", "kubeletDir"),
        ("clusterResources.serviceAccounts={Not_A_Name}", "serviceAccounts"),
        ("guardian.criSocket=containerd.sock", "criSocket"),
        ("guardian.blockDevices=perhaps", "blockDevices"),
    ] {
        let output = run_raw("helm", &["template", "x", &chart, "--set", value], "")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(says), "{value}: {said}");
    }
    Ok(())
}

#[test]
fn everything_that_is_rendered_is_accepted() -> Result<()> {
    let server = ApiServer::start()?;
    server.kubectl(&["create", "namespace", "lifeboat-system"], "")?;
    let nfs = r#"filesystemRepositories=[{"name":"nas","mountPath":"/repositories/nas","volume":{"nfs":{"server":"nas","path":"/x"}}}]"#;
    for values in [vec![], vec!["demoStore.enabled=true"], vec![nfs, "controller.replicas=2"]] {
        let rendered = render(&values)?;
        server
            .kubectl(&["apply", "--server-side", "--dry-run=server", "-f", "-"], &rendered)
            .with_context(|| format!("{values:?}"))?;
    }
    let monitored = render(&["serviceMonitor.enabled=true"])?;
    ensure!(monitored.contains("kind: ServiceMonitor"), "no ServiceMonitor");
    Ok(())
}

#[test]
fn pods_are_as_restricted_as_they_can_be() -> Result<()> {
    let rendered = render(&[])?;
    let pods: Vec<_> = rendered
        .split("\n---")
        .filter(|document| document.contains("kind: Deployment") || document.contains("kind: DaemonSet"))
        .collect();
    ensure!(pods.len() == 2, "{} workloads", pods.len());
    for pod in pods {
        for wanted in [
            "allowPrivilegeEscalation: false",
            "readOnlyRootFilesystem: true",
            "drop: [ALL]",
            "seccompProfile: {type: RuntimeDefault}",
            "memory: ",
        ] {
            ensure!(pod.contains(wanted), "{wanted} is missing in\n{pod}");
        }
        ensure!(!pod.contains("hostNetwork") && !pod.contains("hostPID"), "{pod}");
    }
    // The container that has the runtime's socket anyway, and none where nothing needs it.
    let privileged: Vec<_> = rendered.split("- name: ").filter(|part| part.contains("privileged: true")).collect();
    ensure!(privileged.len() == 1 && privileged.iter().all(|part| part.starts_with("guardian\n")), "{privileged:?}");
    let without = render(&["guardian.blockDevices=false"])?;
    ensure!(!without.contains("privileged: true") && !without.contains("/host/dev"), "{without}");
    Ok(())
}

/// Whether a service account of Lifeboat may do something. `what` is `resource.group` or `resource.group/subresource`.
///
/// Asked of the server itself: `kubectl auth can-i` reads the group wrongly when the server does not have the kind.
fn may(server: &ApiServer, who: &str, verb: &str, what: &str, namespace: &str) -> Result<bool> {
    let (kind, subresource) = what.split_once('/').unwrap_or((what, ""));
    let (resource, group) = kind.split_once('.').unwrap_or((kind, ""));
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:lifeboat-system:{who}"),
            "groups": ["system:serviceaccounts", "system:serviceaccounts:lifeboat-system", "system:authenticated"],
            "resourceAttributes": {
                "namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": subresource,
            },
        },
    });
    let allowed = server.kubectl(&["create", "-f", "-", "-o", "jsonpath={.status.allowed}"], &review.to_string())?;
    Ok(allowed == "true")
}

#[test]
fn cluster_scoped_objects_need_an_account_that_the_installation_names() -> Result<()> {
    let server = ApiServer::start()?;
    server.kubectl(&["create", "namespace", "lifeboat-system"], "")?;
    let allowed = render(&[r#"clusterResources.serviceAccounts=["cluster-operator"]"#])?;
    server.kubectl(&["apply", "--server-side", "-f", "-"], &allowed)?;
    let acts_as = |account: &str| {
        let config = format!("--kubeconfig={}", server.kubeconfig_path());
        let who = "--as=system:serviceaccount:lifeboat-system:lifeboat-controller";
        let what = format!("serviceaccounts/{account}");
        let arguments = [&config, who, "-n", "default", "auth", "can-i", "impersonate", &what];
        run_raw("kubectl", &arguments, "").map(|output| output.status.success())
    };
    ensure!(acts_as("cluster-operator")?, "the account that the value names cannot be used");
    ensure!(!acts_as("default")? && !acts_as("namespace-controller")?, "other accounts can be used");
    ensure!(!may(&server, "lifeboat-agent", "impersonate", "serviceaccounts", "default")?);
    Ok(())
}

#[test]
fn the_agent_cannot_read_what_tenants_own() -> Result<()> {
    let server = ApiServer::start()?;
    server.kubectl(&["create", "namespace", "lifeboat-system"], "")?;
    server.kubectl(&["apply", "--server-side", "-f", "-"], &render(&[])?)?;
    let may = |who: &str, verb: &str, what: &str, namespace: &str| may(&server, who, verb, what, namespace);
    let (agent, controller) = ("lifeboat-agent", "lifeboat-controller");
    for (who, verb, what, namespace, allowed) in [
        (agent, "get", "secrets", "lifeboat-system", true),
        (agent, "get", "secrets", "default", false),
        (agent, "list", "secrets", "lifeboat-system", false),
        (agent, "patch", "volumetasks.lifeboat.dev/status", "lifeboat-system", true),
        (agent, "create", "volumetasks.lifeboat.dev", "lifeboat-system", false),
        (agent, "patch", "quiesceleases.lifeboat.dev/status", "lifeboat-system", true),
        (agent, "create", "quiesceleases.lifeboat.dev", "lifeboat-system", false),
        (agent, "patch", "quiesceleases.lifeboat.dev", "lifeboat-system", false),
        (agent, "get", "pods", "default", false),
        (controller, "list", "secrets", "default", true),
        (controller, "create", "pods/exec", "default", true),
        (controller, "delete", "persistentvolumeclaims", "default", false),
        (controller, "delete", "persistentvolumeclaims", "lifeboat-system", true),
        (controller, "delete", "volumesnapshots.snapshot.storage.k8s.io", "default", true),
        (controller, "delete", "volumesnapshotclasses.snapshot.storage.k8s.io", "default", false),
        (controller, "delete", "secrets", "default", false),
        (controller, "delete", "namespaces", "default", false),
        (controller, "escalate", "roles.rbac.authorization.k8s.io", "default", true),
        (controller, "escalate", "clusterroles.rbac.authorization.k8s.io", "default", false),
        (controller, "impersonate", "serviceaccounts", "default", false),
        (controller, "impersonate", "users", "default", false),
    ] {
        ensure!(may(who, verb, what, namespace)? == allowed, "{who} {verb} {what} in {namespace}: expected {allowed}");
    }
    Ok(())
}

#[test]
fn shipped_templates_use_their_own_parameters_and_no_others() -> Result<()> {
    let folder = repository_root().join("charts/lifeboat/quiesce-templates");
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let template: QuiesceTemplate = serde_yaml::from_str(&std::fs::read_to_string(&path)?)?;
        let spec = template.spec;
        let mut values: std::collections::BTreeMap<_, _> =
            spec.parameters.iter().map(|parameter| (parameter.name.clone(), String::new())).collect();
        values.insert("maxFreezeMillis".to_owned(), String::new());
        let pair = spec.exec.unwrap_or_default();
        for command in [spec.hold.map(|hold| hold.command), pair.freeze, pair.thaw].into_iter().flatten() {
            fill(&command, &values).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}
