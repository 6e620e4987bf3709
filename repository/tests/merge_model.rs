//! A model of merging the index in versions, searched exhaustively: sessions publish segments while several merge them, remove
//! what became useless and look chunks up, each with the version that it read last, however long ago.
//!
//! It follows `index/merge.rs`, `index/version.rs` and `Index::refresh`, `find` and `clean`. Every store access is a step of
//! its own, and whoever takes no more steps died there, so that all crashes are among the interleavings. Which segments may be
//! merged is not asked here: that depends on expiry, and `expire_model` searches it. Each rule has a mutation that leaves it
//! out, and that the search must find harmful.
#![allow(clippy::unwrap_used)]

use stateright::{Checker, HasDiscoveries, Model, Property};

/// Segments, a bit each; each has one entry, of the same number.
type Set = u8;
/// Parts, or lists, by the attempts that made them, a bit each: names are random and so never used again.
type Names = u8;
const MAX_NAMES: usize = 8;

fn bit(number: usize) -> u8 {
    1 << number
}

fn numbers(set: u8) -> impl Iterator<Item = usize> {
    (0..8).filter(move |number| set & bit(*number) != 0)
}

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    None,
    /// Segments are removed when the list is stored, before the mark of the version.
    RemoveBeforeTheMark,
    /// The list names as merged what a listing shows when it is made, so also what was published since and not read.
    AbsorbWhatIsListed,
    /// The mark is put whether it exists or not: of two who merge at once both make the version.
    OverwriteTheMark,
    /// Who meets a mark takes the next number for what it merged.
    TakeTheNextNumber,
    /// The mark comes before the part that it names.
    MarkBeforeThePart,
    /// Parts that the version does not name are removed, also those made for later ones.
    RemoveWhatIsInTheMaking,
    /// Only parts made for the version in force are removed, not those that earlier ones left.
    RemoveOfOwnVersionOnly,
    /// The version is read before the segments are listed.
    VersionBeforeSegments,
    /// A segment that was listed and is gone is passed over.
    PassOverASegment,
    /// A part that is gone is passed over at once.
    PassOverAPart,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Part {
    /// The version that it was made for.
    made_for: u8,
    entries: Set,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct List {
    made_for: u8,
    /// A part a run.
    runs: Names,
    absorbed: Set,
}

/// What a process knows of the index: `index::State`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Memory {
    version: u8,
    runs: Names,
    absorbed: Set,
    segments: Set,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Idle,
    /// `Index::refresh` begins, or begins again.
    Refreshing,
    /// Listed the segments. `seen`: what was published then.
    Listed {
        listed: Set,
        seen: Set,
    },
    /// `version::newest`.
    Counted {
        listed: Set,
        seen: Set,
        newest: u8,
    },
    /// `Index::take_version` is done, `load_segments` follows.
    Loading {
        listed: Set,
        seen: Set,
    },
    /// `Index::merge_run` stored the part.
    Stored {
        name: usize,
        runs: Names,
        segments: Set,
    },
    /// `Index::publish` stored the list.
    Written {
        name: usize,
        segments: Set,
    },
    /// By a mutation: removed the segments, or put the mark, and has the other yet to do.
    Early {
        name: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Process {
    memory: Memory,
    step: Step,
    attempts: u8,
    /// What it has to find: what was published when it refreshed last.
    owed: Set,
    /// The version in which `Index::find` missed a part and after which it refreshed.
    missed_in: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    published: Set,
    /// Segments, parts and lists that lie in the store.
    segments: Set,
    parts: Names,
    lists: Names,
    made: [Part; MAX_NAMES],
    written: [List; MAX_NAMES],
    /// The list that each version's mark names, from version 1 on. Marks stay for good.
    marks: Vec<u8>,
    processes: Vec<Process>,
    /// Somebody did not find what was published before it looked.
    has_missed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Object {
    Segment(usize),
    Part(usize),
    List(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// `Shared::publish` of a session.
    Publish(usize),
    Refresh(usize),
    /// These segments, since not all need be settled. `true`: with all runs; `false`: without. Sizes decide, and any sizes are
    /// possible.
    Merge(usize, Set, bool),
    /// `true`: by a listing that shows no segments.
    Write(usize, bool),
    Mark(usize),
    /// `Index::clean`, also with what was read long ago.
    Remove(usize, Object),
    Find(usize, usize),
}

#[derive(Clone)]
struct Merging {
    segments: usize,
    /// How often each process merges; 0: it looks up.
    attempts: Vec<u8>,
    mutation: Mutation,
}

impl Merging {
    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == mutation
    }

    /// The name of a process's next attempt.
    fn name(&self, state: &State, n: usize) -> usize {
        self.attempts[..n].iter().map(|attempts| usize::from(*attempts)).sum::<usize>()
            + usize::from(state.processes[n].attempts)
    }

    /// What `Index::clean` removes that has read this.
    fn obsolete(&self, state: &State, memory: Memory) -> Vec<Object> {
        if memory.version == 0 {
            return Vec::new();
        }
        let version = memory.version;
        let is_useless = |part: &usize| match self.mutation {
            Mutation::RemoveWhatIsInTheMaking => true,
            Mutation::RemoveOfOwnVersionOnly => state.made[*part].made_for == version,
            _ => state.made[*part].made_for <= version,
        };
        let segments = numbers(state.segments & memory.absorbed).map(Object::Segment);
        let parts = numbers(state.parts & !memory.runs).filter(is_useless).map(Object::Part);
        let lists = numbers(state.lists).filter(|list| state.written[*list].made_for < version).map(Object::List);
        segments.chain(parts).chain(lists).collect()
    }
}

impl State {
    fn newest(&self) -> u8 {
        u8::try_from(self.marks.len()).unwrap()
    }

    /// The list of a version, if it is there.
    fn list(&self, version: u8) -> Option<List> {
        if version == 0 {
            return Some(List::default());
        }
        let name = usize::from(self.marks[usize::from(version) - 1]);
        (self.lists & bit(name) != 0).then_some(self.written[name])
    }

    fn entries(&self, runs: Names) -> Set {
        numbers(runs & self.parts).fold(0, |all, part| all | self.made[part].entries)
    }

    /// Whether who opens the index now finds everything.
    fn is_whole(&self) -> bool {
        self.list(self.newest()).is_some_and(|list| {
            list.runs & !self.parts == 0 && self.published & !(self.segments | self.entries(list.runs)) == 0
        })
    }

    fn remove(&mut self, object: Object) {
        match object {
            Object::Segment(number) => self.segments &= !bit(number),
            Object::Part(name) => self.parts &= !bit(name),
            Object::List(name) => self.lists &= !bit(name),
        }
    }

    /// Whether one that opens the index now, merges a segment that comes yet and cleans leaves nothing useless but the lists
    /// of those who lost against it.
    fn can_be_cleaned(&self, protocol: &Merging) -> bool {
        let Some(list) = self.list(self.newest()) else { return false };
        let mut after = self.clone();
        let version = self.newest() + 1;
        // What is not named as merged waits; what is named and there is named again. It makes one run of all.
        let waiting = self.segments & !list.absorbed;
        let memory = Memory { version, runs: 0, absorbed: waiting | (list.absorbed & self.segments), segments: 0 };
        for object in protocol.obsolete(self, memory) {
            after.remove(object);
        }
        let is_left = |list: usize| self.written[list].made_for != version;
        after.segments == 0 && after.parts == 0 && !numbers(after.lists).any(is_left)
    }
}

impl Model for Merging {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let process = Process { memory: Memory::default(), step: Step::Idle, attempts: 0, owed: 0, missed_in: None };
        vec![State {
            published: bit(0),
            segments: bit(0),
            parts: 0,
            lists: 0,
            made: Default::default(),
            written: Default::default(),
            marks: Vec::new(),
            processes: vec![process; self.attempts.len()],
            has_missed: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // In order, since they are alike.
        actions.extend((0..self.segments).find(|number| state.published & bit(*number) == 0).map(Action::Publish));
        for (n, process) in state.processes.iter().enumerate() {
            match process.step {
                // Who looks up refreshes when it begins, and when it misses something.
                Step::Idle if self.attempts[n] == 0 => {
                    if process.memory.version == 0 {
                        actions.push(Action::Refresh(n));
                    }
                    actions.extend(numbers(process.owed).map(|number| Action::Find(n, number)));
                }
                Step::Idle => {
                    actions.push(Action::Refresh(n));
                    let segments = process.memory.segments;
                    if process.attempts < self.attempts[n] && segments != 0 {
                        actions.extend([Action::Merge(n, segments, true), Action::Merge(n, segments, false)]);
                        let first = segments & segments.wrapping_neg();
                        if first != segments {
                            actions.push(Action::Merge(n, first, true));
                        }
                    }
                    // One after the other.
                    let obsolete = self.obsolete(state, process.memory);
                    actions.extend(obsolete.into_iter().next().map(|object| Action::Remove(n, object)));
                }
                Step::Stored { .. } => actions.extend([Action::Write(n, false), Action::Write(n, true)]),
                Step::Written { .. } | Step::Early { .. } => actions.push(Action::Mark(n)),
                _ => actions.push(Action::Refresh(n)),
            }
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        match action {
            Action::Publish(number) => {
                state.published |= bit(number);
                state.segments |= bit(number);
            }
            Action::Refresh(n) => self.refresh(&mut state, n),
            Action::Merge(n, segments, is_all) => self.merge(&mut state, n, segments, is_all),
            Action::Write(n, is_stale) => self.write(&mut state, n, is_stale),
            Action::Mark(n) => self.mark(&mut state, n),
            Action::Remove(_, object) => state.remove(object),
            Action::Find(n, number) => self.find(&mut state, n, number),
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(FOUND, |_, state: &State| state.is_whole()),
            Property::always(LOOKED_UP, |_, state: &State| !state.has_missed),
            Property::always(CLEANED, |protocol: &Merging, state: &State| state.can_be_cleaned(protocol)),
            Property::sometimes(ALL_MERGE, |protocol: &Merging, state: &State| {
                state.newest() == protocol.attempts.iter().sum::<u8>()
            }),
            Property::sometimes(IN_VAIN, |_, state: &State| {
                let lost = |list: usize| {
                    let version = state.written[list].made_for;
                    version <= state.newest() && usize::from(state.marks[usize::from(version) - 1]) != list
                };
                numbers(state.lists).any(lost)
            }),
            Property::sometimes(REMOVED, |protocol: &Merging, state: &State| {
                state.segments == 0 && state.published == bit(protocol.segments) - 1
            }),
            Property::sometimes(GONE, |_, state: &State| {
                state.processes.iter().any(|process| process.missed_in.is_some())
            }),
        ]
    }
}

impl Merging {
    /// A step of `Index::refresh`.
    fn refresh(&self, state: &mut State, n: usize) {
        let newest = state.newest();
        let Process { memory, step, .. } = state.processes[n];
        let mut memory = memory;
        state.processes[n].step = match step {
            Step::Listed { listed, seen } if newest == memory.version => Step::Loading { listed, seen },
            Step::Listed { listed, seen } => Step::Counted { listed, seen, newest },
            Step::Counted { listed, seen, newest: read } => match state.list(read) {
                None if newest > read => Step::Refreshing,
                list => {
                    take_version(&mut memory, read, list.unwrap_or_default(), listed);
                    Step::Loading { listed, seen }
                }
            },
            Step::Loading { listed, seen } => {
                let listed = if self.is(Mutation::VersionBeforeSegments) { state.segments } else { listed };
                let wanted = listed & !memory.segments & !memory.absorbed;
                memory.segments |= wanted & state.segments;
                let is_whole = wanted & !state.segments == 0 || self.is(Mutation::PassOverASegment);
                if is_whole || newest == memory.version {
                    state.processes[n].owed = seen;
                    Step::Idle
                } else {
                    Step::Refreshing
                }
            }
            _ => {
                let seen = if self.attempts[n] == 0 { state.published } else { 0 };
                Step::Listed { listed: state.segments, seen }
            }
        };
        state.processes[n].memory = memory;
    }

    /// `Index::inputs` and `merge_run`.
    fn merge(&self, state: &mut State, n: usize, segments: Set, is_all: bool) {
        let memory = state.processes[n].memory;
        let merged = if is_all { memory.runs } else { 0 };
        if merged & !state.parts != 0 {
            // A part that it reads is gone: it gives up.
            return;
        }
        let name = self.name(state, n);
        let entries = segments | state.entries(merged);
        state.made[name] = Part { made_for: memory.version + 1, entries };
        if !self.is(Mutation::MarkBeforeThePart) {
            state.parts |= bit(name);
        }
        let runs = memory.runs & !merged | bit(name);
        let process = &mut state.processes[n];
        process.attempts += 1;
        process.step = Step::Stored { name, runs, segments };
    }

    /// `Index::merge` after the run, and the first half of `publish`.
    fn write(&self, state: &mut State, n: usize, is_stale: bool) {
        let Process { memory, step: Step::Stored { name, runs, segments }, .. } = state.processes[n] else { return };
        let listed = if is_stale { 0 } else { state.segments };
        let carried = if self.is(Mutation::AbsorbWhatIsListed) { listed } else { listed & memory.absorbed };
        state.written[name] = List { made_for: memory.version + 1, runs, absorbed: segments | carried };
        state.lists |= bit(name);
        state.processes[n].step = Step::Written { name, segments };
    }

    /// The second half of `Index::publish`.
    fn mark(&self, state: &mut State, n: usize) {
        let version = usize::from(state.processes[n].memory.version) + 1;
        state.processes[n].step = match state.processes[n].step {
            Step::Written { name, segments } if self.is(Mutation::RemoveBeforeTheMark) => {
                state.segments &= !segments;
                Step::Early { name }
            }
            Step::Early { name } if self.is(Mutation::MarkBeforeThePart) => {
                state.parts |= bit(name);
                Step::Idle
            }
            Step::Written { name, .. } | Step::Early { name } => {
                let mark = u8::try_from(name).unwrap();
                if state.marks.len() < version || self.is(Mutation::TakeTheNextNumber) {
                    state.marks.push(mark);
                } else if self.is(Mutation::OverwriteTheMark) {
                    state.marks[version - 1] = mark;
                }
                if self.is(Mutation::MarkBeforeThePart) { Step::Early { name } } else { Step::Idle }
            }
            step => step,
        };
    }

    /// `Index::find`.
    fn find(&self, state: &mut State, n: usize, number: usize) {
        let Process { memory, missed_in, .. } = state.processes[n];
        let in_segments = memory.segments & bit(number) != 0;
        let is_gone = memory.runs & !state.parts != 0;
        let passes_over = missed_in == Some(memory.version) || self.is(Mutation::PassOverAPart);
        if is_gone && !passes_over {
            let process = &mut state.processes[n];
            (process.missed_in, process.step) = (Some(memory.version), Step::Refreshing);
        } else if !in_segments && state.entries(memory.runs) & bit(number) == 0 {
            state.has_missed = true;
        }
    }
}

/// `Index::take_version`.
fn take_version(memory: &mut Memory, version: u8, list: List, listed: Set) {
    let is_next = version == memory.version + 1;
    (memory.version, memory.runs, memory.absorbed) = (version, list.runs, list.absorbed);
    memory.segments &= !list.absorbed & if is_next { Set::MAX } else { listed };
}

const FOUND: &str = "whatever is published is found";
const LOOKED_UP: &str = "who looks finds what was published before";
const CLEANED: &str = "who comes later leaves nothing useless";
const ALL_MERGE: &str = "all attempts to merge succeed";
const IN_VAIN: &str = "one merges in vain";
const REMOVED: &str = "what is merged is removed";
const GONE: &str = "a part that is asked is gone";

/// Two who merge, one of them twice.
fn racing(mutation: Mutation) -> Merging {
    Merging { segments: 2, attempts: vec![2, 1], mutation }
}

/// One who looks up while another merges twice.
fn looking_up(mutation: Mutation) -> Merging {
    Merging { segments: 3, attempts: vec![2, 0], mutation }
}

/// Searches everything; these must happen. Tells how many states there are.
fn holds(protocol: Merging, happens: &[&'static str]) -> usize {
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    for always in [FOUND, LOOKED_UP, CLEANED] {
        checker.assert_no_discovery(always);
    }
    for sometimes in happens {
        checker.assert_any_discovery(sometimes);
    }
    checker.unique_state_count()
}

#[test]
fn nothing_is_lost_when_two_merge_three_times() {
    let states = holds(racing(Mutation::None), &[ALL_MERGE, IN_VAIN, REMOVED]);
    assert!(states > 100_000, "{states}");
}

#[test]
fn nothing_is_lost_when_segments_come_while_two_merge() {
    let protocol = Merging { segments: 3, attempts: vec![1, 1], mutation: Mutation::None };
    let states = holds(protocol, &[ALL_MERGE, IN_VAIN, REMOVED]);
    assert!(states > 100_000, "{states}");
}

#[test]
fn who_looks_up_while_another_merges_finds_everything() {
    let states = holds(looking_up(Mutation::None), &[ALL_MERGE, GONE, REMOVED]);
    assert!(states > 50_000, "{states}");
}

#[test]
fn every_rule_of_merging_is_needed() {
    for (protocol, harm) in [
        (racing(Mutation::RemoveBeforeTheMark), FOUND),
        (racing(Mutation::AbsorbWhatIsListed), FOUND),
        (racing(Mutation::OverwriteTheMark), FOUND),
        (racing(Mutation::TakeTheNextNumber), FOUND),
        (racing(Mutation::MarkBeforeThePart), FOUND),
        (racing(Mutation::RemoveWhatIsInTheMaking), FOUND),
        (racing(Mutation::RemoveOfOwnVersionOnly), CLEANED),
        (looking_up(Mutation::VersionBeforeSegments), LOOKED_UP),
        (looking_up(Mutation::PassOverASegment), LOOKED_UP),
        (looking_up(Mutation::PassOverAPart), LOOKED_UP),
    ] {
        let mutation = protocol.mutation;
        let until = HasDiscoveries::AllOf([harm].into_iter().collect());
        let checker = protocol.checker().threads(2).finish_when(until).spawn_bfs().join();
        let states = checker.unique_state_count();
        assert!(checker.discovery(harm).is_some(), "{mutation:?} does no harm in {states} states");
    }
}
