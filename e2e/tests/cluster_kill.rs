//! Kill anything: at every step that the programs say they take, the controller, the agents, the API server and the object
//! store die. Every backup ends well or with a clear reason; nothing stays frozen or is left behind; what was backed up
//! before is there.
#![cfg(feature = "cluster")]
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lifeboat_crds::Backup;
use lifeboat_crds::conditions::{self, ConditionType};
use lifeboat_e2e::faults::{BEAT, CONTROLLER, chance, fresh_lifeboat, kill, longest_gap, number};
use lifeboat_e2e::scenario::{BUSYBOX, INSTALLED_IN, PATIENCE, Scenario, launcher, scenario};
use serde_json::{Value, json};

/// The application may be frozen for this long, whatever dies.
const MAX_FREEZE: Duration = Duration::from_secs(15);

/// What does not come back by itself is brought back after this time.
const DEAD: Duration = Duration::from_secs(3);

/// The steps that follow a failure or a deletion, and those of a restore: a backup that goes well has none of them.
const NOT_IN_A_GOOD_BACKUP: [&str; 5] = ["Erase", "Fail", "NoteFreezeFailure", "Renew", "Write"];

/// Whose log says which step begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Controller,
    Agent,
}

impl Program {
    fn component(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Agent => "agent",
        }
    }

    /// The steps that the program itself exports.
    fn steps(self, s: &Scenario) -> Result<Vec<String>> {
        let (workload, program) = match self {
            Self::Controller => ("deployment/lifeboat-controller", "/lifeboat-controller"),
            Self::Agent => ("daemonset/lifeboat-agent", "/lifeboat-agent"),
        };
        let command = ["-n", INSTALLED_IN, "exec", workload, "-c", self.component(), "--", program, "steps"];
        Ok(s.kubectl_cluster(&command)?.lines().map(str::to_owned).collect())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Controller,
    Agents,
    ApiServer,
    Store,
}

const VICTIMS: [Victim; 4] = [Victim::Controller, Victim::Agents, Victim::ApiServer, Victim::Store];

impl Victim {
    /// Kills it, and brings back what does not come back by itself.
    async fn die(self, s: &Scenario) -> Result<()> {
        match self {
            Self::Controller => {
                ensure!(kill(CONTROLLER)? > 0, "no controller was killed");
                Ok(())
            }
            Self::Agents => {
                ensure!(kill("/lifeboat-agent run")? > 0, "no agent was killed");
                Ok(())
            }
            Self::ApiServer => {
                let dead = s.kill_api_server()?;
                tokio::time::sleep(DEAD).await;
                drop(dead);
                s.api_server_answers().await
            }
            Self::Store => {
                launcher(&["kill", "s3"])?;
                tokio::time::sleep(DEAD).await;
                launcher(&["start", "s3"]).map(|_| ())
            }
        }
    }
}

/// A program's log from now on.
struct Log {
    kubectl: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Log {
    fn follow(program: Program) -> Result<Self> {
        let component = program.component();
        let selector = format!("app.kubernetes.io/component={component}");
        let mut kubectl = Command::new("kubectl")
            .args([
                "-n",
                INSTALLED_IN,
                "logs",
                "-f",
                "--since=1s",
                "--max-log-requests=20",
                "-c",
                component,
                "-l",
                &selector,
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start kubectl")?;
        let output = BufReader::new(kubectl.stdout.take().context("standard output")?);
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
        Ok(Self { kubectl, lines })
    }

    /// The next step of this backup that the log tells of. `None`: no more came in time. An agent's line does not name the
    /// backup; tasks of those before are gone.
    fn next_step(&self, s: &Scenario, backup: &str, within: Duration) -> Option<String> {
        let end = Instant::now() + within;
        while let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            let Ok(line) = serde_json::from_str::<Value>(&line) else { continue };
            let span = &line["span"];
            let is_ours =
                span["namespace"] == s.namespace.as_str() && span["backup"].as_str().is_none_or(|name| name == backup);
            if let (true, Some(step)) = (is_ours, line["step"].as_str()) {
                return Some(step.to_owned());
            }
        }
        None
    }

    fn reaches(&self, s: &Scenario, backup: &str, step: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while let Some(found) = self.next_step(s, backup, end.saturating_duration_since(Instant::now())) {
            if found == step {
                return Ok(());
            }
        }
        bail!("the log never told of the step {step}")
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if let Err(error) = self.kubectl.kill().and_then(|()| self.kubectl.wait().map(|_| ())) {
            println!("kubectl logs was not ended: {error}");
        }
    }
}

/// A pod with one volume that is cut and one that is read while everything is at rest.
fn application() -> Value {
    let claim = |name: &str| {
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}}})
    };
    let names = ["data", "live"];
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "app", "labels": {"app": "app"}}, "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "while :; do sleep 3600; done"],
            "volumeMounts": names.map(|name| json!({"name": name, "mountPath": format!("/{name}")}))}],
        "volumes": names.map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}})),
    }});
    json!({"apiVersion": "v1", "kind": "List", "items": [claim("data"), claim("live"), pod]})
}

fn plan(s: &Scenario) -> Value {
    let app = json!({"matchLabels": {"app": "app"}});
    let mut plan = s.plan();
    plan["volumes"] = json!([{"match": {"names": ["live"]}, "method": "Live"}]);
    plan["quiesce"] = json!({"maxFreeze": format!("{}s", MAX_FREEZE.as_secs()), "steps": [
        {"selector": app, "exec": {"freeze": ["touch", "/tmp/frozen"], "thaw": ["rm", "-f", "/tmp/frozen"]}},
        {"selector": app, "fsfreeze": {}},
    ]});
    plan["streams"] = json!([{"name": "round.txt", "selector": app, "command": ["cat", "/data/round"]}]);
    json!({"plan": plan})
}

/// Whatever a backup makes for itself, in all namespaces.
async fn nothing_is_left(s: &Scenario) -> Result<()> {
    let kinds = "pods,persistentvolumeclaims,volumesnapshots,volumesnapshotcontents,volumegroupsnapshots,quiesceleases,volumetasks";
    let mut left = String::new();
    let waited = s
        .eventually("everything that backups made for themselves to be gone", async || {
            let ours = [
                "get",
                kinds,
                "-A",
                "-l",
                "app.kubernetes.io/managed-by=lifeboat,lifeboat.dev/owner-uid",
                "-o",
                "name",
            ];
            left = s.kubectl_cluster(&ours)?;
            Ok(left.is_empty())
        })
        .await;
    waited.with_context(|| format!("left: {left}"))
}

/// The recovery point of this volume holds this round's number.
fn holds(s: &Scenario, backup: &Backup, claim: &str, round: &str) -> Result<()> {
    let volumes = backup.status.iter().flat_map(|status| &status.volumes);
    let volume =
        volumes.into_iter().find(|volume| volume.claim == claim).with_context(|| format!("no volume {claim}"))?;
    let snapshot = volume.snapshot.as_ref().context("a volume without a recovery point")?;
    let found = s.lifeboat(&["cat", snapshot, "round"])?;
    ensure!(found.trim() == round, "{claim} has the round {found} in the recovery point of {round}");
    Ok(())
}

/// Starts a backup of volumes that hold its name.
async fn begin_round(s: &Scenario, name: &str) -> Result<()> {
    s.shell("app", &format!("for v in data live; do echo {name} > /$v/round; done; sync"))?;
    s.start_backup(name, plan(s)).await
}

/// One backup in the middle of which something dies; how it ended.
async fn survives(s: &Scenario, name: &str, program: Program, step: &str, victim: Victim) -> Result<String> {
    longest_gap(s, "app")?;
    let log = Log::follow(program)?;
    // The stream begins before what it is to show.
    tokio::time::sleep(Duration::from_millis(700)).await;
    begin_round(s, name).await?;
    log.reaches(s, name, step)?;
    drop(log);
    victim.die(s).await?;
    if matches!(victim, Victim::Controller | Victim::Agents) {
        s.backup_finished(name).await?;
        fresh_lifeboat(s).await?;
    }
    let backup = s.backup_finished(name).await?;
    nothing_is_left(s).await?;
    let gap = longest_gap(s, "app")?;
    ensure!(Duration::from_millis(gap) <= MAX_FREEZE, "frozen for {gap} ms");
    let status = backup.status.as_ref().context("status")?;
    ensure!(status.quiesce.iter().flat_map(|quiesce| &quiesce.workloads).all(|w| !w.frozen), "{:?}", status.quiesce);
    let ended = conditions::get(&status.conditions, ConditionType::Succeeded).context("Succeeded")?;
    if ended.status == "True" {
        holds(s, &backup, "data", name)?;
        holds(s, &backup, "live", name)?;
        let stream = status.streams.first().and_then(|stream| stream.snapshot.as_ref()).context("a stream")?;
        let found = s.lifeboat(&["cat", stream, "round.txt"])?;
        ensure!(found.trim() == name, "the stream has the round {found} in the recovery point of {name}");
    } else {
        ensure!(ended.reason != "InternalError" && !ended.message.is_empty(), "no clear reason: {ended:?}");
    }
    s.lifeboat(&["check"])?;
    Ok(if ended.status == "True" { "Succeeded".to_owned() } else { ended.reason.clone() })
}

/// Whose step, which step, and who dies when it begins.
type Round = (Program, String, Victim);

/// So many of the rounds: each victim as often as the others, and no step again before all had their turn.
fn choose(mut all: Vec<Round>, wanted: usize) -> Vec<Round> {
    let mut chosen: Vec<Round> = Vec::new();
    while chosen.len() < wanted {
        let victim = VICTIMS[chosen.len() % VICTIMS.len()];
        let times = |at: &usize| {
            let (program, step, _) = &all[*at];
            chosen.iter().filter(|(of, same, _)| (of, same) == (program, step)).count()
        };
        let Some(next) = (0..all.len()).filter(|at| all[*at].2 == victim).min_by_key(times) else { break };
        chosen.push(all.remove(next));
    }
    chosen
}

/// All rounds: every step of both programs with every victim. Fails when a step that is exported is never taken.
async fn rounds(s: &Scenario) -> Result<Vec<Round>> {
    let programs = [Program::Controller, Program::Agent];
    let logs = [Log::follow(programs[0])?, Log::follow(programs[1])?];
    tokio::time::sleep(Duration::from_millis(700)).await;
    begin_round(s, "undisturbed").await?;
    s.backup_succeeded("undisturbed").await?;
    nothing_is_left(s).await?;
    let mut rounds = Vec::new();
    for (program, log) in programs.into_iter().zip(&logs) {
        let taken: BTreeSet<_> =
            std::iter::from_fn(|| log.next_step(s, "undisturbed", Duration::from_secs(2))).collect();
        let steps = program.steps(s)?;
        for step in steps {
            let is_good = !NOT_IN_A_GOOD_BACKUP.contains(&step.as_str());
            ensure!(taken.contains(&step) == is_good, "{program:?}: the step {step}: {taken:?}");
            if is_good {
                rounds.extend(VICTIMS.map(|victim| (program, step.clone(), victim)));
            }
        }
    }
    Ok(rounds)
}

#[test]
fn whatever_dies_at_whatever_step_a_backup_ends_clearly_and_harms_nothing() {
    let (wanted, seed) = (number("LIFEBOAT_KILL_STEPS", 8), number("LIFEBOAT_KILL_SEED", 1));
    // So many rounds were made by other runs with the same seed.
    let made = number("LIFEBOAT_KILL_FROM", 0);
    scenario("kill-anything", async |s: Scenario| {
        s.apply(&application().to_string())?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        s.shell("app", "dd if=/dev/urandom of=/data/big bs=1M count=20 2>/dev/null; cp /data/big /live/big; sync")?;
        s.shell("app", BEAT)?;
        let mut all = rounds(&s).await?;
        let total = all.len();
        let mut order = 0;
        all.sort_by_cached_key(|_| {
            order += 1;
            chance(seed + order)
        });
        let up_to = |count: u64| usize::try_from(count).unwrap_or(usize::MAX).min(total);
        let chosen = choose(all, up_to(made.saturating_add(wanted))).split_off(up_to(made));
        ensure!(!chosen.is_empty(), "no round is left: there are {total}, and {made} were made");
        let wanted = chosen.len();
        let mut last = "undisturbed".to_owned();
        for (number, (program, step, victim)) in chosen.iter().enumerate() {
            let name = format!("b{number}");
            let began = Instant::now();
            let ended = survives(&s, &name, *program, step, *victim)
                .await
                .with_context(|| format!("{victim:?} died when the {} began {step}", program.component()))?;
            println!(
                "{name} of {wanted} ({total} in all): {} {step}, {victim:?} dies: {ended}, {:.1?}",
                program.component(),
                began.elapsed()
            );
            if ended == "Succeeded" {
                last = name;
            }
        }
        s.lifeboat(&["check", "--read-data"])?;
        s.lose_namespace()?;
        s.restore_newest("back").await?;
        s.kubectl(&["wait", "--for=condition=Ready", "pod/app", "--timeout=120s"])?;
        let found = s.shell("app", "cat /data/round /live/round; cmp /data/big /live/big && echo same")?;
        ensure!(found == format!("{last}\n{last}\nsame\n"), "{found}; the last was {last}");
        Ok(())
    });
}
