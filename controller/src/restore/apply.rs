//! Creates the captured objects, in waves, until nothing more can be created.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::discovery::ApiResource;
use kube::{Api, Client};
use lifeboat_crds::CONTROLLER_MANAGER;
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{ConditionType, Reason, State};
use lifeboat_crds::restore::{ExistingResources, ObjectsRestoreStatus};
use tracing::{debug, info};

use super::Run;
use super::claims::captured_objects;
use super::plan::Captured;
use crate::backup::capture_resources;
use crate::context::Context;
use crate::object::{restored_form, wave};

/// Rounds over objects that were refused: webhooks start, namespaces settle, references appear.
const ROUNDS: u32 = 8;
/// Between rounds.
const PAUSE: Duration = Duration::from_secs(2);
/// Problems that the status lists.
const SHOWN_PROBLEMS: usize = 30;

/// The resources that this API server offers, by folder.
pub(super) struct Resources(BTreeMap<String, ApiResource>);

impl Resources {
    pub(super) async fn discover(client: &Client) -> Result<Self> {
        let offered = capture_resources(client).await?;
        Ok(Self(offered.into_iter().map(|offered| (offered.name.folder(), offered.api)).collect()))
    }

    /// The resource of a captured object; `None`: this cluster does not know it.
    pub(super) fn find(&self, captured: &Captured) -> Option<&ApiResource> {
        self.0.get(&captured.resource.folder())
    }
}

/// What became of one object.
enum Outcome {
    Created,
    Updated,
    Skipped,
    /// Why; another round may help.
    Refused(String),
}

async fn put(
    api: &Api<DynamicObject>,
    name: &str,
    object: &DynamicObject,
    existing: ExistingResources,
) -> Result<Outcome> {
    match api
        .create(&PostParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PostParams::default() }, object)
        .await
    {
        Ok(_) => return Ok(Outcome::Created),
        Err(kube::Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists" => {}
        Err(kube::Error::Api(status)) => return Ok(Outcome::Refused(status.message.clone())),
        Err(error) => return Err(error).context("cannot create an object"),
    }
    if existing != ExistingResources::Update {
        return Ok(Outcome::Skipped);
    }
    let patch = PatchParams::apply(CONTROLLER_MANAGER).force();
    match api.patch(name, &patch, &Patch::Apply(object)).await {
        Ok(_) => Ok(Outcome::Updated),
        Err(kube::Error::Api(status)) => Ok(Outcome::Refused(status.message.clone())),
        Err(error) => Err(error).context("cannot update an object"),
    }
}

/// Claims that this restore made and filled: they exist, and that is no news.
fn is_filled_claim(captured: &Captured, run: &Run) -> bool {
    captured.resource.plural == "persistentvolumeclaims"
        && run.status.volumes.iter().any(|volume| volume.claim == captured.name)
}

async fn round(
    run: &Run,
    context: &Context,
    resources: &Resources,
    left: Vec<Captured>,
    counts: &mut ObjectsRestoreStatus,
) -> Result<Vec<(Captured, String)>> {
    let mut refused = Vec::new();
    let point = run.status.recovery_point.as_ref().map(|point| point.id.clone()).unwrap_or_default();
    for captured in left {
        let Some(resource) = resources.find(&captured) else {
            let why = format!("this cluster does not offer {}/{}", captured.resource.qualified(), captured.version);
            refused.push((captured, why));
            continue;
        };
        let mut form = restored_form(&captured.resource, captured.object.clone(), &run.namespace, &point);
        // The version that this server prefers; a captured one may be gone.
        form["apiVersion"] = resource.api_version.clone().into();
        let object: DynamicObject = match serde_json::from_value(form) {
            Ok(object) => object,
            Err(error) => {
                refused.push((captured, format!("it is malformed: {error}")));
                continue;
            }
        };
        let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &run.namespace, resource);
        let shown = format!("{} {}", captured.resource.qualified(), captured.name);
        match put(&api, &captured.name, &object, run.restore.spec.existing.resources).await? {
            Outcome::Created => counts.created += 1,
            Outcome::Updated => counts.updated += 1,
            Outcome::Skipped => {
                counts.skipped += 1;
                counts.problems.push(format!("{shown}: exists and was left as it is"));
            }
            Outcome::Refused(why) => {
                debug!(object = shown, why, "refused");
                refused.push((captured, why));
            }
        }
    }
    Ok(refused)
}

/// Applies all objects and ends the restore.
pub(super) async fn apply(run: &mut Run, context: &Context) -> Result<()> {
    let repository = match run.open_repository(context).await? {
        Ok((repository, _)) => repository,
        Err(error) => return run.fail(context, error.reason, error.message).await,
    };
    let point = run.status.recovery_point.clone().context("no recovery point is pinned")?;
    let mut objects = match captured_objects(&repository, &point.id).await {
        Ok(objects) => objects,
        Err((reason, message)) => return run.fail(context, reason, message).await,
    };
    objects.retain(|captured| !is_filled_claim(captured, run));
    objects.sort_by_key(|captured| (wave(&captured.resource), captured.resource.clone(), captured.name.clone()));
    let resources = Resources::discover(&context.client).await?;
    let mut counts = ObjectsRestoreStatus::default();
    let mut refused = Vec::new();
    for number in 0..ROUNDS {
        refused = round(run, context, &resources, objects, &mut counts).await?;
        if refused.is_empty() {
            break;
        }
        if number + 1 < ROUNDS {
            tokio::time::sleep(PAUSE).await;
        }
        objects = refused.iter().map(|(captured, _)| captured.clone()).collect();
    }
    counts.failed = refused.len() as u64;
    let failures = refused
        .into_iter()
        .map(|(captured, why)| format!("{} {}: {why}", captured.resource.qualified(), captured.name));
    counts.problems = failures.chain(counts.problems).take(SHOWN_PROBLEMS).collect();
    end(run, context, counts).await
}

async fn end(run: &mut Run, context: &Context, counts: ObjectsRestoreStatus) -> Result<()> {
    let files: u64 = run.status.volumes.iter().map(|volume| volume.failed).sum();
    let all =
        format!("{} objects created, {} updated, {} left as they were", counts.created, counts.updated, counts.skipped);
    if counts.failed > 0 {
        let message = format!("{all}, {} refused: {}", counts.failed, counts.problems.join("; "));
        run.status.objects = Some(counts);
        return run.fail(context, Reason::ApplyFailed, message).await;
    }
    let (phase, reason, message) = if files > 0 || counts.skipped > 0 {
        let message = format!("{all}; {files} files not restored in full: see status.volumes and status.objects");
        (Phase::Partial, Reason::CompletedWithProblems, message)
    } else {
        (Phase::Succeeded, Reason::Completed, all)
    };
    info!(created = counts.created, skipped = counts.skipped, files, "succeeded");
    run.status.objects = Some(counts);
    run.status.phase = phase;
    run.status.completion_time = Some(Time(Timestamp::now()));
    run.set(ConditionType::Succeeded, State::True, reason, message.clone());
    run.save(context).await?;
    context.metrics.restores_succeeded.inc();
    context.events.normal(&run.restore, reason, message).await;
    Ok(())
}
