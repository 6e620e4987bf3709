//! Bad manifests, each refused by a real API server with a sentence that tells what to write; good ones, accepted.
#![cfg(feature = "api")]

use anyhow::{Context, Result, ensure};
use lifeboat_e2e::api_server::{ApiServer, repository_root};

/// A manifest of a kind: the spec as YAML in one line.
fn manifest(kind: &str, spec: &str) -> String {
    let namespace = if matches!(kind, "ClusterRepository" | "QuiesceTemplate") { "" } else { ", namespace: default" };
    format!("apiVersion: lifeboat.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: test{namespace}}}\nspec: {spec}\n")
}

const S3: &str = "s3: {bucket: backups, credentials: {secretRef: {name: c}}}";
const TIERS: &str = "tiers: [{repository: {ref: {name: main}}}]";

/// Kind, spec, and what the refusal must say.
type Refused = Vec<(&'static str, String, &'static str)>;

fn policy(more: &str) -> String {
    format!("{{{TIERS}{more}}}")
}

fn refused_repositories() -> Refused {
    let repository =
        |backend: &str, more: &str| format!("{{backend: {{{backend}}}, encryption: {{secretRef: {{name: k}}}}{more}}}");
    vec![
        ("ClusterRepository", repository("", ""), "spec.backend.s3: Required value"),
        (
            "ClusterRepository",
            repository(&format!("{S3}, filesystem: {{path: /x}}"), ""),
            "exactly one of backend.s3 and backend.filesystem",
        ),
        ("ClusterRepository", repository("filesystem: {path: relative}", ""), "path must be absolute"),
        ("ClusterRepository", repository("filesystem: {path: /a/../b}", ""), "must not contain .."),
        (
            "ClusterRepository",
            repository("s3: {bucket: Bad_Name, credentials: {secretRef: {name: c}}}", ""),
            "backend.s3.bucket",
        ),
        (
            "ClusterRepository",
            repository("s3: {bucket: backups, endpoint: 'ftp://x', credentials: {secretRef: {name: c}}}", ""),
            "must begin with https:// or http://",
        ),
        (
            "ClusterRepository",
            repository("s3: {bucket: backups, prefix: /x/, credentials: {secretRef: {name: c}}}", ""),
            "backend.s3.prefix",
        ),
        ("ClusterRepository", repository("s3: {bucket: backups}", ""), "credentials"),
        (
            "ClusterRepository",
            repository(S3, ", allowedNamespaces: {from: Selector}"),
            "if and only if allowedNamespaces.from is Selector",
        ),
        (
            "ClusterRepository",
            repository(S3, ", allowedNamespaces: {from: All, selector: {}}"),
            "if and only if allowedNamespaces.from is Selector",
        ),
        ("ClusterRepository", repository(S3, ", mode: WriteOnly"), "mode"),
        ("ClusterRepository", format!("{{backend: {{{S3}}}}}"), "encryption"),
        ("ClusterRepository", repository(S3, ", limits: {volumes: 0}"), "limits.volumes"),
        ("ClusterRepository", repository(S3, ", maintenance: {cron: nightly}"), "cron must have five fields"),
    ]
}

fn refused_policies() -> Refused {
    vec![
        ("BackupPolicy", "{}".to_owned(), "tiers"),
        ("BackupPolicy", "{tiers: []}".to_owned(), "tiers"),
        ("BackupPolicy", "{tiers: [{repository: {ref: {name: ''}}}]}".to_owned(), "tiers[0].repository.ref.name"),
        ("BackupPolicy", policy(", schedule: {cron: 'every day'}"), "cron must have five fields"),
        ("BackupPolicy", policy(", schedule: {cron: '0 0 3 * * *'}"), "cron must have five fields"),
        ("BackupPolicy", policy(", schedule: {cron: '0 3 * * *', jitter: soon}"), "schedule.jitter"),
        ("BackupPolicy", policy(", schedule: {cron: '0 3 * * *', startingDeadline: 5}"), "startingDeadline"),
        ("BackupPolicy", policy(", schedule: {cron: '0 3 * * *', concurrency: Allow}"), "concurrency"),
        (
            "BackupPolicy",
            policy(", scope: {includeResources: [secrets], excludeResources: [secrets]}"),
            "in both includeResources and excludeResources",
        ),
        ("BackupPolicy", policy(", scope: {includeResources: []}"), "includeResources"),
        (
            "BackupPolicy",
            policy(", scope: {clusterResources: {includeResources: [clusterroles]}}"),
            "write clusterResources.includeResources and clusterResources.readAs together",
        ),
        ("BackupPolicy", policy(", scope: {clusterResources: {readAs: reader}}"), "clusterResources.readAs together"),
        (
            "BackupPolicy",
            policy(", scope: {clusterResources: {selector: {}}}"),
            "clusterResources.selector selects among clusterResources.includeResources",
        ),
        ("BackupPolicy", policy(", volumes: [{match: {}, method: Copy}]"), "method"),
        ("BackupPolicy", policy(", retention: {keepLast: 3}"), "retention"),
        (
            "BackupPolicy",
            "{tiers: [{repository: {ref: {name: main}, keep: {}}}]}".to_owned(),
            "write at least one of last, hourly, daily",
        ),
        (
            "BackupPolicy",
            "{tiers: [{repository: {ref: {name: main}, keep: {last: 0}}}]}".to_owned(),
            "repository.keep.last",
        ),
        (
            "BackupPolicy",
            "{tiers: [{snapshot: {keep: {last: 1}}}]}".to_owned(),
            "write exactly one tier with repository",
        ),
        (
            "BackupPolicy",
            policy(", volumes: [{match: {}, method: Live, readyWithin: 5m}]"),
            "snapshotClass and readyWithin belong to the methods Snapshot and Group",
        ),
        ("BackupPolicy", policy(", volumes: [{match: {}, method: Snapshot, readyWithin: 0s}]"), "longer than zero"),
    ]
}

fn refused_streams() -> Refused {
    let streams = |all: &str| policy(&format!(", streams: [{all}]"));
    let stream = |more: &str| streams(&format!("{{selector: {{}}, {more}}}"));
    vec![
        ("BackupPolicy", stream("name: a.sql"), "streams[0].command"),
        ("BackupPolicy", stream("name: a.sql, command: []"), "streams[0].command"),
        ("BackupPolicy", stream("name: a.sql, command: ['']"), "the first word of a command is its program"),
        ("BackupPolicy", stream("command: [a]"), "streams[0].name"),
        ("BackupPolicy", streams("{name: a.sql, command: [a]}"), "streams[0].selector"),
        ("BackupPolicy", stream("name: a/b, command: [a]"), "streams[0].name"),
        ("BackupPolicy", stream("name: .., command: [a]"), "streams[0].name"),
        ("BackupPolicy", stream("name: A.sql, command: [a]"), "streams[0].name"),
        ("BackupPolicy", stream("name: a.sql, command: [a], timeout: 0m"), "timeout must be longer than zero"),
        ("BackupPolicy", stream("name: a.sql, command: [a], timeout: soon"), "timeout"),
        ("BackupPolicy", stream("name: a.sql, command: [a], restore: {}"), "restore.command"),
        ("BackupPolicy", stream("name: a.sql, command: [a], restore: {command: []}"), "restore.command"),
        ("BackupPolicy", stream("name: a.sql, command: [a], restore: {command: [b], timeout: 0s}"), "longer than zero"),
        ("BackupPolicy", stream("name: a.sql, command: [a], onFailure: Continue"), "onFailure"),
        (
            "BackupPolicy",
            streams("{name: a.sql, selector: {}, command: [a]}, {name: a.sql, selector: {}, command: [b]}"),
            "every stream needs a name of its own",
        ),
        ("Restore", "{source: {backupRef: {name: b}}, streams: Maybe}".to_owned(), "streams"),
    ]
}

fn refused_quiescing() -> Refused {
    let quiesce = |step: &str, more: &str| policy(&format!(", quiesce: {{steps: [{step}]{more}}}"));
    let step = "{selector: {}, exec: {freeze: [a]}}";
    vec![
        ("BackupPolicy", quiesce("{selector: {}, exec: {}}", ""), "write exec.freeze, exec.thaw or both"),
        ("BackupPolicy", quiesce("{selector: {}, exec: {freeze: []}}", ""), "freeze"),
        ("BackupPolicy", quiesce("{selector: {}}", ""), "exactly one of template, exec, hold and fsfreeze"),
        (
            "BackupPolicy",
            quiesce("{selector: {}, fsfreeze: {}, template: {name: redis}}", ""),
            "exactly one of template, exec, hold and fsfreeze",
        ),
        ("BackupPolicy", quiesce("{selector: {}, template: {name: ''}}", ""), "template.name"),
        ("BackupPolicy", quiesce("{selector: {}, hold: {command: []}}", ""), "hold.command"),
        ("BackupPolicy", quiesce("{selector: {}, fsfreeze: {claims: []}}", ""), "fsfreeze.claims"),
        ("QuiesceTemplate", "{description: nothing}".to_owned(), "exactly one of hold, exec and fsfreeze"),
        ("QuiesceTemplate", "{fsfreeze: {}, parameters: [{name: 'a b'}]}".to_owned(), "parameters[0].name"),
        ("BackupPolicy", quiesce(step, ", maxFreeze: 0s"), "maxFreeze must be longer than zero"),
        ("BackupPolicy", quiesce(step, ", maxFreeze: 5 minutes"), "maxFreeze"),
        ("BackupPolicy", quiesce(step, ", onFailure: Ignore"), "onFailure"),
    ]
}

fn refused_runs() -> Refused {
    vec![
        ("Backup", "{}".to_owned(), "exactly one of policyRef and plan"),
        ("Backup", format!("{{policyRef: {{name: p}}, plan: {{{TIERS}}}}}"), "exactly one of policyRef and plan"),
        ("Backup", "{policyRef: {name: ''}}".to_owned(), "policyRef.name"),
        ("Restore", "{source: {}}".to_owned(), "spec.source.backupRef: Required value"),
        (
            "Restore",
            "{source: {backupRef: {name: b}, repository: {ref: {name: r}}}}".to_owned(),
            "exactly one of source.backupRef and source.repository",
        ),
        (
            "Restore",
            "{source: {repository: {ref: {name: r}, recoveryPoint: abcd, asOf: '2026-01-01T00:00:00Z'}}}".to_owned(),
            "at most one of recoveryPoint and asOf",
        ),
        ("Restore", "{source: {repository: {ref: {name: r}, recoveryPoint: XYZ}}}".to_owned(), "recoveryPoint"),
        ("Restore", "{source: {repository: {ref: {name: r}, asOf: yesterday}}}".to_owned(), "asOf"),
        ("Restore", "{source: {backupRef: {name: b}}, existing: {resources: Delete}}".to_owned(), "existing.resources"),
        ("Restore", "{source: {backupRef: {name: b}}, clusterResources: {}}".to_owned(), "clusterResources.createAs"),
        (
            "Restore",
            "{source: {backupRef: {name: b}}, clusterResources: {createAs: ''}}".to_owned(),
            "clusterResources.createAs",
        ),
    ]
}

#[test]
fn bad_manifests_are_refused_with_what_to_write() -> Result<()> {
    let server = ApiServer::start()?;
    let mut wrong = Vec::new();
    let all = [refused_repositories(), refused_policies(), refused_quiescing(), refused_streams(), refused_runs()];
    for (kind, spec, says) in all.into_iter().flatten() {
        match server.refusal(&manifest(kind, &spec)) {
            Ok(said) if said.contains(says) => {}
            Ok(said) => wrong.push(format!("{kind} {spec}\n  expected `{says}`\n  found {said}")),
            Err(error) => wrong.push(error.to_string()),
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn good_manifests_are_accepted_and_what_must_not_change_does_not() -> Result<()> {
    let server = ApiServer::start()?;
    let apply = |text: &str| server.kubectl(&["apply", "--server-side", "-f", "-"], text);
    let repository = |bucket: &str| {
        manifest(
            "ClusterRepository",
            &format!(
                "{{backend: {{s3: {{bucket: {bucket}, credentials: {{secretRef: {{name: c}}}}}}}}, encryption: {{secretRef: {{name: k}}}}}}"
            ),
        )
    };
    apply(&repository("backups"))?;
    let said = server.refusal(&repository("others"))?;
    ensure!(said.contains("backend cannot be changed"), "{said}");
    let outside =
        "clusterResources: {includeResources: [clusterissuers.cert-manager.io, ingressclasses/web], readAs: reader}";
    apply(&manifest(
        "BackupPolicy",
        &format!("{{{TIERS}, scope: {{includeResources: [secrets, configmaps/settings], {outside}}}}}"),
    ))?;
    apply(&manifest("Backup", "{policyRef: {name: p}}"))?;
    let said = server.refusal(&manifest("Backup", "{policyRef: {name: q}}"))?;
    ensure!(said.contains("create another Backup"), "{said}");
    apply(&manifest("Restore", "{source: {backupRef: {name: b}}}"))?;
    let said = server.refusal(&manifest("Restore", "{source: {backupRef: {name: c}}}"))?;
    ensure!(said.contains("create another Restore"), "{said}");
    // Short names and categories are what people type.
    for name in ["crepo", "bpol", "bkp", "rst", "qtpl", "lifeboat"] {
        server.kubectl(&["get", name], "").with_context(|| format!("kubectl get {name}"))?;
    }
    Ok(())
}

/// The YAML blocks of a document that begin with `apiVersion`.
fn yaml_blocks(text: &str) -> Vec<&str> {
    text.split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```"))
        .map(|(block, _)| block)
        .filter(|block| block.contains("apiVersion"))
        .collect()
}

#[test]
fn every_manifest_in_the_documents_and_examples_is_accepted() -> Result<()> {
    let server = ApiServer::start()?;
    let root = repository_root();
    for namespace in ["shop", "lifeboat-system"] {
        server.kubectl(&["create", "namespace", namespace], "")?;
    }
    let dry_run = |name: &str, text: &str| {
        server.kubectl(&["create", "--dry-run=server", "-f", "-"], text).map(|_| ()).with_context(|| name.to_owned())
    };
    let mut blocks = 0;
    let documents = [
        "README.md",
        "docs/api/clusterrepository.md",
        "docs/api/backuppolicy.md",
        "docs/api/backup.md",
        "docs/api/restore.md",
        "docs/api/quiescetemplate.md",
    ];
    for name in documents {
        let text = std::fs::read_to_string(root.join(name)).with_context(|| name.to_owned())?;
        let found = yaml_blocks(&text);
        ensure!(!found.is_empty(), "{name} has no example");
        for block in found {
            dry_run(name, block)?;
            blocks += 1;
        }
    }
    ensure!(blocks >= 7, "{blocks} examples");
    for folder in ["examples/quickstart", "examples/postgres"] {
        for entry in std::fs::read_dir(root.join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") && !path.ends_with("namespace.yaml") {
                dry_run(&path.to_string_lossy(), &std::fs::read_to_string(&path)?)?;
            }
        }
    }
    // The README shows the very files of the examples, so that what is run by quickstart is what a reader copies.
    let readme = std::fs::read_to_string(root.join("README.md"))?;
    for name in ["repository.yaml", "policy.yaml", "restore.yaml"] {
        let example = std::fs::read_to_string(root.join("examples/quickstart").join(name))?;
        ensure!(readme.contains(example.trim()), "README.md does not show examples/quickstart/{name} as it is");
    }
    Ok(())
}
