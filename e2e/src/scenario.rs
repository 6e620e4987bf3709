//! Scenarios on the three-node cluster: each in a namespace and with a repository of its own.
//!
//! A scenario waits on conditions, never on time alone, shows the cluster's state when it fails, and leaves nothing
//! behind when it passes.

use std::{
    fmt::Debug,
    future::Future,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, PostParams},
};
use lifeboat_crds::{
    Backup, ClusterRepository, Restore,
    conditions::{self, ConditionType},
};
use serde::{Serialize, de::DeserializeOwned};

/// The namespace that Lifeboat is installed in.
pub const INSTALLED_IN: &str = "lifeboat-system";

/// The password of every scenario's repository.
pub const PASSWORD: &str = "a passphrase for tests";

/// How long a scenario waits for a condition before it fails.
pub const PATIENCE: Duration = Duration::from_mins(3);

/// The small image that scenarios run: busybox.
pub const BUSYBOX: &str = "docker.io/lifeboat-e2e/busybox:1";

/// One scenario's corner of the cluster.
#[derive(Clone)]
pub struct Scenario {
    /// A client with the administrator's rights.
    pub client: Client,
    /// The scenario's namespace; its `ClusterRepository` and bucket have the same name.
    pub namespace: String,
    /// Whether this scenario has killed the API server.
    api_server_was_down: Arc<AtomicBool>,
}

/// Runs `body` in a namespace made from `name`, with a repository of its own that is ready, and cleans up if it passes.
///
/// # Panics
/// When `body` fails, after the state of the namespace and the ends of the programs' logs were printed.
pub fn scenario<F, Fut>(name: &str, body: F)
where
    F: FnOnce(Scenario) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("start a runtime");
    runtime.block_on(async {
        let scenario = Scenario::begin(name).await.expect("set the scenario up");
        let began = Instant::now();
        let ended = body(scenario.clone()).await;
        let was_down = scenario.api_server_was_down.load(Ordering::Relaxed);
        match ended.and_then(|()| no_program_panicked(began.elapsed(), was_down)) {
            Ok(()) => scenario.end().expect("clean the scenario up"),
            Err(error) => {
                scenario.explain();
                panic!("{name}: {error:?}");
            }
        }
    });
}

impl Scenario {
    async fn begin(name: &str) -> Result<Self> {
        // The provider may be installed already by a scenario in the same process.
        let _already = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client =
            Client::try_default().await.context("KUBECONFIG must name the test cluster; run through `make e2e`")?;
        let namespace = format!("e2e-{name}");
        let scenario = Self { client, namespace, api_server_was_down: Arc::default() };
        scenario.remove_leftovers()?;
        let object = Namespace {
            metadata: kube::core::ObjectMeta { name: Some(scenario.namespace.clone()), ..Default::default() },
            ..Default::default()
        };
        Api::<Namespace>::all(scenario.client.clone())
            .create(&PostParams::default(), &object)
            .await
            .context("create the namespace")?;
        // Without it no pod is admitted; who makes it may have lost the API server a moment ago.
        scenario
            .eventually("the namespace's service account", async || {
                Ok(scenario.namespaced::<ServiceAccount>().get_opt("default").await?.is_some())
            })
            .await?;
        launcher(&["s3", "bucket", &scenario.namespace])?;
        run("kubectl", &["apply", "-f", "-"], &scenario.repository_manifest())?;
        scenario.repository_ready(&scenario.namespace).await?;
        Ok(scenario)
    }

    fn remove_leftovers(&self) -> Result<()> {
        self.heal()?;
        self.kubectl_cluster(&["delete", "clusterrepository", &self.namespace, "--ignore-not-found"])?;
        self.kubectl_cluster(&["delete", "namespace", &self.namespace, "--ignore-not-found", "--timeout=120s"])?;
        launcher(&["s3", "remove-bucket", &self.namespace])?;
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.remove_leftovers()
    }

    /// Secrets and `ClusterRepository` of this scenario: bucket and name are the namespace's, every namespace is allowed.
    pub fn repository_manifest(&self) -> String {
        let (endpoint, key, secret) = store();
        let name = &self.namespace;
        format!(
            "apiVersion: v1
kind: Secret
metadata: {{name: {name}-bucket, namespace: {INSTALLED_IN}}}
stringData: {{AWS_ACCESS_KEY_ID: '{key}', AWS_SECRET_ACCESS_KEY: '{secret}'}}
---
apiVersion: v1
kind: Secret
metadata: {{name: {name}-key, namespace: {INSTALLED_IN}}}
stringData: {{password: '{PASSWORD}'}}
---
apiVersion: lifeboat.dev/v1alpha1
kind: ClusterRepository
metadata: {{name: {name}}}
spec:
  backend:
    s3: {{bucket: {name}, endpoint: '{endpoint}', credentials: {{secretRef: {{name: {name}-bucket}}}}}}
  encryption: {{secretRef: {{name: {name}-key}}}}
  allowedNamespaces: {{from: All}}
"
        )
    }

    /// Waits until a `ClusterRepository` is ready.
    pub async fn repository_ready(&self, name: &str) -> Result<()> {
        let api: Api<ClusterRepository> = Api::all(self.client.clone());
        self.wait(&api, name, "Ready", |r| {
            r.status.as_ref().is_some_and(|s| conditions::is_true(&s.conditions, ConditionType::Ready))
        })
        .await
        .map(|_| ())
    }

    /// Waits until a `ClusterRepository` is not ready for `reason`; returns the condition's message.
    pub async fn repository_refused(&self, name: &str, reason: &str) -> Result<String> {
        let api: Api<ClusterRepository> = Api::all(self.client.clone());
        let found = self
            .wait(&api, name, reason, |r| {
                r.status
                    .as_ref()
                    .and_then(|s| conditions::get(&s.conditions, ConditionType::Ready))
                    .is_some_and(|c| c.status == "False" && c.reason == reason)
            })
            .await?;
        let status = found.status.context("status")?;
        Ok(conditions::get(&status.conditions, ConditionType::Ready).context("Ready")?.message.clone())
    }

    /// Applies manifests to the scenario's namespace.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.kubectl_with(&["apply", "-f", "-"], manifests).map(|_| ())
    }

    /// Runs kubectl in the scenario's namespace; returns its standard output.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// Runs kubectl without a namespace.
    pub fn kubectl_cluster(&self, arguments: &[&str]) -> Result<String> {
        run("kubectl", arguments, "")
    }

    /// As [`Scenario::kubectl_cluster`], with standard input.
    pub fn kubectl_cluster_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        run("kubectl", arguments, input)
    }

    fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut all = vec!["-n", &self.namespace];
        all.extend(arguments);
        run("kubectl", &all, input)
    }

    /// Runs a shell command in a pod; returns its standard output.
    pub fn shell(&self, pod: &str, command: &str) -> Result<String> {
        self.kubectl(&["exec", pod, "--", "sh", "-c", command])
    }

    /// Runs the program `lifeboat` where the store is, outside the nodes, with the location and the password of the scenario's
    /// repository and nothing else; returns its standard output.
    pub fn lifeboat(&self, arguments: &[&str]) -> Result<String> {
        let (endpoint, key, secret) = store();
        let environment = [
            format!("LIFEBOAT_REPOSITORY=s3://{}?endpoint={endpoint}", self.namespace),
            format!("LIFEBOAT_PASSWORD={PASSWORD}"),
            format!("AWS_ACCESS_KEY_ID={key}"),
            format!("AWS_SECRET_ACCESS_KEY={secret}"),
        ];
        let program = std::env::var("LIFEBOAT_PROGRAM").context("LIFEBOAT_PROGRAM; run through `make e2e`")?;
        let mut all = vec!["outside", "env"];
        all.extend(environment.iter().map(String::as_str));
        all.push(&program);
        all.extend(arguments);
        launcher(&all)
    }

    /// Creates a `Backup` without waiting.
    pub async fn start_backup(&self, name: &str, spec: serde_json::Value) -> Result<()> {
        let backup = Backup::new(name, serde_json::from_value(spec)?);
        self.namespaced::<Backup>().create(&PostParams::default(), &backup).await?;
        Ok(())
    }

    /// A plan that backs up the whole namespace to the scenario's repository.
    pub fn plan(&self) -> serde_json::Value {
        serde_json::json!({"tiers": [{"repository": {"ref": {"name": self.namespace}}}]})
    }

    /// As [`Self::plan`], but volumes are read from the mounts of running pods, whatever snapshots their driver has.
    pub fn live_plan(&self) -> serde_json::Value {
        let mut plan = self.plan();
        plan["volumes"] = serde_json::json!([{"method": "Live"}]);
        plan
    }

    /// Backs up with the scenario's plan and waits until it has succeeded.
    pub async fn back_up(&self, name: &str) -> Result<Backup> {
        self.start_backup(name, serde_json::json!({"plan": self.plan()})).await?;
        self.backup_succeeded(name).await
    }

    /// Waits until a backup has succeeded; fails as soon as it has failed.
    pub async fn backup_succeeded(&self, name: &str) -> Result<Backup> {
        let backup = self.backup_finished(name).await?;
        let conditions = &backup.status.as_ref().context("status")?.conditions;
        ensure!(
            conditions::is_true(conditions, ConditionType::Succeeded),
            "backup {name} did not succeed: {conditions:?}"
        );
        Ok(backup)
    }

    /// Waits until a backup has failed for `reason`; returns it and the message.
    pub async fn backup_failed(&self, name: &str, reason: &str) -> Result<(Backup, String)> {
        let backup = self.backup_finished(name).await?;
        let condition =
            conditions::get(&backup.status.as_ref().context("status")?.conditions, ConditionType::Succeeded)
                .context("Succeeded")?
                .clone();
        ensure!(
            condition.status == "False" && condition.reason == reason,
            "expected Succeeded=False for {reason}, found {condition:?}"
        );
        Ok((backup, condition.message))
    }

    /// Waits until a backup has ended.
    pub async fn backup_finished(&self, name: &str) -> Result<Backup> {
        self.wait(&self.namespaced(), name, "the end of the backup", |b: &Backup| {
            b.status.as_ref().is_some_and(|s| conditions::is_finished(&s.conditions))
        })
        .await
    }

    /// Restores the newest recovery point of the namespace and waits until that has succeeded.
    pub async fn restore_newest(&self, name: &str) -> Result<Restore> {
        self.start_restore(name, serde_json::json!({"source": {"repository": {"ref": {"name": self.namespace}}}}))
            .await?;
        let restore = self.restore_finished(name).await?;
        let conditions = &restore.status.as_ref().context("status")?.conditions;
        ensure!(
            conditions::is_true(conditions, ConditionType::Succeeded),
            "restore {name} did not succeed: {conditions:?}"
        );
        Ok(restore)
    }

    /// Creates a `Restore` without waiting.
    pub async fn start_restore(&self, name: &str, spec: serde_json::Value) -> Result<()> {
        let restore = Restore::new(name, serde_json::from_value(spec)?);
        self.namespaced::<Restore>().create(&PostParams::default(), &restore).await?;
        Ok(())
    }

    /// Waits until a restore has ended.
    pub async fn restore_finished(&self, name: &str) -> Result<Restore> {
        self.wait(&self.namespaced(), name, "the end of the restore", |r: &Restore| {
            r.status.as_ref().is_some_and(|s| conditions::is_finished(&s.conditions))
        })
        .await
    }

    /// Waits until a restore has failed for `reason`; returns the message.
    pub async fn restore_failed(&self, name: &str, reason: &str) -> Result<String> {
        let restore = self.restore_finished(name).await?;
        let condition =
            conditions::get(&restore.status.as_ref().context("status")?.conditions, ConditionType::Succeeded)
                .context("Succeeded")?
                .clone();
        ensure!(
            condition.status == "False" && condition.reason == reason,
            "expected Succeeded=False for {reason}, found {condition:?}"
        );
        Ok(condition.message)
    }

    /// The API of a kind in the scenario's namespace.
    pub fn namespaced<K>(&self) -> Api<K>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Waits until an object is as wanted.
    pub async fn wait<K>(&self, api: &Api<K>, name: &str, what: &str, wanted: impl Fn(&K) -> bool) -> Result<K>
    where
        K: Clone + Debug + DeserializeOwned + Serialize + Resource,
    {
        let end = Instant::now() + PATIENCE;
        loop {
            let found = api.get_opt(name).await?;
            if let Some(object) = &found
                && wanted(object)
            {
                return Ok(object.clone());
            }
            if Instant::now() > end {
                bail!("{name}: waited {PATIENCE:?} for {what}; found {}", serde_json::to_string_pretty(&found)?);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until `holds` returns true.
    pub async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !holds().await? {
            if Instant::now() > end {
                bail!("waited {PATIENCE:?} for {what}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// A pod `NAME` that sleeps, with a claim `NAME-data` mounted at `/data`, and waits until it runs.
    pub fn sleeper(&self, name: &str) -> Result<()> {
        self.apply(&sleeper_manifest(name))?;
        self.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{name}"), "--timeout=120s"]).map(|_| ())
    }

    /// Deletes the namespace, waits until it is gone, and makes it anew, empty.
    pub fn lose_namespace(&self) -> Result<()> {
        self.kubectl_cluster(&["delete", "namespace", &self.namespace, "--timeout=150s"])?;
        self.kubectl_cluster(&["create", "namespace", &self.namespace]).map(|_| ())
    }

    /// What goes wrong in the CSI drivers from now on, as `CreateSnapshot fail=2`, for this scenario's volumes alone; until
    /// [`Scenario::heal`] or the end of the scenario. `e2e/csi-driver/README.md` has the words.
    pub fn fault(&self, line: &str) -> Result<()> {
        let claim = self.fault_of_its_claims();
        let words: Vec<_> = std::iter::once("fault").chain(line.split_whitespace()).chain([claim.as_str()]).collect();
        launcher(&words).map(|_| ())
    }

    /// Nothing goes wrong for this scenario's volumes any more.
    pub fn heal(&self) -> Result<()> {
        launcher(&["fault", "clear", &self.fault_of_its_claims()]).map(|_| ())
    }

    fn fault_of_its_claims(&self) -> String {
        format!("claim={}", self.namespace)
    }

    /// The names of Lifeboat's own objects that speak of this namespace and should be gone when nothing runs.
    pub async fn leftovers(&self) -> Result<Vec<String>> {
        let tasks = Api::<lifeboat_crds::VolumeTask>::namespaced(self.client.clone(), INSTALLED_IN)
            .list(&kube::api::ListParams::default())
            .await?;
        let mut names: Vec<String> = tasks
            .iter()
            .filter(|t| t.spec.namespace() == Some(self.namespace.as_str()))
            .map(|t| format!("task {}", t.name_any()))
            .collect();
        let pods = self.kubectl(&["get", "pods", "-l", "app.kubernetes.io/managed-by=lifeboat", "-o", "name"])?;
        names.extend(pods.lines().map(str::to_owned));
        Ok(names)
    }

    /// Kills the API server: nobody can be told anything until the answer is dropped.
    pub fn kill_api_server(&self) -> Result<ApiServerDead> {
        self.api_server_was_down.store(true, Ordering::Relaxed);
        launcher(&["kill", "apiserver"])?;
        Ok(ApiServerDead)
    }

    /// Waits until the API server answers.
    pub async fn api_server_answers(&self) -> Result<()> {
        self.eventually("the API server", async || Ok(self.client.apiserver_version().await.is_ok())).await
    }

    /// Deletes an object and waits until it is gone.
    pub async fn delete<K>(&self, api: &Api<K>, name: &str) -> Result<()>
    where
        K: Clone + Debug + DeserializeOwned + Resource,
    {
        api.delete(name, &DeleteParams::default()).await?;
        self.eventually("the object to be gone", async || Ok(api.get_opt(name).await?.is_none())).await
    }

    fn explain(&self) {
        let show = |arguments: &[&str]| {
            println!("--- kubectl {}", arguments.join(" "));
            match Command::new("kubectl").args(arguments).output() {
                Ok(output) => {
                    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                }
                Err(error) => println!("{error}"),
            }
        };
        let namespace = self.namespace.as_str();
        show(&["-n", namespace, "get", "all,pvc,backuppolicies,backups,restores", "-o", "wide"]);
        show(&["-n", namespace, "get", "backups,restores", "-o", "yaml"]);
        show(&["-n", namespace, "get", "events", "--sort-by=.lastTimestamp"]);
        show(&["-n", INSTALLED_IN, "get", "pods,volumetasks", "-o", "wide"]);
        show(&["-n", INSTALLED_IN, "logs", "deployment/lifeboat-controller", "--tail=60"]);
        show(&["-n", INSTALLED_IN, "logs", "daemonset/lifeboat-agent", "--tail=40", "--all-pods=true", "--prefix"]);
    }
}

/// Fails when a log of the last `span` has a panic or an error of a kind that our programs never write knowingly. The client
/// library says one of every call while the API server is down.
fn no_program_panicked(span: Duration, api_server_was_down: bool) -> Result<()> {
    // What the scenario killed is back first: a container that only starts has no log.
    for workload in ["deployment/lifeboat-controller", "daemonset/lifeboat-agent"] {
        run("kubectl", &["-n", INSTALLED_IN, "rollout", "status", workload, "--timeout=120s"], "")?;
    }
    let since = format!("--since={}s", span.as_secs() + 1);
    let selector = "app.kubernetes.io/name=lifeboat";
    let all = ["-n", INSTALLED_IN, "logs", "-l", selector, &since, "--tail=-1", "--prefix", "--max-log-requests=20"];
    let logs = run("kubectl", &all, "")?;
    let is_expected = |line: &str| api_server_was_down && line.contains("\"target\":\"kube_client::");
    let is_error = |line: &str| line.contains("\"level\":\"ERROR\"") && !is_expected(line);
    let bad: Vec<_> = logs.lines().filter(|line| line.contains("panicked at") || is_error(line)).collect();
    ensure!(bad.is_empty(), "our programs said:\n{}", bad.join("\n"));
    Ok(())
}

/// A pod that sleeps, with a claim at `/data`.
pub fn sleeper_manifest(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}-data, labels: {{app: {name}}}}}
spec: {{accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 1Gi}}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {BUSYBOX}
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'while :; do sleep 3600; done']
    volumeMounts: [{{name: data, mountPath: /data}}]
  volumes: [{{name: data, persistentVolumeClaim: {{claimName: {name}-data}}}}]
"
    )
}

/// Endpoint, access key and secret key of the S3 server outside the nodes, as the launcher's environment file gives them.
pub fn store() -> (String, String, String) {
    let read = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run through `make e2e`"));
    (read("REPOSITORY_ENDPOINT"), read("AWS_ACCESS_KEY_ID"), read("AWS_SECRET_ACCESS_KEY"))
}

/// The object store answers nobody until this is dropped.
#[must_use]
pub struct StoreHeld;

impl StoreHeld {
    /// Holds it.
    pub fn hold() -> Result<Self> {
        launcher(&["pause", "s3"])?;
        Ok(Self)
    }
}

impl Drop for StoreHeld {
    fn drop(&mut self) {
        if let Err(error) = launcher(&["resume", "s3"]) {
            println!("the object store is still held: {error:#}");
        }
    }
}

/// The API server is dead; started again when this is dropped.
#[must_use]
pub struct ApiServerDead;

impl Drop for ApiServerDead {
    fn drop(&mut self) {
        if let Err(error) = launcher(&["start", "apiserver"]) {
            println!("the API server is still dead: {error:#}");
        }
    }
}

/// Runs a verb of the cluster launcher; returns its standard output.
pub fn launcher(arguments: &[&str]) -> Result<String> {
    let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("cluster/cluster");
    run(&program.to_string_lossy(), arguments, "")
}

/// Runs a program to its end; fails with what it said when it fails.
pub fn run(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let output = run_raw(program, arguments, input)?;
    if !output.status.success() {
        return Err(anyhow!(
            "{program} {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program to its end, whatever comes of it.
pub fn run_raw(program: &str, arguments: &[&str], input: &str) -> Result<Output> {
    use std::io::Write;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    child.stdin.take().context("standard input")?.write_all(input.as_bytes())?;
    child.wait_with_output().with_context(|| format!("wait for {program}"))
}
