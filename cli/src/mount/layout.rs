//! What stands above the trees: folders of snapshots by time, and links to them by id, lineage and label.
//!
//! Names and numbers stay the same as long as the mount lasts, also when snapshots come and go.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use lifeboat_repository::id::SnapshotId;
use lifeboat_repository::snapshot::{Content, Snapshot};

/// The number of the root.
pub(super) const ROOT: u64 = 1;
const SNAPSHOTS: &str = "snapshots";
const LATEST: &str = "latest";
/// A name of a file has at most so many bytes.
const MAX_NAME_BYTES: usize = 255;
/// Digits of an id that tell two snapshots of one second apart.
const ID_DIGITS: usize = 8;

/// What a folder has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Child {
    /// A folder or link above the trees, by its number.
    Above(u64),
    /// The root of a tree.
    Snapshot(u16),
}

/// A folder or link above the trees.
#[derive(Debug, Clone)]
pub(super) enum Node {
    Folder { parent: u64, children: BTreeMap<String, Child> },
    Link(String),
}

/// Everything above the trees.
#[derive(Debug)]
pub(super) struct Layout {
    /// By number, from 1 on.
    nodes: Vec<Node>,
    numbers: HashMap<String, u64>,
    names: HashMap<SnapshotId, String>,
    taken: HashMap<String, SnapshotId>,
    /// The newest snapshot that is shown.
    pub(super) changed: Timestamp,
}

impl Layout {
    pub(super) fn new() -> Self {
        let root = Node::Folder { parent: ROOT, children: BTreeMap::new() };
        Self {
            nodes: vec![root],
            numbers: HashMap::from([(String::new(), ROOT)]),
            names: HashMap::new(),
            taken: HashMap::new(),
            changed: Timestamp::UNIX_EPOCH,
        }
    }

    pub(super) fn get(&self, number: u64) -> Option<&Node> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.nodes.get(index)
    }

    /// Shows these snapshots, oldest first, and no others; trees with the number that each has in the mount.
    pub(super) fn show(&mut self, snapshots: &[(Snapshot, Option<u16>)]) {
        for node in &mut self.nodes {
            if let Node::Folder { children, .. } = node {
                children.clear();
            }
        }
        for folder in [SNAPSHOTS, "ids", "lineages", "tags"] {
            self.folder(folder);
        }
        for (snapshot, _) in snapshots {
            self.name(snapshot);
        }
        for (snapshot, tree) in snapshots {
            self.show_one(snapshot, *tree);
        }
        self.changed = snapshots.last().map_or(Timestamp::UNIX_EPOCH, |(newest, _)| newest.time);
    }

    fn show_one(&mut self, snapshot: &Snapshot, tree: Option<u16>) {
        let Some(name) = self.names.get(&snapshot.id).cloned() else { return };
        if let Some(tree) = tree {
            self.enter(SNAPSHOTS, &name, Child::Snapshot(tree));
            self.link(SNAPSHOTS, LATEST, name.clone());
        } else {
            self.show_members(snapshot, &name);
        }
        self.link("ids", &snapshot.id.to_string(), format!("../{SNAPSHOTS}/{name}"));
        let lineage = format!("lineages/{}", file_name(&snapshot.lineage));
        let tags =
            snapshot.tags.iter().map(|(label, value)| format!("tags/{}", file_name(&format!("{label}={value}"))));
        for folder in tags.chain([lineage]) {
            self.folder(&folder);
            self.link(&folder, &name, format!("../../{SNAPSHOTS}/{name}"));
            // Oldest first: the last one stays.
            self.link(&folder, LATEST, name.clone());
        }
    }

    /// A recovery point is a folder of links to its members that are shown.
    fn show_members(&mut self, point: &Snapshot, name: &str) {
        let Content::RecoveryPoint { members, .. } = &point.content else { return };
        let path = format!("{SNAPSHOTS}/{name}");
        self.folder(&path);
        for member in members {
            if let Some(member) = self.names.get(member).cloned() {
                self.link(&path, &member, format!("../{member}"));
            }
        }
    }

    /// Gives the snapshot a name that it keeps: its time, and a part of its id if that is taken.
    fn name(&mut self, snapshot: &Snapshot) {
        if self.names.contains_key(&snapshot.id) {
            return;
        }
        let mut name = format!("{:.0}", snapshot.time);
        let id = snapshot.id.to_string();
        for digits in [ID_DIGITS, id.len()] {
            if self.taken.contains_key(&name) {
                name = format!("{:.0}-{}", snapshot.time, &id[..digits]);
            }
        }
        self.taken.insert(name.clone(), snapshot.id);
        self.names.insert(snapshot.id, name);
    }

    fn number(&mut self, path: &str, node: Node) -> u64 {
        let next = self.nodes.len() as u64 + 1;
        let number = *self.numbers.entry(path.to_owned()).or_insert(next);
        match usize::try_from(number - 1).ok().and_then(|index| self.nodes.get_mut(index)) {
            None => self.nodes.push(node),
            // A folder stays what it is, with its children.
            Some(known @ Node::Link(_)) => *known = node,
            Some(Node::Folder { .. }) => {}
        }
        number
    }

    fn folder(&mut self, path: &str) {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self.numbers.get(above).copied().unwrap_or(ROOT);
        let number = self.number(path, Node::Folder { parent, children: BTreeMap::new() });
        self.enter(above, name, Child::Above(number));
    }

    fn link(&mut self, folder: &str, name: &str, target: String) {
        let number = self.number(&format!("{folder}/{name}"), Node::Link(target));
        self.enter(folder, name, Child::Above(number));
    }

    fn enter(&mut self, folder: &str, name: &str, child: Child) {
        let number = self.numbers.get(folder).copied().unwrap_or(ROOT);
        let node = usize::try_from(number - 1).ok().and_then(|index| self.nodes.get_mut(index));
        if let Some(Node::Folder { children, .. }) = node {
            children.insert(name.to_owned(), child);
        }
    }
}

/// A text as the name of a file: `/` and `%` as `%2F` and `%25`, and nothing that means something else; cut if it is too long.
fn file_name(text: &str) -> String {
    let mut name = String::new();
    for c in text.chars() {
        match c {
            '/' => name.push_str("%2F"),
            '%' => name.push_str("%25"),
            '\0' => name.push_str("%00"),
            c => name.push(c),
        }
    }
    if name.len() > MAX_NAME_BYTES {
        // Long names that begin alike stay apart.
        let hash = text
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let end = name.floor_char_boundary(MAX_NAME_BYTES - 17);
        name = format!("{}~{hash:016x}", &name[..end]);
    }
    match name.as_str() {
        "" => "%".to_owned(),
        "." => "%2E".to_owned(),
        ".." => "%2E%2E".to_owned(),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_repository::id::SessionId;

    fn snapshot(id: u8, second: i64, lineage: &str, tags: &[(&str, &str)], members: Option<&[u8]>) -> Snapshot {
        let content = match members {
            None => Content::Tree { root: Vec::new(), skipped: Vec::new() },
            Some(members) => Content::RecoveryPoint {
                members: members.iter().map(|id| SnapshotId([*id; 16])).collect(),
                description: serde_json::Value::Null,
            },
        };
        Snapshot {
            id: SnapshotId([id; 16]),
            session: SessionId([0; 16]),
            time: Timestamp::from_second(second).unwrap(),
            lineage: lineage.to_owned(),
            tags: tags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            host: String::new(),
            parent: None,
            content,
            counts: lifeboat_repository::snapshot::Counts::default(),
            stats: lifeboat_repository::snapshot::WriteStats::default(),
        }
    }

    /// Every path, links with what they lead to.
    fn paths(layout: &Layout) -> Vec<String> {
        fn walk(layout: &Layout, number: u64, path: &str, found: &mut Vec<String>) {
            match layout.get(number).unwrap() {
                Node::Link(target) => found.push(format!("{path} -> {target}")),
                Node::Folder { children, .. } => {
                    for (name, child) in children {
                        let path = format!("{path}/{name}");
                        match child {
                            Child::Above(number) => walk(layout, *number, &path, found),
                            Child::Snapshot(tree) => found.push(format!("{path} = {tree}")),
                        }
                    }
                }
            }
        }
        let mut found = Vec::new();
        walk(layout, ROOT, "", &mut found);
        found
    }

    #[test]
    fn snapshots_are_found_by_time_id_lineage_and_label() {
        let mut layout = Layout::new();
        let one = snapshot(1, 0, "host:/srv", &[("kind", "a/b")], None);
        let two = snapshot(2, 0, "host:/srv", &[], None);
        layout.show(&[(one.clone(), Some(0)), (two.clone(), Some(1))]);
        let (id1, id2) = ("01".repeat(16), "02".repeat(16));
        assert_eq!(
            paths(&layout),
            [
                format!("/ids/{id1} -> ../snapshots/1970-01-01T00:00:00Z"),
                format!("/ids/{id2} -> ../snapshots/1970-01-01T00:00:00Z-02020202"),
                "/lineages/host:%2Fsrv/1970-01-01T00:00:00Z -> ../../snapshots/1970-01-01T00:00:00Z".into(),
                "/lineages/host:%2Fsrv/1970-01-01T00:00:00Z-02020202 -> ../../snapshots/1970-01-01T00:00:00Z-02020202"
                    .into(),
                "/lineages/host:%2Fsrv/latest -> 1970-01-01T00:00:00Z-02020202".into(),
                "/snapshots/1970-01-01T00:00:00Z = 0".into(),
                "/snapshots/1970-01-01T00:00:00Z-02020202 = 1".into(),
                "/snapshots/latest -> 1970-01-01T00:00:00Z-02020202".into(),
                "/tags/kind=a%2Fb/1970-01-01T00:00:00Z -> ../../snapshots/1970-01-01T00:00:00Z".into(),
                "/tags/kind=a%2Fb/latest -> 1970-01-01T00:00:00Z".into(),
            ]
        );
        // The first goes: the second keeps its name, and every number means what it meant.
        let before = layout.numbers.clone();
        layout.show(&[(two, Some(1))]);
        assert!(paths(&layout).contains(&"/snapshots/latest -> 1970-01-01T00:00:00Z-02020202".to_owned()));
        assert!(!paths(&layout).iter().any(|path| path.contains(&id1) || path.contains("kind")));
        layout.show(&[(one, Some(0))]);
        assert_eq!(before, layout.numbers);
        assert!(paths(&layout).contains(&"/snapshots/latest -> 1970-01-01T00:00:00Z".to_owned()));
    }

    #[test]
    fn a_recovery_point_leads_to_its_members() {
        let mut layout = Layout::new();
        let volume = snapshot(1, 0, "volume", &[], None);
        let point = snapshot(2, 1, "app", &[], Some(&[1, 9]));
        layout.show(&[(volume, Some(0)), (point, None)]);
        let found = paths(&layout);
        let link = "/snapshots/1970-01-01T00:00:01Z/1970-01-01T00:00:00Z -> ../1970-01-01T00:00:00Z";
        assert!(found.contains(&link.to_owned()), "{found:?}");
        assert!(found.contains(&"/snapshots/latest -> 1970-01-01T00:00:00Z".to_owned()), "the latest tree: {found:?}");
        assert!(found.contains(&"/lineages/app/latest -> 1970-01-01T00:00:01Z".to_owned()), "{found:?}");
    }

    #[test]
    fn texts_become_names_of_files() {
        for (text, name) in [("a/b", "a%2Fb"), ("..", "%2E%2E"), ("", "%"), ("100%", "100%25"), ("ä", "ä")] {
            assert_eq!(file_name(text), name);
        }
        let long = "ä".repeat(200);
        assert!(file_name(&long).len() <= MAX_NAME_BYTES);
        assert_ne!(file_name(&long), file_name(&format!("{long}x")));
    }
}
