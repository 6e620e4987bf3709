//! Prints the CRD manifests; `cargo xtask codegen` writes them into the chart.
#![allow(clippy::print_stdout)]

use std::error::Error;

use kube::CustomResourceExt;
use lifeboat_crds::{Backup, BackupPolicy, ClusterRepository, QuiesceLease, QuiesceTemplate, Restore, VolumeTask};

fn main() -> Result<(), Box<dyn Error>> {
    let kinds = [
        ClusterRepository::crd(),
        BackupPolicy::crd(),
        Backup::crd(),
        Restore::crd(),
        VolumeTask::crd(),
        QuiesceTemplate::crd(),
        QuiesceLease::crd(),
    ];
    for crd in kinds {
        // By way of JSON, so that the order of keys is the same in every run.
        let value = serde_json::to_value(&crd)?;
        println!("---\n{}", serde_yaml::to_string(&value)?.trim_end());
    }
    Ok(())
}
