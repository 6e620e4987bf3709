//! A model of writing and expiring without locks, searched exhaustively: every interleaving of writers, deleters, a
//! repacking session, a reader and one who merges the index, with forced aborts, deleters that stop anywhere, and listings
//! of any age.
//!
//! Of merging it has what expiry depends on: which segments may be merged and so go away. That a merged segment is still
//! found is what `merge_model` searches.
//!
//! It is a model of the protocol, not of the code; `expire/tests` run the code. Each rule of the protocol has a mutation
//! here that leaves it out, and that the search must find a loss for: otherwise the model would prove nothing.
//!
//! Long because model, properties and mutations are read together.
#![allow(clippy::unwrap_used)]

use stateright::{Checker, Model, Property};

/// Sets of packs and of snapshots, a bit each. Packs 0 and 1 and snapshots 0 and 1 are old; session `i` has number `2 + i`.
type Set = u8;
const OLD_PARENT: usize = 0;
const OLD_MOVED: usize = 1;

fn bit(number: usize) -> Set {
    1 << number
}

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    None,
    SealBeforeCondemning,
    DoNotWait,
    DoNotRescue,
    CleanWithoutSealingTheIndex,
    NoMaskOnWhatIsFound,
    NoMaskOnWhatIsInherited,
    InheritWithoutAskingWhatLives,
    BeginARoundBeforeTheLastIsDone,
    IgnorePins,
    /// `Run::merge_index` merges whatever waits.
    MergeWhatIsOpen,
    /// It merges what is settled by the registrations that it read, also of sessions of which it learned later: they
    /// registered since, so that none of them is among these. This was a loss in the code.
    MergeWhatCameLater,
    /// `Run::open_sessions` reads the registrations of the settled epoch only.
    MergeByOneEpoch,
    /// `Run::sort_packs` asks the segments of sessions of any epoch what they published.
    CleanWhateverTheEpoch,
    /// `Run::look` does not look for `final` after the segments.
    CleanWithoutLookingForFinal,
}

/// What a session does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Writer,
    /// Repacks pack 1, which snapshot 1 refers to.
    Mover,
    /// Reads snapshot 1.
    Reader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Start,
    Registered,
    Masked,
    Uploaded,
    Published,
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Decision {
    Committed,
    Aborted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Session {
    kind: Kind,
    step: Step,
    epoch: usize,
    mask: Set,
    /// The newest round that was decided when the mask was loaded.
    settled: usize,
    refs: Set,
    decision: Option<Decision>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Final {
    packs: Set,
    /// The snapshots of earlier epochs that live.
    live: Set,
    /// The session whose references of snapshot 1 are in force.
    moved: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Deleter {
    Idle,
    Looked {
        round: usize,
        candidates: Set,
    },
    Sealing {
        round: usize,
    },
    Waiting {
        round: usize,
    },
    Settled {
        round: usize,
        decided: Final,
    },
    Deleting {
        round: usize,
        left: Set,
    },
    /// Found no segment of an aborted session, when this round was the newest that is done: `published::seal`.
    Cleaning {
        session: usize,
        settled: usize,
    },
    /// Took its pack for unpublished: `Run::delete_unpublished` follows.
    Cleared {
        session: usize,
    },
}

/// The steps of `Run::merge_index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Merger {
    Idle,
    /// `Index::waiting`: the sessions of which a segment was loaded.
    Loaded {
        waiting: Set,
    },
    /// `Run::standing`: the newest round that is done.
    Stands {
        waiting: Set,
        settled: usize,
    },
    /// The sessions whose segments it takes.
    Chose {
        sessions: Set,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    condemned: [Option<Set>; 4],
    finals: [Option<Final>; 4],
    done: [bool; 4],
    /// By epoch and lane.
    sealed: [[bool; 2]; 4],
    exists: Set,
    /// Packs that the index names, in segments or merged.
    published: Set,
    /// Sessions whose index is sealed.
    closed: Set,
    /// Sessions whose segment is in a version of the index, and those whose segment was removed for that.
    merged: Set,
    removed: Set,
    forgotten: Set,
    /// Sessions whose commit expired and was removed.
    dropped: Set,
    sessions: Vec<Session>,
    deleters: Vec<Deleter>,
    mergers: Vec<Merger>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Register(usize),
    Load(usize),
    /// Refers to a pack that the index names, after a look whether it is there.
    Find(usize, usize),
    /// Refers to what a snapshot refers to, without a look; `true`: by a new listing.
    Inherit(usize, usize, bool),
    Upload(usize),
    Publish(usize),
    Commit(usize),
    Release(usize),
    Forget(usize),
    /// `true`: the deleter sees all commits; `false`: none.
    Look(usize, bool),
    Go(usize),
    Abort(usize, usize),
    /// `Run::abort_silent`, by whoever looks.
    Silence(usize),
    /// A deleter, a session, the newest round that is done as the deleter saw it.
    Clean(usize, usize, usize),
    Merge(usize),
    /// `Index::clean`, by anybody, of a session's segment.
    Remove(usize),
}

#[derive(Clone)]
struct Protocol {
    kinds: Vec<Kind>,
    deleters: usize,
    rounds: usize,
    lanes: usize,
    mergers: usize,
    /// Snapshots that are forgotten from the beginning, and those that may be at any time.
    forgotten: Set,
    may_forget: Set,
    mutation: Mutation,
}

impl Protocol {
    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == mutation
    }

    fn lane(&self, session: usize) -> usize {
        session % self.lanes
    }
}

impl State {
    fn committed(&self, session: usize) -> bool {
        self.sessions[session].decision == Some(Decision::Committed)
    }

    /// The epoch of a snapshot's session.
    fn epoch(&self, snapshot: usize) -> usize {
        if snapshot < 2 { 0 } else { self.sessions[snapshot - 2].epoch }
    }

    /// The session that moved snapshot 1, of epochs before `before`.
    fn mover(&self, before: usize) -> Option<usize> {
        (0..self.sessions.len())
            .find(|s| self.sessions[*s].kind == Kind::Mover && self.committed(*s) && self.sessions[*s].epoch < before)
    }

    /// What a snapshot refers to, when this session moved snapshot 1.
    fn refs(&self, snapshot: usize, moved: Option<usize>) -> Set {
        match (snapshot, moved) {
            (OLD_MOVED, Some(session)) => bit(2 + session),
            (0 | 1, _) => bit(snapshot),
            _ => self.sessions[snapshot - 2].refs,
        }
    }

    /// The snapshots that committed sessions of epochs before `before` made.
    fn snapshots(&self, before: usize) -> Vec<usize> {
        let made = (0..self.sessions.len()).filter(|s| {
            self.sessions[*s].kind == Kind::Writer && self.committed(*s) && self.sessions[*s].epoch < before
        });
        [OLD_PARENT, OLD_MOVED].into_iter().chain(made.map(|session| 2 + session)).collect()
    }

    fn newest(&self) -> usize {
        (1..4).rev().find(|round| self.condemned[*round].is_some()).unwrap_or(0)
    }

    fn epoch_is_sealed(&self, epoch: usize, lanes: usize) -> bool {
        self.sealed[epoch][..lanes].iter().all(|sealed| *sealed)
    }

    fn is_done(&self, round: usize) -> bool {
        round == 0 || self.done[round]
    }

    fn settled(&self) -> usize {
        (0..4).rev().find(|round| self.is_done(*round)).unwrap_or(0)
    }

    /// `registered` of an epoch.
    fn registered(&self, epoch: usize) -> Set {
        let is_in = |s: &usize| self.sessions[*s].step != Step::Start && self.sessions[*s].epoch == epoch;
        (0..self.sessions.len()).filter(is_in).fold(0, |all, session| all | bit(session))
    }

    /// Whether the session's segment lies in the store.
    fn has_segment(&self, session: usize) -> bool {
        self.published & bit(2 + session) != 0 && self.removed & bit(session) == 0
    }

    /// Sessions of which a segment is not merged.
    fn waiting(&self) -> Set {
        let waits = |s: &usize| self.has_segment(*s) && self.merged & bit(*s) == 0;
        (0..self.sessions.len()).filter(waits).fold(0, |all, session| all | bit(session))
    }

    /// Sessions of the epoch before the round's that are not decided and that it must wait for.
    fn running(&self, round: usize) -> Vec<usize> {
        let is_running = |s: &Session| s.step != Step::Start && s.epoch + 1 == round && s.decision.is_none();
        (0..self.sessions.len())
            .filter(|s| is_running(&self.sessions[*s]) && self.sessions[*s].kind != Kind::Reader)
            .collect()
    }

    /// What the round decides now.
    fn decide(&self, round: usize, protocol: &Protocol) -> Final {
        let is_pin =
            |s: &&Session| s.kind == Kind::Reader && s.step != Step::Start && s.epoch < round && s.decision.is_none();
        let lived = |snapshot: usize| match self.finals[round - 1] {
            Some(before) if self.epoch(snapshot) < round - 1 => before.live & bit(snapshot) != 0,
            _ => true,
        };
        let is_live = |snapshot: &usize| lived(*snapshot) && self.forgotten & bit(*snapshot) == 0;
        let live: Vec<_> = self.snapshots(round).into_iter().filter(is_live).collect();
        let moved = self.mover(round);
        let mut refs: Set = live.iter().map(|snapshot| self.refs(*snapshot, moved)).fold(0, |all, refs| all | refs);
        if !protocol.is(Mutation::IgnorePins) {
            // What readers read is kept, whether its snapshot lives or not; they are not waited for.
            refs |= self.sessions.iter().filter(is_pin).fold(0, |all, s| all | s.refs);
        }
        let condemned = self.condemned[round].unwrap_or(0);
        let packs = if protocol.is(Mutation::DoNotRescue) { condemned } else { condemned & !refs };
        Final { packs, live: live.iter().fold(0, |all, snapshot| all | bit(*snapshot)), moved }
    }

    fn candidates(&self, is_fresh: bool) -> Set {
        let is_decided = |s: &usize| self.sessions[*s].decision.is_some() || self.dropped & bit(*s) != 0;
        let decided = (0..self.sessions.len()).filter(is_decided);
        let of_decided = decided.fold(bit(0) | bit(1), |all, session| all | bit(2 + session));
        let moved = self.mover(usize::MAX);
        let live = self.snapshots(usize::MAX).into_iter().filter(|s| self.forgotten & bit(*s) == 0);
        let refs = if is_fresh { live.fold(0, |all, snapshot| all | self.refs(snapshot, moved)) } else { 0 };
        self.published & self.exists & of_decided & !refs
    }

    /// What a session may inherit from a snapshot; `None`: it expired, or what it refers to is masked.
    fn inherits(&self, session: usize, snapshot: usize, is_fresh: bool, protocol: &Protocol) -> Option<Set> {
        let s = &self.sessions[session];
        let settled = self.finals[s.settled];
        let asks = !protocol.is(Mutation::InheritWithoutAskingWhatLives);
        let seen = if is_fresh { self.mover(usize::MAX) } else { None };
        let moved = match settled {
            Some(settled) if asks => seen.or(settled.moved),
            _ => seen,
        };
        if let Some(settled) = settled.filter(|_| asks)
            && self.epoch(snapshot) < s.settled
            && settled.live & bit(snapshot) == 0
        {
            return None;
        }
        let refs = self.refs(snapshot, moved);
        let is_masked = refs & s.mask != 0 && !protocol.is(Mutation::NoMaskOnWhatIsInherited);
        (!is_masked).then_some(refs)
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let session = |kind: &Kind| Session {
            kind: *kind,
            step: Step::Start,
            epoch: 0,
            mask: 0,
            settled: 0,
            refs: 0,
            decision: None,
        };
        vec![State {
            condemned: [None; 4],
            finals: [None; 4],
            done: [false; 4],
            sealed: [[false; 2]; 4],
            exists: bit(0) | bit(1),
            published: bit(0) | bit(1),
            closed: 0,
            merged: 0,
            removed: 0,
            forgotten: self.forgotten,
            dropped: 0,
            sessions: self.kinds.iter().map(session).collect(),
            deleters: vec![Deleter::Idle; self.deleters],
            mergers: vec![Merger::Idle; self.mergers],
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (number, session) in state.sessions.iter().enumerate() {
            self.session_actions(state, number, session, actions);
        }
        let may_forget = self.may_forget & !state.forgotten;
        for snapshot in state.snapshots(usize::MAX) {
            if may_forget & bit(snapshot) != 0 {
                actions.push(Action::Forget(snapshot));
            }
        }
        for (number, deleter) in state.deleters.iter().enumerate() {
            self.deleter_actions(state, number, *deleter, actions);
        }
        if self.mergers > 0 {
            self.merge_actions(state, actions);
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        match action {
            Action::Register(n) => {
                let epoch = (0..4).find(|epoch| !state.sealed[*epoch][self.lane(n)])?;
                // What it pins it reads before.
                let pinned = if state.sessions[n].kind == Kind::Reader {
                    state.refs(OLD_MOVED, state.mover(usize::MAX))
                } else {
                    0
                };
                let session = &mut state.sessions[n];
                (session.step, session.epoch, session.refs) = (Step::Registered, epoch, pinned);
            }
            Action::Load(n) => self.load(&mut state, n),
            Action::Find(n, pack) => {
                (state.sessions[n].refs, state.sessions[n].step) = (bit(pack), Step::Published);
            }
            Action::Inherit(n, snapshot, is_fresh) => {
                let refs = before.inherits(n, snapshot, is_fresh, self)?;
                (state.sessions[n].refs, state.sessions[n].step) = (refs, Step::Published);
            }
            Action::Upload(n) => {
                state.exists |= bit(2 + n);
                state.sessions[n].step = Step::Uploaded;
            }
            Action::Publish(n) => {
                if state.closed & bit(n) == 0 {
                    state.published |= bit(2 + n);
                    (state.sessions[n].refs, state.sessions[n].step) = (bit(2 + n), Step::Published);
                } else {
                    state.sessions[n].step = Step::Ended;
                }
            }
            Action::Commit(n) => {
                state.sessions[n].decision.get_or_insert(Decision::Committed);
                state.sessions[n].step = Step::Ended;
            }
            Action::Release(n) => {
                state.sessions[n].decision.get_or_insert(Decision::Aborted);
                state.sessions[n].step = Step::Ended;
            }
            Action::Forget(snapshot) => state.forgotten |= bit(snapshot),
            Action::Look(n, is_fresh) => {
                let round = state.newest() + 1;
                let looked = Deleter::Looked { round, candidates: state.candidates(is_fresh) };
                state.deleters[n] = looked;
            }
            Action::Go(n) => self.go(&mut state, n),
            Action::Abort(_, session) | Action::Silence(session) => {
                state.sessions[session].decision.get_or_insert(Decision::Aborted);
            }
            Action::Clean(n, session, settled) => {
                if !self.is(Mutation::CleanWithoutSealingTheIndex) {
                    state.closed |= bit(session);
                }
                state.deleters[n] = Deleter::Cleaning { session, settled };
            }
            Action::Merge(n) => self.merge(&mut state, n),
            Action::Remove(session) => state.removed |= bit(session),
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing that lives is lost", |_, state: &State| {
                let moved = state.mover(usize::MAX);
                let live = state.snapshots(usize::MAX).into_iter().filter(|s| state.forgotten & bit(*s) == 0);
                live.map(|snapshot| state.refs(snapshot, moved)).all(|refs| refs & !state.exists == 0)
            }),
            Property::always("nothing that is read is lost", |_, state: &State| {
                let reads = |s: &&Session| s.kind == Kind::Reader && s.step == Step::Masked && s.decision.is_none();
                state.sessions.iter().filter(reads).all(|s| s.refs & !state.exists == 0)
            }),
            Property::sometimes("all rounds are done", |protocol: &Protocol, state: &State| {
                state.done[protocol.rounds]
            }),
            Property::sometimes("something is deleted", |_, state: &State| state.exists & bit(0) == 0),
            Property::sometimes(REMOVED, |_, state: &State| state.removed != 0),
            Property::sometimes(LATE_ABORT, |_, state: &State| {
                let is_aborted = |s: &usize| state.sessions[*s].decision == Some(Decision::Aborted);
                (0..state.sessions.len()).filter(is_aborted).any(|s| state.dropped & state.removed & bit(s) != 0)
            }),
            Property::sometimes("something is rescued", |_, state: &State| {
                (1..4).any(|k| state.finals[k].is_some_and(|f| f.packs != state.condemned[k].unwrap_or(0)))
            }),
        ]
    }
}

impl Protocol {
    fn session_actions(&self, state: &State, n: usize, session: &Session, actions: &mut Vec<Action>) {
        match (session.step, session.kind) {
            (Step::Start, _) => actions.push(Action::Register(n)),
            (Step::Registered, _) => actions.push(Action::Load(n)),
            (Step::Masked, Kind::Writer) => {
                let is_masked = |pack: usize| session.mask & bit(pack) != 0 && !self.is(Mutation::NoMaskOnWhatIsFound);
                let others = (0..state.sessions.len()).filter(|other| *other != n).map(|other| 2 + other);
                let found = std::iter::once(0).chain(others);
                let found = found.filter(|pack| state.exists & state.published & bit(*pack) != 0 && !is_masked(*pack));
                actions.extend(found.map(|pack| Action::Find(n, pack)));
                actions.extend([Action::Inherit(n, OLD_PARENT, true), Action::Upload(n)]);
                if self.kinds.contains(&Kind::Mover) {
                    actions.extend([Action::Inherit(n, OLD_MOVED, true), Action::Inherit(n, OLD_MOVED, false)]);
                }
            }
            (Step::Masked, Kind::Mover) => {
                // It copies what is there, and writes down no reference that is masked.
                let refs = state.inherits(n, OLD_MOVED, true, self);
                if refs == Some(bit(OLD_MOVED)) && state.exists & bit(OLD_MOVED) != 0 {
                    actions.push(Action::Upload(n));
                }
            }
            (Step::Masked, Kind::Reader) => actions.push(Action::Release(n)),
            (Step::Uploaded, _) => actions.push(Action::Publish(n)),
            (Step::Published, _) => actions.push(Action::Commit(n)),
            (Step::Ended, _) => {}
        }
    }

    fn deleter_actions(&self, state: &State, n: usize, deleter: Deleter, actions: &mut Vec<Action>) {
        match deleter {
            Deleter::Idle => {
                let newest = state.newest();
                let may_begin = newest == 0 || state.done[newest] || self.is(Mutation::BeginARoundBeforeTheLastIsDone);
                if newest > 0 && !state.done[newest] {
                    actions.push(Action::Go(n));
                }
                if may_begin && newest < self.rounds {
                    actions.extend([Action::Look(n, true), Action::Look(n, false)]);
                }
                for (number, session) in state.sessions.iter().enumerate() {
                    let is_there = state.exists & bit(2 + number) != 0;
                    if session.decision == Some(Decision::Aborted) && is_there && !state.has_segment(number) {
                        // It may have looked at the rounds long ago.
                        let is_recent = state.is_done(session.epoch);
                        if self.is(Mutation::CleanWhateverTheEpoch) {
                            actions.push(Action::Clean(n, number, state.settled()));
                        } else if is_recent {
                            actions.push(Action::Clean(n, number, session.epoch));
                        }
                    }
                }
            }
            Deleter::Waiting { round } => {
                let running = state.running(round);
                if state.finals[round].is_some() || running.is_empty() || self.is(Mutation::DoNotWait) {
                    actions.push(Action::Go(n));
                }
                actions.extend(running.into_iter().map(|session| Action::Abort(n, session)));
                let readers = (0..state.sessions.len()).filter(|s| state.sessions[*s].kind == Kind::Reader);
                actions.extend(readers.filter(|s| state.sessions[*s].step != Step::Start).map(|s| Action::Abort(n, s)));
            }
            _ => actions.push(Action::Go(n)),
        }
    }

    fn load(&self, state: &mut State, n: usize) {
        let epoch = state.sessions[n].epoch;
        let (mask, settled) = match (epoch, state.finals[epoch]) {
            (0, _) => (0, 0),
            (_, Some(decided)) => (decided.packs, epoch),
            // Left out by the mutation that seals first: then there may be no mark yet.
            (_, None) => (state.condemned[epoch].unwrap_or(0), epoch - 1),
        };
        let session = &mut state.sessions[n];
        (session.mask, session.settled, session.step) = (mask, settled, Step::Masked);
        if session.kind == Kind::Reader {
            let pinned = session.refs;
            // A snapshot that is about to expire is not kept by a pin that comes too late.
            if state.inherits(n, OLD_MOVED, true, self) != Some(pinned) {
                state.sessions[n].step = Step::Ended;
            }
        }
    }

    fn go(&self, state: &mut State, n: usize) {
        let seals_first = self.is(Mutation::SealBeforeCondemning);
        state.deleters[n] = match state.deleters[n] {
            Deleter::Idle => Deleter::Sealing { round: state.newest() },
            Deleter::Looked { round, candidates } => {
                if seals_first && !state.epoch_is_sealed(round - 1, self.lanes) {
                    state.sealed[round - 1] = [true; 2];
                    Deleter::Looked { round, candidates }
                } else {
                    state.condemned[round].get_or_insert(candidates);
                    Deleter::Sealing { round }
                }
            }
            Deleter::Sealing { round } => match (0..self.lanes).find(|lane| !state.sealed[round - 1][*lane]) {
                Some(lane) => {
                    state.sealed[round - 1][lane] = true;
                    Deleter::Sealing { round }
                }
                None => Deleter::Waiting { round },
            },
            Deleter::Waiting { round } => match state.finals[round] {
                Some(decided) => Deleter::Deleting { round, left: decided.packs },
                None => Deleter::Settled { round, decided: state.decide(round, self) },
            },
            Deleter::Settled { round, decided } => {
                let decided = *state.finals[round].get_or_insert(decided);
                Deleter::Deleting { round, left: decided.packs }
            }
            Deleter::Deleting { round, left: 0 } => {
                self.drop_commits(state, round);
                state.done[round] = true;
                Deleter::Idle
            }
            Deleter::Deleting { round, left } => {
                let pack = left & left.wrapping_neg();
                state.exists &= !pack;
                Deleter::Deleting { round, left: left & !pack }
            }
            Deleter::Cleaning { settled, .. }
                if state.finals[settled + 1].is_some() && !self.is(Mutation::CleanWithoutLookingForFinal) =>
            {
                Deleter::Idle
            }
            Deleter::Cleaning { session, .. } => Deleter::Cleared { session },
            Deleter::Cleared { session } => {
                state.exists &= !bit(2 + session);
                Deleter::Idle
            }
        };
    }

    /// `Run::remove_dropped`: the commits of which nothing lives; also by who repeats it, whatever is in their place now.
    fn drop_commits(&self, state: &mut State, round: usize) {
        let Some(decided) = state.finals[round] else { return };
        for n in 0..state.sessions.len() {
            let session = state.sessions[n];
            let is_of_writer = self.kinds[n] == Kind::Writer && session.step != Step::Start && session.epoch < round;
            let has_committed = state.committed(n) || state.dropped & bit(n) != 0;
            if is_of_writer && has_committed && decided.live & bit(2 + n) == 0 {
                state.sessions[n].decision = None;
                state.dropped |= bit(n);
            }
        }
    }

    fn merge_actions(&self, state: &State, actions: &mut Vec<Action>) {
        let waits = state.waiting() != 0 || self.is(Mutation::MergeWhatCameLater);
        let goes = |n: &usize| waits || state.mergers[*n] != Merger::Idle;
        actions.extend((0..self.mergers).filter(goes).map(Action::Merge));
        for (number, session) in state.sessions.iter().enumerate() {
            let has_pack = state.exists & bit(2 + number) != 0;
            // Also who looked at the rounds and the registrations long ago.
            if has_pack && session.decision.is_none() && state.is_done(session.epoch) {
                actions.push(Action::Silence(number));
            }
            if state.merged & !state.removed & bit(number) != 0 {
                actions.push(Action::Remove(number));
            }
        }
    }

    /// A step of `Run::merge_index`. Who dies in between takes no more steps; what it left is removed by [`Action::Remove`].
    fn merge(&self, state: &mut State, n: usize) {
        let all = 0..state.sessions.len();
        state.mergers[n] = match state.mergers[n] {
            Merger::Idle => Merger::Loaded { waiting: state.waiting() },
            Merger::Loaded { waiting } => {
                let newest = state.newest();
                let settled = if state.is_done(newest) { newest } else { newest - 1 };
                Merger::Stands { waiting, settled }
            }
            // `Run::open_sessions` looks again whether the next round is done; the order of its reads makes that needless.
            Merger::Stands { waiting, settled } => {
                let next = if self.is(Mutation::MergeByOneEpoch) { 0 } else { state.registered(settled + 1) };
                let open = state.registered(settled) | next;
                // Also what the process remembers of commits that expired since.
                let has_committed = |s: &usize| state.committed(*s) || state.dropped & bit(*s) != 0;
                let committed = all.filter(has_committed).fold(0, |set, session| set | bit(session));
                match self.mutation {
                    Mutation::MergeWhatIsOpen => Merger::Chose { sessions: waiting },
                    Mutation::MergeWhatCameLater => Merger::Chose { sessions: committed | !open },
                    _ if waiting & (committed | !open) == 0 => Merger::Idle,
                    _ => Merger::Chose { sessions: waiting & (committed | !open) },
                }
            }
            Merger::Chose { sessions } => {
                // The index may have loaded more meanwhile; of what is gone there is nothing to take.
                let takes = |s: &usize| sessions & bit(*s) != 0 && state.has_segment(*s);
                state.merged |= all.filter(takes).fold(0, |set, session| set | bit(session));
                Merger::Idle
            }
        };
    }
}

fn writers(count: usize, deleters: usize, rounds: usize, mutation: Mutation) -> Protocol {
    Protocol {
        kinds: vec![Kind::Writer; count],
        deleters,
        rounds,
        lanes: 1,
        mergers: 0,
        forgotten: bit(OLD_PARENT),
        may_forget: 0,
        mutation,
    }
}

fn with(kinds: &[Kind], may_forget: Set, mutation: Mutation) -> Protocol {
    Protocol { kinds: kinds.to_vec(), may_forget, lanes: 2, ..writers(0, 1, 2, mutation) }
}

/// Two writers, of which the first one's snapshot may be forgotten, and one who merges the index.
fn merging(deleters: usize, rounds: usize, mutation: Mutation) -> Protocol {
    Protocol { mergers: 1, may_forget: bit(2), ..writers(2, deleters, rounds, mutation) }
}

/// Searches everything and tells how many states there are.
fn holds(protocol: Protocol) -> usize {
    let merges = protocol.mergers > 0;
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    checker.assert_no_discovery("nothing that lives is lost");
    checker.assert_no_discovery("nothing that is read is lost");
    checker.assert_any_discovery("all rounds are done");
    checker.assert_any_discovery("something is deleted");
    if merges {
        checker.assert_any_discovery(REMOVED);
        checker.assert_any_discovery(LATE_ABORT);
    }
    checker.unique_state_count()
}

/// Searches until something is lost.
fn loses(protocol: Protocol, what: &'static str) {
    use stateright::HasDiscoveries;
    let mutation = protocol.mutation;
    let checker = protocol
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AllOf([what].into_iter().collect()))
        .spawn_bfs()
        .join();
    assert!(checker.discovery(what).is_some(), "{mutation:?} does no harm in {} states", checker.unique_state_count());
}

const LIVES: &str = "nothing that lives is lost";
const REMOVED: &str = "a merged segment is removed";
const LATE_ABORT: &str = "a session is aborted of which the commit expired and the segment is merged";

#[test]
fn two_writers_and_two_deleters_lose_nothing_in_two_rounds() {
    let states = holds(writers(2, 2, 2, Mutation::None));
    assert!(states > 10_000, "{states}");
}

#[test]
fn three_writers_and_one_deleter_lose_nothing() {
    let states = holds(writers(3, 1, 1, Mutation::None));
    assert!(states > 10_000, "{states}");
}

#[test]
fn a_writer_beside_one_who_repacks_and_one_who_expires_loses_nothing() {
    let states = holds(with(&[Kind::Writer, Kind::Mover], bit(OLD_MOVED), Mutation::None));
    assert!(states > 5_000, "{states}");
}

#[test]
fn what_a_reader_pinned_is_not_lost_while_others_repack_and_forget() {
    let states = holds(with(&[Kind::Mover, Kind::Reader], bit(OLD_MOVED), Mutation::None));
    assert!(states > 1_000, "{states}");
}

#[test]
fn writers_and_two_deleters_beside_one_who_merges_the_index_lose_nothing() {
    let states = holds(merging(2, 1, Mutation::None));
    assert!(states > 500_000, "{states}");
}

#[test]
fn writers_and_a_deleter_beside_one_who_merges_the_index_lose_nothing_in_two_rounds() {
    let states = holds(merging(1, 2, Mutation::None));
    assert!(states > 500_000, "{states}");
}

#[test]
fn every_rule_of_merging_beside_expiry_is_needed() {
    for mutation in [
        Mutation::MergeWhatIsOpen,
        Mutation::MergeWhatCameLater,
        Mutation::MergeByOneEpoch,
        Mutation::CleanWhateverTheEpoch,
        Mutation::CleanWithoutLookingForFinal,
    ] {
        loses(merging(1, 1, mutation), LIVES);
    }
}

#[test]
fn every_rule_is_needed() {
    for mutation in [
        Mutation::SealBeforeCondemning,
        Mutation::DoNotWait,
        Mutation::DoNotRescue,
        Mutation::NoMaskOnWhatIsFound,
        Mutation::NoMaskOnWhatIsInherited,
        Mutation::BeginARoundBeforeTheLastIsDone,
        Mutation::InheritWithoutAskingWhatLives,
        Mutation::CleanWithoutSealingTheIndex,
    ] {
        loses(writers(2, 2, 2, mutation), LIVES);
    }
    loses(with(&[Kind::Writer, Kind::Mover], 0, Mutation::InheritWithoutAskingWhatLives), LIVES);
    loses(with(&[Kind::Reader], bit(OLD_MOVED), Mutation::IgnorePins), "nothing that is read is lost");
}
