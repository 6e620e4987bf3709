//! Work on a real cluster waits for its turn, says what for, and is spread over the nodes.
#![cfg(feature = "cluster")]

use std::collections::BTreeSet;
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use lifeboat_crds::Backup;
use lifeboat_crds::backup::VolumeBackupStatus;
use lifeboat_crds::conditions::{ConditionType, get, is_true};
use lifeboat_e2e::scenario::{BUSYBOX, INSTALLED_IN, Scenario, StoreHeld, scenario};
use serde_json::json;

const VOLUMES: usize = 6;
const AT_ONCE: usize = 2;

/// A pod with so many claims.
fn manifest() -> String {
    let (mut all, mut mounts, mut volumes) = (String::new(), String::new(), String::new());
    for number in 0..VOLUMES {
        let claim = "{accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}";
        let _ = writeln!(
            all,
            "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: c{number}}}\nspec: {claim}\n---"
        );
        let _ = write!(mounts, "{{name: c{number}, mountPath: /data/{number}}}, ");
        let _ = write!(volumes, "{{name: c{number}, persistentVolumeClaim: {{claimName: c{number}}}}}, ");
    }
    format!(
        "{all}
apiVersion: v1
kind: Pod
metadata: {{name: app}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {BUSYBOX}
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'while :; do sleep 3600; done']
    volumeMounts: [{mounts}]
  volumes: [{volumes}]
"
    )
}

fn under_way(backup: &Backup) -> Vec<&VolumeBackupStatus> {
    let volumes = backup.status.iter().flat_map(|status| &status.volumes);
    volumes.filter(|volume| volume.dispatched_at.is_some() && volume.snapshot.is_none()).collect()
}

fn waits_for(backup: &Backup) -> Option<&str> {
    let conditions = &backup.status.as_ref()?.conditions;
    let waiting = get(conditions, ConditionType::Waiting)?;
    is_true(conditions, ConditionType::Waiting).then_some(waiting.reason.as_str())
}

#[test]
fn snapshots_wait_for_their_turn_and_are_read_on_several_nodes_also_after_a_restart() {
    scenario("dispatch", async |s: Scenario| {
        s.apply(&manifest())?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        s.shell("app", "for i in 0 1 2 3 4 5; do head -c 5000000 /dev/urandom > /data/$i/file; done; sync")?;
        let limit = json!({"spec": {"limits": {"volumes": AT_ONCE}}}).to_string();
        s.kubectl_cluster(&["patch", "clusterrepository", &s.namespace, "--type=merge", "-p", &limit])?;

        s.start_backup("b", json!({"plan": s.plan()})).await?;
        let cut = |b: &Backup| b.status.as_ref().is_some_and(|status| is_true(&status.conditions, ConditionType::Cut));
        s.wait(&s.namespaced(), "b", "the cut", cut).await?;
        let held = StoreHeld::hold()?;
        let full = |b: &Backup| under_way(b).len() == AT_ONCE && waits_for(b) == Some("RepositoryBusy");
        let waiting = s.wait(&s.namespaced(), "b", "the others to wait", full).await?;
        let unready: Vec<_> = under_way(&waiting).iter().map(|volume| volume.claim.clone()).collect();

        // What goes on is in the object: a new controller begins nothing on top of it.
        s.kubectl_cluster(&["-n", INSTALLED_IN, "rollout", "restart", "deployment/lifeboat-controller"])?;
        s.kubectl_cluster(&[
            "-n",
            INSTALLED_IN,
            "rollout",
            "status",
            "deployment/lifeboat-controller",
            "--timeout=120s",
        ])?;
        let mounted = |b: &Backup| under_way(b).iter().all(|volume| volume.pod.is_some());
        let after = s.wait(&s.namespaced(), "b", "the snapshots to be mounted", mounted).await?;
        let still: Vec<_> = under_way(&after).iter().map(|volume| volume.claim.clone()).collect();
        ensure!(still == unready, "{unready:?} were under way before the restart, {still:?} after it");
        drop(held);

        // A mount goes as soon as it is read, not with all others at the end.
        let is_retired = |b: &Backup| {
            let volumes = || b.status.iter().flat_map(|status| &status.volumes);
            volumes().any(|volume| volume.snapshot.is_some() && volume.pod.is_none())
                && volumes().any(|volume| volume.snapshot.is_none())
        };
        s.wait(&s.namespaced(), "b", "the first mount to go", is_retired).await?;
        let backup = s.backup_succeeded("b").await?;
        let status = backup.status.context("status")?;
        let nodes: BTreeSet<_> = status.volumes.iter().filter_map(|volume| volume.node.clone()).collect();
        ensure!(nodes.len() > 1, "all {VOLUMES} volumes were read on {nodes:?}");
        ensure!(!is_true(&status.conditions, ConditionType::Waiting), "it still says that it waits");
        all_are_whole(&s).await
    });
}

async fn all_are_whole(s: &Scenario) -> Result<()> {
    let sums = "cd /data && sha256sum */file";
    let before = s.shell("app", sums)?;
    s.lose_namespace()?;
    s.restore_newest("r").await?;
    s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
    let after = s.shell("app", sums)?;
    ensure!(before == after, "before:\n{before}after:\n{after}");
    Ok(())
}
