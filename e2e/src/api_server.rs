//! A real etcd and kube-apiserver alone, with Lifeboat's CRDs, for tests of schemas and CEL rules.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::scenario::{launcher, run, run_raw};

/// An API server that is removed when it is dropped.
pub struct ApiServer {
    folder: tempfile::TempDir,
}

/// The root of the repository.
pub fn repository_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

impl ApiServer {
    /// Starts one and installs the CRDs of the chart.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let server = Self { folder };
        launcher(&["api", "up", &server.path()])?;
        let crds = repository_root().join("charts/lifeboat/crds");
        server.kubectl(&["apply", "--server-side", "-f", &crds.to_string_lossy()], "")?;
        server.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"], "")?;
        Ok(server)
    }

    fn path(&self) -> String {
        self.folder.path().join("server").to_string_lossy().into_owned()
    }

    fn kubeconfig(&self) -> String {
        format!("--kubeconfig={}/admin.kubeconfig", self.path())
    }

    /// The path of the kubeconfig.
    pub fn kubeconfig_path(&self) -> String {
        format!("{}/admin.kubeconfig", self.path())
    }

    /// Runs kubectl; returns its standard output.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let config = self.kubeconfig();
        let mut all = vec![config.as_str()];
        all.extend(arguments);
        run("kubectl", &all, input)
    }

    /// Applies a manifest that must be refused; returns what the API server says.
    pub fn refusal(&self, manifest: &str) -> Result<String> {
        let config = self.kubeconfig();
        let output = run_raw("kubectl", &[&config, "apply", "--server-side", "-f", "-"], manifest)?;
        ensure!(!output.status.success(), "this was accepted:\n{manifest}");
        String::from_utf8(output.stderr).context("the refusal is no text")
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Err(error) = launcher(&["api", "down", &self.path()]) {
            println!("the API server was not removed: {error:#}");
        }
    }
}
