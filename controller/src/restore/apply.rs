//! Creates the captured objects, in waves, until nothing more can be created.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::Status;
use kube::core::discovery::ApiResource;
use kube::{Api, Client};
use lifeboat_crds::backup::Phase;
use lifeboat_crds::conditions::{ConditionType, Reason, State};
use lifeboat_crds::restore::{ExistingResources, ObjectsRestoreStatus};
use lifeboat_crds::{CONTROLLER_MANAGER, labels};
use tracing::{debug, info};

use super::Run;
use super::claims::captured_objects;
use super::cluster;
use super::plan::Captured;
use super::streams;
use crate::backup::capture_resources;
use crate::context::Context;
use crate::object::{ANSWERING_WAVE, cluster_wave, restored_cluster_form, restored_form, wave};

/// Pauses between rounds in which nothing could be created: webhooks start, definitions are established, references appear.
/// A round that created something is followed by the next at once, and the pauses begin anew.
const PAUSES: &[Duration] = &[
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(15),
    Duration::from_secs(30),
];
/// Pauses when all that is left is refused for what it is or by a rule, which seldom changes.
const PAUSES_IF_INVALID: usize = 3;
/// Objects of a wave that are created at once: the API server writes down together what comes together.
const AT_ONCE: usize = 48;
/// Problems that the status lists.
const SHOWN_PROBLEMS: usize = 30;

/// The resources that this API server offers, by folder.
pub(super) struct Resources {
    namespaced: BTreeMap<String, ApiResource>,
    cluster: BTreeMap<String, ApiResource>,
}

impl Resources {
    pub(super) async fn discover(client: &Client) -> Result<Self> {
        let mut all = Self { namespaced: BTreeMap::new(), cluster: BTreeMap::new() };
        for offered in capture_resources(client).await? {
            let of_scope = if offered.cluster { &mut all.cluster } else { &mut all.namespaced };
            of_scope.insert(offered.name.folder(), offered.api);
        }
        Ok(all)
    }

    /// The resource of a captured object; `None`: this cluster does not know it.
    pub(super) fn find(&self, captured: &Captured) -> Option<&ApiResource> {
        let of_scope = if captured.cluster { &self.cluster } else { &self.namespaced };
        of_scope.get(&captured.resource.folder())
    }
}

/// What became of one object.
pub(super) enum Outcome {
    Created,
    Updated,
    /// It is there, and that is all that was wanted.
    Present,
    /// It was left as it was found, which the user has to know: why.
    Skipped(String),
    /// Why.
    Refused(Refused),
}

/// Why an object was refused.
pub(super) struct Refused {
    why: String,
    /// It is refused for what it is or by a rule, so that waiting seldom helps.
    is_invalid: bool,
}

impl Refused {
    fn of(status: &Status) -> Self {
        Self { why: status.message.clone(), is_invalid: matches!(status.code, 400 | 403 | 422) }
    }
}

/// Where objects are put, and with whose rights.
struct Places<'a> {
    context: &'a Context,
    namespace: &'a str,
    point: &'a str,
    /// When the restore was asked for.
    since: Option<Timestamp>,
    existing: ExistingResources,
    /// For what lies outside of the namespace.
    account: Option<&'a Client>,
    resources: Resources,
}

/// Creates an object.
pub(super) async fn create(api: &Api<DynamicObject>, object: &DynamicObject) -> Result<Outcome> {
    let parameters = PostParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PostParams::default() };
    match api.create(&parameters, object).await {
        Ok(_) => Ok(Outcome::Created),
        Err(kube::Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists" => {
            Ok(Outcome::Skipped("exists and was left as it is".to_owned()))
        }
        Err(kube::Error::Api(status)) => Ok(Outcome::Refused(Refused::of(&status))),
        Err(error) => Err(error).context("cannot create an object"),
    }
}

impl Places<'_> {
    async fn put(&self, captured: &Captured) -> Result<Outcome> {
        let refused = |why: String, is_invalid| Ok(Outcome::Refused(Refused { why, is_invalid }));
        let Some(resource) = self.resources.find(captured) else {
            let why = format!("this cluster does not offer {}/{}", captured.resource.qualified(), captured.version);
            return refused(why, false);
        };
        let mut form = if captured.cluster {
            restored_cluster_form(captured.object.clone(), self.point)
        } else {
            restored_form(&captured.resource, captured.object.clone(), self.namespace, self.point)
        };
        // The version that this server prefers; a captured one may be gone.
        if let Some(fields) = form.as_object_mut() {
            fields.insert("apiVersion".to_owned(), resource.api_version.clone().into());
        }
        let object: DynamicObject = match serde_json::from_value(form) {
            Ok(object) => object,
            Err(error) => return refused(format!("it is malformed: {error}"), true),
        };
        if captured.cluster {
            let api = |client: &Client| Api::all_with(client.clone(), resource);
            return cluster::put(&api(&self.context.client), self.account.map(api).as_ref(), captured, &object).await;
        }
        let api = Api::namespaced_with(self.context.client.clone(), self.namespace, resource);
        match create(&api, &object).await? {
            Outcome::Skipped(_) if self.created_it(&api, &captured.name).await? => Ok(Outcome::Created),
            Outcome::Skipped(_) if self.existing == ExistingResources::Update => update(&api, captured, &object).await,
            outcome => Ok(outcome),
        }
    }

    /// Whether this restore created an object that exists, in an earlier life of the controller.
    async fn created_it(&self, api: &Api<DynamicObject>, name: &str) -> Result<bool> {
        let found = api.get_metadata_opt(name).await.context("cannot look at an existing object")?;
        Ok(found.is_some_and(|found| is_of(&found.metadata, self.point, self.since)))
    }

    /// Puts all objects, wave by wave; returns those that were refused.
    async fn round(&self, left: Vec<Captured>, counts: &mut ObjectsRestoreStatus) -> Result<Vec<(Captured, Refused)>> {
        let mut refused = Vec::new();
        for wave in left.chunk_by(|one, other| order(one) == order(other)) {
            // As a list of boxes, or the compiler does not see that each lives as long as its object.
            let puts: Vec<_> = wave.iter().map(|captured| self.put(captured).boxed()).collect();
            let outcomes: Vec<_> = stream::iter(puts).buffered(AT_ONCE).try_collect().await?;
            refused.extend(wave.iter().zip(outcomes).filter_map(|(captured, outcome)| {
                let why = count(counts, captured, outcome)?;
                Some((captured.clone(), why))
            }));
        }
        Ok(refused)
    }
}

/// Whether an object was brought back from this recovery point since a restore was asked for.
fn is_of(found: &ObjectMeta, point: &str, since: Option<Timestamp>) -> bool {
    let from = found.annotations.as_ref().and_then(|annotations| annotations.get(labels::RESTORED_FROM));
    let made = found.creation_timestamp.as_ref().map(|made| made.0);
    from.is_some_and(|from| from == point) && made.zip(since).is_some_and(|(made, since)| made >= since)
}

/// Counts what became of an object; gives the refusal back if it was refused.
fn count(counts: &mut ObjectsRestoreStatus, captured: &Captured, outcome: Outcome) -> Option<Refused> {
    match outcome {
        Outcome::Created => counts.created += 1,
        Outcome::Updated => counts.updated += 1,
        Outcome::Present => {}
        Outcome::Skipped(why) => {
            counts.skipped += 1;
            counts.problems.push(format!("{}: {why}", captured.shown()));
        }
        Outcome::Refused(why) => {
            debug!(object = captured.shown(), why = why.why, "refused");
            return Some(why);
        }
    }
    None
}

async fn update(api: &Api<DynamicObject>, captured: &Captured, object: &DynamicObject) -> Result<Outcome> {
    let patch = PatchParams::apply(CONTROLLER_MANAGER).force();
    match api.patch(&captured.name, &patch, &Patch::Apply(object)).await {
        Ok(_) => Ok(Outcome::Updated),
        Err(kube::Error::Api(status)) => Ok(Outcome::Refused(Refused::of(&status))),
        Err(error) => Err(error).context("cannot update an object"),
    }
}

/// The wave that an object belongs to.
fn order(captured: &Captured) -> u8 {
    if captured.cluster { cluster_wave(&captured.resource).unwrap_or(u8::MAX) } else { wave(&captured.resource) }
}

/// Creates objects in waves, round after round, until all are there or nothing moves any more.
pub(super) async fn put_all(
    run: &Run,
    context: &Context,
    account: Option<&Client>,
    mut left: Vec<Captured>,
) -> Result<ObjectsRestoreStatus> {
    if left.is_empty() {
        return Ok(ObjectsRestoreStatus::default());
    }
    left.sort_by_cached_key(|captured| (order(captured), captured.resource.clone(), captured.name.clone()));
    let mut places = Places {
        context,
        namespace: &run.namespace,
        point: run.status.recovery_point.as_ref().map(|point| point.id.as_str()).unwrap_or_default(),
        since: run.restore.metadata.creation_timestamp.as_ref().map(|since| since.0),
        existing: run.restore.spec.existing.resources,
        account,
        resources: Resources::discover(&context.client).await?,
    };
    let mut counts = ObjectsRestoreStatus::default();
    let mut idle = 0;
    loop {
        let before = left.len();
        let refused = places.round(left, &mut counts).await?;
        idle = if refused.len() < before { 0 } else { idle + 1 };
        let is_hopeless = refused.iter().all(|(_, why)| why.is_invalid);
        let patience = if is_hopeless { PAUSES_IF_INVALID } else { PAUSES.len() };
        if refused.is_empty() || idle > patience {
            counts.failed = refused.len() as u64;
            let failures = refused.into_iter().map(|(captured, why)| format!("{}: {}", captured.shown(), why.why));
            counts.problems = failures.chain(counts.problems).take(SHOWN_PROBLEMS).collect();
            return Ok(counts);
        }
        if let Some(pause) = idle.checked_sub(1).and_then(|number| PAUSES.get(number)) {
            tokio::time::sleep(*pause).await;
        }
        // A definition may have been established meanwhile.
        if refused.iter().any(|(captured, _)| places.resources.find(captured).is_none()) {
            places.resources = Resources::discover(&context.client).await?;
        }
        left = refused.into_iter().map(|(captured, _)| captured).collect();
    }
}

/// Applies all objects, and ends the restore unless streams are left to restore.
pub(super) async fn apply(run: &mut Run, context: &Context) -> Result<()> {
    let repository = match run.open_repository(context).await? {
        Ok((repository, _)) => repository,
        Err(error) => return run.fail(context, error.reason, error.message).await,
    };
    let account = match cluster::account(run, context).await? {
        Ok(account) => account,
        Err(refusal) => return run.fail(context, refusal.reason, refusal.message).await,
    };
    let point = run.status.recovery_point.clone().context("no recovery point is pinned")?;
    let mut objects = match captured_objects(&repository, &point.id).await {
        Ok(objects) => objects,
        Err((reason, message)) => return run.fail(context, reason, message).await,
    };
    objects.retain(|captured| {
        if captured.cluster {
            account.is_some() && cluster_wave(&captured.resource) == Some(ANSWERING_WAVE)
        } else {
            !is_filled_claim(captured, run)
        }
    });
    let counts = put_all(run, context, account.as_ref(), objects).await?;
    applied(run, context, counts).await
}

/// Claims that this restore made and filled: they exist, and that is no news.
fn is_filled_claim(captured: &Captured, run: &Run) -> bool {
    captured.resource.plural == "persistentvolumeclaims"
        && run.status.volumes.iter().any(|volume| volume.claim == captured.name)
}

async fn applied(run: &mut Run, context: &Context, counts: ObjectsRestoreStatus) -> Result<()> {
    let (all, failed, problems) = (told(&counts), counts.failed, counts.problems.join("; "));
    run.status.objects = Some(counts);
    if failed > 0 {
        return run.fail(context, Reason::ApplyFailed, format!("{all}, {failed} refused: {problems}")).await;
    }
    if streams::are_left(run) {
        streams::note_begin(run, "objects and volumes are back; streams are being restored");
        return run.save(context).await;
    }
    finish(run, context).await
}

fn told(counts: &ObjectsRestoreStatus) -> String {
    format!("{} objects created, {} updated, {} left as they were", counts.created, counts.updated, counts.skipped)
}

/// Ends the restore well.
pub(super) async fn finish(run: &mut Run, context: &Context) -> Result<()> {
    let counts = run.status.objects.clone().unwrap_or_default();
    let files: u64 = run.status.volumes.iter().map(|volume| volume.failed).sum();
    let outside = run.status.cluster_objects.as_ref().map_or(0, |objects| objects.skipped);
    let all = format!("{}{}", told(&counts), streams::note_end(run));
    let (phase, reason, message) = if files > 0 || counts.skipped > 0 || outside > 0 {
        let message = format!(
            "{all}; {files} files not restored in full, {outside} cluster-scoped objects not as the application needs them: see status.volumes, status.objects and status.clusterObjects"
        );
        (Phase::Partial, Reason::CompletedWithProblems, message)
    } else {
        (Phase::Succeeded, Reason::Completed, all)
    };
    info!(created = counts.created, skipped = counts.skipped, files, outside, "succeeded");
    run.status.phase = phase;
    run.status.completion_time = Some(Time(Timestamp::now()));
    run.set(ConditionType::Succeeded, State::True, reason, message.clone());
    run.save(context).await?;
    context.metrics.restores_succeeded.inc();
    context.events.normal(&run.restore, reason, message).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_restore_created_is_told_from_what_was_there() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let found = |from: Option<&str>, second| ObjectMeta {
            annotations: from.map(|from| [(labels::RESTORED_FROM.to_owned(), from.to_owned())].into()),
            creation_timestamp: Some(Time(at(second))),
            ..ObjectMeta::default()
        };
        let since = Some(at(100));
        assert!(is_of(&found(Some("point"), 100), "point", since));
        assert!(!is_of(&found(Some("point"), 99), "point", since), "an earlier restore did");
        assert!(!is_of(&found(Some("other"), 101), "point", since));
        assert!(!is_of(&found(None, 101), "point", since));
        assert!(!is_of(&found(Some("point"), 101), "point", None));
    }
}
