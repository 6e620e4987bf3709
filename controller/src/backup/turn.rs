//! Asks for turns: before an application is brought to rest, for each snapshot before it is mounted and read, and for each stream.
//! Never in between.

use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lifeboat_crds::conditions::{self, ConditionType, Reason, State};

use super::{Run, decide, streams};
use crate::context::Context;
use crate::dispatch::{self, Kind, Need, Place, Verdict, Work};
use crate::task;

impl Run {
    pub(super) fn work(&self, key: String, need: Need) -> Work {
        Work {
            key,
            kind: Kind::Backup,
            repository: self.status.repository.as_ref().map(|repository| repository.name.clone()).unwrap_or_default(),
            namespace: self.namespace.clone(),
            due: dispatch::due(&self.backup),
            need,
        }
    }

    /// Shows what the backup waits for, or that it does not wait any more.
    pub(super) fn note_waiting(&mut self, waits: Option<(Reason, String)>) {
        match waits {
            Some((reason, message)) => self.set(ConditionType::Waiting, State::True, reason, message),
            None if conditions::is_true(&self.status.conditions, ConditionType::Waiting) => {
                self.set(ConditionType::Waiting, State::False, Reason::Done, "it has its turn");
            }
            None => {}
        }
    }
}

/// Asks for the turn to bring the application to rest. `Some`: not yet; ask again after this.
pub(super) async fn admit(run: &mut Run, context: &Context) -> Result<Option<Duration>> {
    let before = run.status.clone();
    let need = Need::Rest(dispatch::live_nodes(&run.status));
    let pause = match context.dispatch.ask(context, run.work(dispatch::rest_key(&run.uid), need)).await? {
        Verdict::Start(_) => {
            run.status.admitted_at = Some(Time(Timestamp::now()));
            run.note_waiting(None);
            None
        }
        Verdict::Wait { reason, message, ahead } => {
            run.note_waiting(Some((reason, message)));
            Some(dispatch::pause(ahead))
        }
    };
    if run.status != before {
        run.save(context).await?;
    }
    Ok(pause)
}

/// Asks for the turns of all streams that are still to run and all snapshots that are still to be mounted. `Some`: nothing goes on;
/// ask again after this. The backup may have ended when this returns.
pub(super) async fn dispatch(run: &mut Run, context: &Context) -> Result<Option<Duration>> {
    let tasks = task::of_owner(&context.namespaced(&context.namespace), &run.uid).await?;
    let streams::Turns { begins, mut waits, mut pauses, refused } = streams::ask(run, context).await?;
    if let Some((reason, message)) = refused {
        run.fail(context, reason, message).await?;
        return Ok(Some(Duration::ZERO));
    }
    let mut goes_on = begins;
    for number in 0..run.status.volumes.len() {
        let volume = &run.status.volumes[number];
        if !decide::is_unexposed(&run.uid, volume, &tasks) {
            continue;
        }
        if volume.dispatched_at.is_some() {
            goes_on = true;
            continue;
        }
        let place = match &volume.volume {
            Some(name) => context.dispatch.place_of(context, name).await?,
            None => Place::Anywhere,
        };
        let key = dispatch::volume_key(&run.uid, &decide::reading_key(volume));
        let verdict = context.dispatch.ask(context, run.work(key, Need::Volume(place))).await?;
        let volume = &mut run.status.volumes[number];
        match verdict {
            Verdict::Start(node) => {
                (volume.node, volume.message) = (node, None);
                volume.dispatched_at = Some(Time(Timestamp::now()));
                goes_on = true;
            }
            Verdict::Wait { reason, message, ahead } => {
                volume.message = Some(format!("waiting for its turn: {message}"));
                let claim = volume.claim.clone();
                waits.get_or_insert_with(|| (reason, format!("the volume of the claim {claim} waits: {message}")));
                pauses.push(dispatch::pause(ahead));
            }
        }
    }
    run.note_waiting(waits);
    // What tasks reported meanwhile is written as well.
    if run.backup.status.as_ref() != Some(&run.status) {
        run.save(context).await?;
    }
    Ok(pauses.into_iter().min().filter(|_| !goes_on))
}
