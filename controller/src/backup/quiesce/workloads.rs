//! What is brought to rest and how: the steps of the plan and the hooks that pods declare by annotations.
//!
//! Everything that can be wrong with them is found here, before anything is frozen.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::plan::{
    BackupPlan, ExecHook, FsfreezeHook, HoldHook, Quiesce, QuiesceStep, TemplateUse, selector_matches,
};
use lifeboat_crds::quiesce_lease::{CommandPair, FrozenVolumes, HoldCommand, QuiesceAction};
use lifeboat_crds::quiesce_template::{QuiesceTemplate, QuiesceTemplateSpec, fill};
use lifeboat_crds::{DurationString, labels};
use serde::de::DeserializeOwned;

use super::super::{Run, resolve};
use crate::context::Context;
use crate::holder::is_block;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// One workload that is to be brought to rest.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Target {
    pub(super) step: u32,
    pub(super) pod: String,
    pub(super) pod_uid: String,
    pub(super) node: String,
    /// Empty when volumes are frozen.
    pub(super) container: String,
    pub(super) action: QuiesceAction,
    pub(super) timeout: Duration,
}

/// Why nothing can be brought to rest.
pub(super) type Refusal = (Reason, String);

/// What the API server knows that steps speak of.
#[derive(Debug, Default)]
struct Known {
    pods: Vec<Pod>,
    /// Persistent volumes with a file system by the names of their claims.
    volumes: BTreeMap<String, String>,
    templates: BTreeMap<String, QuiesceTemplateSpec>,
    /// What every template may use besides its parameters.
    given: BTreeMap<String, String>,
}

/// The longest freeze of the plan, in milliseconds: for applications that keep an end by themselves.
const MAX_FREEZE_MILLIS: &str = "maxFreezeMillis";

/// A plan without a word about quiescing still honours what pods declare.
pub(crate) async fn adopt_declared(run: &Run, plan: &mut BackupPlan, context: &Context) -> Result<()> {
    if plan.quiesce.is_some() {
        return Ok(());
    }
    let pods = context.namespaced::<Pod>(&run.namespace).list(&ListParams::default()).await;
    let declares = |pod: &Pod| pod.annotations().keys().any(|key| key.starts_with(labels::QUIESCE));
    if pods.context("cannot list pods")?.iter().any(|pod| resolve::is_readable(pod) && declares(pod)) {
        plan.quiesce = Some(Quiesce::default());
    }
    Ok(())
}

/// All workloads of the plan, in the order in which they are brought to rest.
pub(super) async fn resolve(run: &Run, quiesce: &Quiesce, context: &Context) -> Result<Result<Vec<Target>, Refusal>> {
    let everything = ListParams::default();
    let pods = context.namespaced::<Pod>(&run.namespace).list(&everything).await.context("cannot list pods")?.items;
    let claims = context.namespaced::<PersistentVolumeClaim>(&run.namespace).list(&everything).await;
    let volume = |claim: PersistentVolumeClaim| Some((claim.name_any(), claim.spec?.volume_name?));
    let claims = claims.context("cannot list claims")?.into_iter().filter(|claim| !is_block(claim));
    let volumes = claims.filter_map(volume).collect();
    let given = BTreeMap::from([(
        MAX_FREEZE_MILLIS.to_owned(),
        super::longest(quiesce.max_freeze.as_ref()).as_millis().to_string(),
    )]);
    let mut known = Known { pods, volumes, templates: BTreeMap::new(), given };
    let steps = match all_steps(quiesce, &known.pods) {
        Ok(steps) => steps,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let names: BTreeSet<_> = steps.iter().filter_map(|(step, _)| Some(step.template.as_ref()?.name.clone())).collect();
    let templates: Api<QuiesceTemplate> = Api::all(context.client.clone());
    for name in names {
        if let Some(found) = templates.get_opt(&name).await.context("cannot read a QuiesceTemplate")? {
            known.templates.insert(name, found.spec);
        }
    }
    Ok(steps.iter().enumerate().map(|(number, (step, pod))| targets(number, step, pod.as_ref(), &known)).try_fold(
        Vec::new(),
        |mut all, found| {
            all.extend(found?);
            Ok(all)
        },
    ))
}

/// The steps of the plan, then what pods declare: each with the pod that declares it.
fn all_steps(quiesce: &Quiesce, pods: &[Pod]) -> Result<Vec<(QuiesceStep, Option<Pod>)>, Refusal> {
    let mut steps: Vec<_> = quiesce.steps.iter().map(|step| (step.clone(), None)).collect();
    let mut declared = Vec::new();
    for pod in pods.iter().filter(|pod| resolve::is_readable(pod)) {
        let invalid = |why: String| (Reason::HookInvalid, format!("the pod {}: {why}", pod.name_any()));
        if let Some((order, step)) = declared_by(pod).map_err(invalid)? {
            declared.push((order, pod.name_any(), step, pod.clone()));
        }
    }
    declared.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    steps.extend(declared.into_iter().map(|(_, _, step, pod)| (step, Some(pod))));
    if steps.is_empty() {
        let message = "quiesce has no step, and no running pod declares one by an annotation; write either";
        return Err((Reason::HookInvalid, message.to_owned()));
    }
    Ok(steps)
}

/// What the annotations of a pod may be called, after the prefix.
const KEYS: [&str; 9] =
    ["template", "parameters", "freeze", "thaw", "hold", "fsfreeze", "container", "timeout", "order"];

/// What a pod declares by annotations, and its place in the order.
fn declared_by(pod: &Pod) -> Result<Option<(i64, QuiesceStep)>, String> {
    let given: BTreeMap<_, _> =
        pod.annotations().iter().filter_map(|(key, value)| Some((key.strip_prefix(labels::QUIESCE)?, value))).collect();
    if given.is_empty() {
        return Ok(None);
    }
    if let Some(unknown) = given.keys().find(|key| !KEYS.contains(key)) {
        return Err(format!(
            "the annotation {}{unknown} is not known; there are: {}",
            labels::QUIESCE,
            KEYS.join(", ")
        ));
    }
    let timeout = given.get("timeout").map(|text| text.parse::<DurationString>()).transpose();
    let timeout = timeout.map_err(|error| format!("the annotation {}timeout: {error}", labels::QUIESCE))?;
    let exec = ExecHook { freeze: json(&given, "freeze")?, thaw: json(&given, "thaw")?, timeout: timeout.clone() };
    let command = json::<Vec<String>>(&given, "hold")?;
    let template = given.get("template").map(|name| (*name).clone());
    let parameters = json(&given, "parameters")?.unwrap_or_default();
    let step = QuiesceStep {
        selector: LabelSelector::default(),
        container: given.get("container").map(|name| (*name).clone()),
        template: template.map(|name| TemplateUse { name, parameters }),
        exec: (exec.freeze.is_some() || exec.thaw.is_some()).then_some(exec),
        hold: command.map(|command| HoldHook { command, timeout }),
        fsfreeze: json::<bool>(&given, "fsfreeze")?.filter(|wanted| *wanted).map(|_| FsfreezeHook::default()),
    };
    let ways = [step.template.is_some(), step.exec.is_some(), step.hold.is_some(), step.fsfreeze.is_some()];
    if ways.iter().filter(|is_there| **is_there).count() != 1 {
        let prefix = labels::QUIESCE;
        return Err(format!(
            "write exactly one of the annotations {prefix}template, {prefix}hold, {prefix}fsfreeze and the pair {prefix}freeze and {prefix}thaw"
        ));
    }
    Ok(Some((json(&given, "order")?.unwrap_or(0), step)))
}

fn json<T: DeserializeOwned>(given: &BTreeMap<&str, &String>, key: &str) -> Result<Option<T>, String> {
    let form = |error| {
        let example = match key {
            "parameters" => r#"{"user":"postgres"}"#,
            "fsfreeze" => "true",
            "order" => "10",
            _ => r#"["sh","-c","..."]"#,
        };
        format!("the annotation {}{key} cannot be read ({error}); write it as {example}", labels::QUIESCE)
    };
    given.get(key).map(|text| serde_json::from_str(text).map_err(form)).transpose()
}

/// The workloads of one step, in the order of their pods' names.
fn targets(
    number: usize,
    step: &QuiesceStep,
    declared_by: Option<&Pod>,
    known: &Known,
) -> Result<Vec<Target>, Refusal> {
    let mut pods: Vec<_> = match declared_by {
        Some(pod) => vec![pod],
        None => known
            .pods
            .iter()
            .filter(|pod| resolve::is_readable(pod) && selector_matches(&step.selector, pod.labels()))
            .collect(),
    };
    pods.sort_by_key(|pod| pod.name_any());
    if pods.is_empty() {
        let message =
            format!("the quiesce step {number} selects no running pod; correct its selector or start the application");
        return Err((Reason::HookFailed, message));
    }
    pods.into_iter().map(|pod| target(number, step, pod, known)).collect()
}

fn target(number: usize, step: &QuiesceStep, pod: &Pod, known: &Known) -> Result<Target, Refusal> {
    let (action, timeout) = action(step, pod, known)?;
    let container = match &action {
        QuiesceAction::Fsfreeze(_) => String::new(),
        QuiesceAction::Commands(_) | QuiesceAction::Hold(_) => container(step, pod)?,
    };
    Ok(Target {
        step: u32::try_from(number).unwrap_or(u32::MAX),
        pod: pod.name_any(),
        pod_uid: pod.uid().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        container,
        action,
        // The schema refuses texts that are no durations.
        timeout: timeout.and_then(|text| text.get().ok()).unwrap_or(DEFAULT_TIMEOUT),
    })
}

fn container(step: &QuiesceStep, pod: &Pod) -> Result<String, Refusal> {
    let mut containers = pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| container.name.as_str());
    match &step.container {
        None => Ok(containers.next().unwrap_or_default().to_owned()),
        Some(name) if containers.clone().any(|one| one == name) => Ok(name.clone()),
        Some(name) => {
            let all: Vec<_> = containers.collect();
            let message = format!("the pod {} has no container `{name}`; it has {}", pod.name_any(), all.join(", "));
            Err((Reason::HookFailed, message))
        }
    }
}

fn action<'a>(
    step: &'a QuiesceStep,
    pod: &Pod,
    known: &'a Known,
) -> Result<(QuiesceAction, Option<&'a DurationString>), Refusal> {
    if let Some(used) = &step.template {
        return from_template(used, pod, known);
    }
    if let Some(exec) = &step.exec {
        let pair = CommandPair { freeze: exec.freeze.clone(), thaw: exec.thaw.clone() };
        return Ok((QuiesceAction::Commands(pair), exec.timeout.as_ref()));
    }
    if let Some(hold) = &step.hold {
        return Ok((QuiesceAction::Hold(HoldCommand { command: hold.command.clone() }), hold.timeout.as_ref()));
    }
    let only = step.fsfreeze.as_ref().and_then(|hook| hook.claims.as_deref());
    Ok((QuiesceAction::Fsfreeze(volumes(pod, only, known)?), None))
}

fn from_template<'a>(
    used: &TemplateUse,
    pod: &Pod,
    known: &'a Known,
) -> Result<(QuiesceAction, Option<&'a DurationString>), Refusal> {
    let name = &used.name;
    let template = known.templates.get(name).ok_or_else(|| {
        let message = format!("there is no QuiesceTemplate `{name}`; see `kubectl get quiescetemplates`");
        (Reason::TemplateNotFound, message)
    })?;
    let invalid = |error| (Reason::HookInvalid, format!("the QuiesceTemplate `{name}` cannot be used: {error}"));
    let mut values = template.values(&used.parameters).map_err(invalid)?;
    values.extend(known.given.clone());
    let filled = |words: &Vec<String>| fill(words, &values).map_err(invalid);
    let action = if let Some(hold) = &template.hold {
        QuiesceAction::Hold(HoldCommand { command: filled(&hold.command)? })
    } else if let Some(pair) = &template.exec {
        QuiesceAction::Commands(CommandPair {
            freeze: pair.freeze.as_ref().map(filled).transpose()?,
            thaw: pair.thaw.as_ref().map(filled).transpose()?,
        })
    } else {
        QuiesceAction::Fsfreeze(volumes(pod, None, known)?)
    };
    Ok((action, template.timeout.as_ref()))
}

/// The persistent volumes of a pod.
fn volumes(pod: &Pod, only: Option<&[String]>, known: &Known) -> Result<FrozenVolumes, Refusal> {
    let mounted: Vec<_> = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten())
        .filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(source), _) => Some(source.claim_name.clone()),
            (None, Some(_)) => Some(format!("{}-{}", pod.name_any(), volume.name)),
            (None, None) => None,
        })
        .collect();
    if let Some(missing) = only.unwrap_or_default().iter().find(|claim| !mounted.contains(claim)) {
        let message = format!("the pod {} does not have the claim {missing} mounted", pod.name_any());
        return Err((Reason::HookFailed, message));
    }
    let wanted = mounted.iter().filter(|claim| only.is_none_or(|only| only.contains(claim)));
    let volumes: Vec<_> = wanted.filter_map(|claim| known.volumes.get(claim).cloned()).collect();
    if volumes.is_empty() {
        let message = format!("the pod {} has no claim mounted that fsfreeze could freeze", pod.name_any());
        return Err((Reason::HookFailed, message));
    }
    Ok(FrozenVolumes { volumes })
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json!(..) as an argument reads better without a borrow
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(name: &str, phase: &str, annotations: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": name, "labels": {"app": "db"}, "annotations": annotations},
            "spec": {"nodeName": "n1", "containers": [{"name": "main"}, {"name": "side"}],
                "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]},
            "status": {"phase": phase}
        }))
        .unwrap()
    }

    fn step(more: Value) -> QuiesceStep {
        let mut step = json!({"selector": {"matchLabels": {"app": "db"}}});
        step.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(step).unwrap()
    }

    fn known(pods: Vec<Pod>) -> Known {
        let template = json!({"parameters": [{"name": "user", "default": "root"}], "hold": {"command": ["psql", "-U", "$(user)"]}});
        Known {
            pods,
            volumes: BTreeMap::from([("data".to_owned(), "pv-1".to_owned())]),
            templates: BTreeMap::from([("postgresql".to_owned(), serde_json::from_value(template).unwrap())]),
            given: BTreeMap::new(),
        }
    }

    #[test]
    fn a_step_runs_in_all_running_pods_in_order_of_their_names() {
        let none = || json!({});
        let known = known(vec![pod("b", "Running", none()), pod("a", "Running", none()), pod("c", "Pending", none())]);
        let exec = json!({"exec": {"freeze": ["x"]}});
        let found = targets(2, &step(exec.clone()), None, &known).unwrap();
        let names: Vec<_> = found.iter().map(|t| (t.step, t.pod.as_str(), t.container.as_str())).collect();
        assert_eq!(names, [(2, "a", "main"), (2, "b", "main")]);
        let mut side = exec;
        side["container"] = json!("side");
        assert_eq!(targets(0, &step(side), None, &known).unwrap()[0].container, "side");
        let frozen = targets(0, &step(json!({"fsfreeze": {}})), None, &known).unwrap();
        assert_eq!(frozen[0].action, QuiesceAction::Fsfreeze(FrozenVolumes { volumes: vec!["pv-1".into()] }));
    }

    #[test]
    fn what_fits_nothing_says_so() {
        let known = known(vec![pod("a", "Running", json!({}))]);
        for (wrong, reason, says) in [
            (
                json!({"selector": {"matchLabels": {"app": "web"}}, "hold": {"command": ["x"]}}),
                Reason::HookFailed,
                "selects no running pod",
            ),
            (json!({"container": "nothing", "hold": {"command": ["x"]}}), Reason::HookFailed, "it has main, side"),
            (
                json!({"container": "nothing", "template": {"name": "postgresql"}}),
                Reason::HookFailed,
                "it has main, side",
            ),
            (json!({"template": {"name": "mysql"}}), Reason::TemplateNotFound, "no QuiesceTemplate `mysql`"),
            (
                json!({"template": {"name": "postgresql", "parameters": {"usr": "x"}}}),
                Reason::HookInvalid,
                "no parameter `usr`",
            ),
            (json!({"fsfreeze": {"claims": ["other"]}}), Reason::HookFailed, "claim other"),
        ] {
            let (found, message) = targets(0, &step(wrong), None, &known).unwrap_err();
            assert!(found == reason && message.contains(says), "{found}: {message}");
        }
    }

    #[test]
    fn a_template_is_filled_with_parameters() {
        let known = known(vec![pod("a", "Running", json!({}))]);
        let used = step(json!({"template": {"name": "postgresql", "parameters": {"user": "app"}}}));
        let command = ["psql", "-U", "app"].map(str::to_owned).to_vec();
        assert_eq!(targets(0, &used, None, &known).unwrap()[0].action, QuiesceAction::Hold(HoldCommand { command }));
    }

    #[test]
    fn pods_declare_hooks_by_annotations_after_the_steps_of_the_plan() {
        let freeze = json!({"quiesce.lifeboat.dev/freeze": r#"["sync"]"#, "quiesce.lifeboat.dev/order": "5", "quiesce.lifeboat.dev/timeout": "3s"});
        let hold = json!({"quiesce.lifeboat.dev/hold": r#"["x"]"#});
        let ended = json!({"quiesce.lifeboat.dev/hold": "nonsense"});
        let pods = [pod("a", "Running", freeze), pod("b", "Running", hold), pod("c", "Succeeded", ended)];
        let quiesce = Quiesce { steps: vec![step(json!({"fsfreeze": {}}))], ..Quiesce::default() };
        let steps = all_steps(&quiesce, &pods).unwrap();
        let who: Vec<_> = steps.iter().map(|(_, pod)| pod.as_ref().map(ResourceExt::name_any)).collect();
        assert_eq!(who, [None, Some("b".into()), Some("a".into())]);
        assert_eq!(
            targets(2, &steps[2].0, steps[2].1.as_ref(), &Known::default()).unwrap()[0].timeout,
            Duration::from_secs(3)
        );
        assert_eq!(all_steps(&Quiesce::default(), &[]).unwrap_err().0, Reason::HookInvalid);
    }

    #[test]
    fn annotations_that_make_no_sense_are_refused_with_what_to_write() {
        for (annotations, says) in [
            (json!({"quiesce.lifeboat.dev/frezze": "[]"}), "is not known; there are: template"),
            (json!({"quiesce.lifeboat.dev/freeze": "sync"}), r#"write it as ["sh""#),
            (json!({"quiesce.lifeboat.dev/container": "main"}), "exactly one of"),
            (json!({"quiesce.lifeboat.dev/template": "a", "quiesce.lifeboat.dev/fsfreeze": "true"}), "exactly one of"),
            (json!({"quiesce.lifeboat.dev/fsfreeze": "true", "quiesce.lifeboat.dev/timeout": "soon"}), "30s"),
        ] {
            let message = declared_by(&pod("a", "Running", annotations)).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
    }
}
