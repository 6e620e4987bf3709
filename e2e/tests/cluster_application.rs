//! Whole applications on a real cluster: what belongs to them outside of their namespace, custom resources before their
//! definitions, replicas on several nodes, shared volumes, and selections by labels, kinds and names.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use lifeboat_crds::Restore;
use lifeboat_crds::conditions::{self, ConditionType};
use lifeboat_e2e::scenario::{BUSYBOX, Scenario, scenario};
use serde_json::json;

/// The account that the scenarios' installation lets Lifeboat act as.
const ACCOUNT: &str = "cluster-operator";

/// What the application has outside of its namespace, under names of the scenario's own.
fn outside(s: &Scenario) -> String {
    let name = &s.namespace;
    format!(
        "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {{name: widgets.{name}.example.com}}
spec:
  group: {name}.example.com
  names: {{kind: Widget, plural: widgets, singular: widget}}
  scope: Namespaced
  versions: [{{name: v1, served: true, storage: true, schema: {{openAPIV3Schema: {{type: object, x-kubernetes-preserve-unknown-fields: true}}}}}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: {name}-reader}}
rules: [{{apiGroups: [''], resources: [nodes], verbs: [get]}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: {name}-reader}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {name}-reader}}
subjects:
- {{kind: ServiceAccount, name: web, namespace: {name}}}
- {{kind: ServiceAccount, name: stranger, namespace: kube-system}}
---
apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {{name: {name}-high}}
value: 1000
globalDefault: false
---
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: {{name: {name}-door}}
spec: {{controller: example.com/door}}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {name}-shared}}
provisioner: tree.csi.test.lifeboat.dev
"
    )
}

/// The kinds and names of [`outside`], as kubectl takes them.
fn outside_names(s: &Scenario) -> Vec<String> {
    let name = &s.namespace;
    vec![
        format!("crd/widgets.{name}.example.com"),
        format!("clusterrolebinding/{name}-reader"),
        format!("clusterrole/{name}-reader"),
        format!("priorityclass/{name}-high"),
        format!("ingressclass/{name}-door"),
        format!("storageclass/{name}-shared"),
    ]
}

fn application(s: &Scenario) -> String {
    let name = &s.namespace;
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata: {{name: web}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: shared}}
spec: {{accessModes: [ReadWriteMany], storageClassName: {name}-shared, resources: {{requests: {{storage: 64Mi}}}}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      serviceAccountName: web
      priorityClassName: {name}-high
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints: [{{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {{matchLabels: {{app: web}}}}}}]
      containers:
      - {{name: main, image: '{BUSYBOX}', imagePullPolicy: IfNotPresent, command: [sleep, '100000'], volumeMounts: [{{name: data, mountPath: /data}}]}}
      volumes: [{{name: data, persistentVolumeClaim: {{claimName: shared}}}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: stateless}}
spec:
  selector: {{matchLabels: {{app: stateless}}}}
  template:
    metadata: {{labels: {{app: stateless}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{{name: main, image: '{BUSYBOX}', imagePullPolicy: IfNotPresent, command: [sleep, '100000']}}]
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{name: web}}
spec: {{ingressClassName: {name}-door, defaultBackend: {{service: {{name: web, port: {{number: 80}}}}}}}}
---
apiVersion: {name}.example.com/v1
kind: Widget
metadata: {{name: one}}
spec: {{colour: blue}}
"
    )
}

/// Rights for the account, bound by the administrator.
fn account(s: &Scenario) -> String {
    let name = &s.namespace;
    format!(
        "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: {name}-account}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}}
subjects: [{{kind: ServiceAccount, name: {ACCOUNT}, namespace: {name}}}]
"
    )
}

fn remove_outside(s: &Scenario) -> Result<()> {
    let binding = format!("clusterrolebinding/{}-account", s.namespace);
    for name in outside_names(s).iter().chain([&binding]) {
        s.kubectl_cluster(&["delete", name, "--ignore-not-found", "--timeout=60s"])?;
    }
    Ok(())
}

async fn restored(s: &Scenario, name: &str, create_as: Option<&str>) -> Result<Restore> {
    let mut spec = json!({"source": {"repository": {"ref": {"name": s.namespace}}}});
    if let Some(account) = create_as {
        spec["clusterResources"] = json!({"createAs": account});
    }
    s.start_restore(name, spec).await?;
    s.restore_finished(name).await
}

fn is_there(s: &Scenario, name: &str) -> Result<bool> {
    Ok(!s.kubectl_cluster(&["get", name, "--ignore-not-found", "-o", "name"])?.is_empty())
}

#[test]
fn an_application_comes_back_with_what_it_needs_outside_of_its_namespace() {
    scenario("whole", async |s: Scenario| {
        remove_outside(&s)?;
        s.kubectl_cluster_with(&["apply", "-f", "-"], &outside(&s))?;
        s.kubectl_cluster(&["wait", "--for=condition=Established", &outside_names(&s)[0], "--timeout=60s"])?;
        s.apply(&application(&s))?;
        for deployment in ["deployment/web", "deployment/stateless"] {
            s.kubectl(&["rollout", "status", deployment, "--timeout=120s"])?;
        }
        s.shell("deploy/web", "echo kept > /data/file; sync")?;
        let backup = s.back_up("all").await?;
        let objects = backup.status.and_then(|status| status.objects).context("objects")?;
        // The six of `outside`, the claim's volume and the namespace.
        ensure!(objects.cluster_scoped == 8, "{objects:?}");

        s.kubectl_cluster(&["delete", "namespace", &s.namespace, "--timeout=150s"])?;
        remove_outside(&s)?;
        s.kubectl_cluster(&["create", "namespace", &s.namespace])?;
        s.kubectl_cluster_with(&["apply", "-f", "-"], &account(&s))?;
        let restore = restored(&s, "back", Some(ACCOUNT)).await?;
        let status = restore.status.context("status")?;
        ensure!(conditions::is_true(&status.conditions, ConditionType::Succeeded), "{:?}", status.conditions);
        ensure!(
            status.cluster_objects.as_ref().is_some_and(|objects| objects.created == 6 && objects.skipped == 0),
            "{status:?}"
        );
        for deployment in ["deployment/web", "deployment/stateless"] {
            s.kubectl(&["rollout", "status", deployment, "--timeout=120s"])?;
        }
        ensure!(s.shell("deploy/web", "cat /data/file")? == "kept\n");
        let widget = format!("widgets.{}.example.com/one", s.namespace);
        ensure!(s.kubectl(&["get", &widget, "-o", "jsonpath={.spec.colour}"])? == "blue");
        let may = |account: &str| {
            let account = format!("--as=system:serviceaccount:{account}");
            s.kubectl_cluster(&["auth", "can-i", "get", "nodes", &account])
        };
        ensure!(may(&format!("{}:web", s.namespace))?.trim() == "yes");
        ensure!(may("kube-system:stranger").is_err(), "the binding gives rights to others again");
        remove_outside(&s)
    });
}

#[test]
fn cluster_scoped_objects_come_back_only_with_an_accounts_rights() {
    scenario("outside", async |s: Scenario| {
        remove_outside(&s)?;
        s.kubectl_cluster_with(&["apply", "-f", "-"], &outside(&s))?;
        s.apply(&format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: web}}\n---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {ACCOUNT}}}\n"
        ))?;
        s.back_up("b").await?;
        let (role, binding) =
            (format!("clusterrole/{}-reader", s.namespace), format!("clusterrolebinding/{}-reader", s.namespace));
        s.kubectl_cluster(&["delete", &role, &binding])?;

        let listed = restored(&s, "listed", None).await?.status.context("status")?;
        let outside = listed.cluster_objects.context("clusterObjects")?;
        ensure!(outside.created == 0 && outside.skipped == 2, "{outside:?}");
        ensure!(outside.problems.iter().any(|p| p.contains("clusterroles") && p.contains("createAs")), "{outside:?}");
        ensure!(listed.conditions.iter().any(|c| c.reason == "CompletedWithProblems"), "{:?}", listed.conditions);
        ensure!(!is_there(&s, &role)? && !is_there(&s, &binding)?, "created with nobody's rights");

        // One that the installation does not name; then one that it names and that has no rights.
        let refused = restored(&s, "unnamed", Some("web")).await?.status.context("status")?;
        ensure!(
            refused.conditions.iter().any(|c| c.type_ == "Succeeded" && c.reason == "ClusterResourcesNotAllowed"),
            "{:?}",
            refused.conditions
        );
        s.start_restore(
            "powerless",
            json!({
                "source": {"backupRef": {"name": "b"}}, "clusterResources": {"createAs": ACCOUNT}
            }),
        )
        .await?;
        let message = s.restore_failed("powerless", "ApplyFailed").await?;
        ensure!(message.contains(ACCOUNT) && message.contains("forbidden"), "{message}");
        ensure!(!is_there(&s, &role)? && !is_there(&s, &binding)?, "created with somebody else's rights");

        // A plan that asks for more than what is related reads it with the account's rights too.
        let mut plan = s.plan();
        plan["scope"] = json!({"clusterResources": {"includeResources": ["clusterroles/view"], "readAs": ACCOUNT}});
        s.start_backup("more", json!({"plan": plan})).await?;
        let (_, message) = s.backup_failed("more", "CaptureFailed").await?;
        ensure!(message.contains("clusterroles") && message.contains("forbidden"), "{message}");
        remove_outside(&s)
    });
}

#[test]
fn a_selection_by_kinds_and_names_covers_these_and_no_others() {
    scenario("names", async |s: Scenario| {
        s.apply(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: two}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: three}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: four}\n",
        )?;
        let mut plan = s.plan();
        plan["scope"] = json!({
            "includeResources": ["configmaps/one", "secrets"], "excludeResources": ["secrets/four"],
            "clusterResources": {"related": false},
        });
        s.start_backup("some", json!({"plan": plan})).await?;
        let objects = s.backup_succeeded("some").await?.status.and_then(|status| status.objects).context("objects")?;
        ensure!((objects.count, objects.cluster_scoped) == (2, 0), "{objects:?}");
        s.kubectl(&["delete", "configmap/one", "configmap/two", "secret/three", "secret/four"])?;
        s.restore_newest("back").await?;
        let found = s.kubectl(&["get", "configmaps,secrets", "-o", "name"])?;
        ensure!(found.contains("configmap/one") && found.contains("secret/three"), "{found}");
        ensure!(!found.contains("configmap/two") && !found.contains("secret/four"), "{found}");
        let mut nothing = s.plan();
        nothing["scope"] = json!({"includeResources": ["configmaps/none"]});
        s.start_backup("nothing", json!({"plan": nothing})).await?;
        s.backup_failed("nothing", "NothingSelected").await?;
        Ok(())
    });
}
