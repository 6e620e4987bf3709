//! One target for each parser of what a repository stores. Hashes and seals always fit: whoever can write into a store can
//! compute the hashes, and whoever has a writer's key can seal what they like.

use bytes::Bytes;

use super::samples::{KEY_FILE, manifests, samples};
use super::{Bound, USUAL, fuzz};
use crate::backup::image::Extents;
use crate::config::{CONFIG_KEY, Config};
use crate::crypto::{Cipher, Purpose, SecretKey};
use crate::expire::marks::{MarkKey, live_key, round_of, verify_with};
use crate::expire::parse_union;
use crate::heal::Staged;
use crate::id::{ChunkId, PackId, Place, SessionId, SnapshotId};
use crate::index::{INDEX_PREFIX, Segment, parse_segment_key};
use crate::keys::{DomainKeys, Secret, SessionKeys, Slot};
use crate::manifest::{
    Contents, Entry, Kind, Meta, PAGE_BYTES, PageRef, Piece, Reason, Regular, Skipped, Time, Xattr, decode_page,
    decode_pieces, decode_root, decode_skipped, encode_page, encode_pieces, encode_root, encode_skipped, page_map_len,
};
use crate::objects::verify;
use crate::pack::{Directory, DirectorySpan, Expected, SlotEntry, open_frame, parse_pack_key, seal_frame};
use crate::refset::{Refset, parse_refset_key};
use crate::session::decision::{Commit, Decision, RefsetHash, SeenCommit, parse_decision_key};
use crate::sink::{ChunkKind, ChunkRef, MAX_CHUNK_BYTES};
use crate::wire::seal_hash;

/// The library for bitmaps takes room for as many containers as there can be before it reads them: about 1 MiB.
const BITMAPS: Bound = Bound { times: 64, more: 3 << 20 };
/// JSON: a digit and a comma become a value.
const JSON: Bound = Bound { times: 200, more: 64 << 10 };
const HASH_BYTES: usize = 32;

/// A key and the bytes of an object, as one input.
fn joined(key: &str, bytes: &[u8]) -> Vec<u8> {
    [key.as_bytes(), &[0], bytes].concat()
}

fn split(input: &[u8]) -> (String, Vec<u8>) {
    let end = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    (String::from_utf8_lossy(&input[..end]).into_owned(), input.get(end + 1..).unwrap_or_default().to_vec())
}

/// Objects with these prefixes, without what ends them.
fn bodies(prefixes: &[&str], end: usize) -> Vec<Vec<u8>> {
    let found = samples().of(prefixes).into_iter();
    found.map(|(key, bytes)| joined(&key, &bytes[..bytes.len().saturating_sub(end)])).collect()
}

fn hashed(input: &[u8]) -> (String, Bytes) {
    let (key, mut bytes) = split(input);
    seal_hash(&mut bytes);
    (key, bytes.into())
}

/// Objects that end with a hash of their bytes and nothing else.
fn fuzz_hashed(name: &str, bound: Bound, prefixes: &[&str], read: impl Fn(&str, &Bytes)) {
    fuzz(name, bound, &bodies(prefixes, HASH_BYTES), hashed, |(key, bytes)| {
        let _ = verify(key, bytes);
        read(key, bytes);
    });
}

fn cipher() -> Cipher {
    Cipher::new(&SecretKey::new([3; 32])).unwrap()
}

fn mark_key() -> MarkKey {
    MarkKey::new(&[4; 32])
}

#[test]
fn fuzz_objects_as_they_are() {
    let all = samples().of(&[""]).into_iter().chain(samples().of(&["p/", "xv/", "xl/", "g/", "t/", "b/", "h/"]));
    let all: Vec<_> = all.map(|(key, bytes)| joined(&key, &bytes)).collect();
    let read = |(key, bytes): &(String, Bytes)| drop(verify(key, bytes));
    let prepare = |input: &[u8]| {
        let (key, bytes) = split(input);
        (key, Bytes::from(bytes))
    };
    fuzz("fuzz_objects_as_they_are", BITMAPS, &all, prepare, read);
}

#[test]
fn fuzz_config() {
    let samples: Vec<_> = samples().of(&[CONFIG_KEY]).into_iter().map(|(_, bytes)| bytes.to_vec()).collect();
    fuzz("fuzz_config", JSON, &samples, <[u8]>::to_vec, |bytes| drop(Config::parse(bytes)));
}

#[test]
fn fuzz_key_slots() {
    fuzz_hashed("fuzz_key_slots", USUAL, &["keys/"], |_, bytes| {
        if let Ok(slot) = Slot::parse(bytes) {
            let _ = (slot.kind(), slot.role(), slot.belongs_to(&[0; 32]));
            // Not with a passphrase: what that may cost is capped, and tested elsewhere.
            let _ = slot.open(&Secret::key_file(KEY_FILE));
        }
    });
}

#[test]
fn fuzz_keys_in_slots() {
    let keys = DomainKeys::random();
    let samples = [keys.to_bytes().to_vec(), keys.writer().to_bytes().to_vec()];
    fuzz("fuzz_keys_in_slots", USUAL, &samples, <[u8]>::to_vec, |bytes| drop(DomainKeys::parse(bytes)));
}

#[test]
fn fuzz_session_keys() {
    let domain = samples().repository.engine.keys.domain();
    fuzz_hashed("fuzz_session_keys", USUAL, &["k/"], |key, bytes| {
        let session = key.split('/').nth(1).and_then(|session| session.parse().ok());
        let _ = SessionKeys::open(bytes, session.unwrap_or(SessionId([0; 16])), domain);
    });
}

#[test]
fn fuzz_registrations() {
    fuzz_hashed("fuzz_registrations", USUAL, &["e/", "hb/"], |_, _| ());
}

#[test]
fn fuzz_decisions() {
    fuzz_hashed("fuzz_decisions", USUAL, &["d/"], |key, bytes| {
        let session = parse_decision_key(key).unwrap_or(SessionId([0; 16]));
        if let Ok(Decision::Commit(sealed)) = Decision::parse(session, bytes) {
            let _ = Commit::open(session, sealed, &cipher());
        }
    });
}

#[test]
fn fuzz_commits() {
    let snapshots = samples().snapshots.clone();
    let session = snapshots[0].session;
    let commit = |snapshots| Commit {
        epoch: 3,
        snapshots,
        refsets: vec![RefsetHash { snapshot: SnapshotId([1; 16]), version: 2, hash: "ab".repeat(32) }],
        saw: vec![SeenCommit { session, hash: "cd".repeat(32) }],
        purpose: "backup".to_owned(),
    };
    let mut point = snapshots[0].clone();
    point.content = crate::snapshot::Content::RecoveryPoint {
        members: vec![SnapshotId([1; 16])],
        description: serde_json::json!({"a": [1, {"b": null}, "text", 1.5]}),
    };
    let samples: Vec<_> = [vec![snapshots[0].clone()], vec![point], Vec::new()]
        .into_iter()
        .map(|snapshots| serde_json::to_vec(&commit(snapshots)).unwrap())
        .collect();
    let cipher = cipher();
    let prepare = |input: &[u8]| {
        let mut sealed = input.to_vec();
        cipher.seal(Purpose::Commit, 0, &session.0, &mut sealed).unwrap();
        sealed
    };
    fuzz("fuzz_commits", JSON, &samples, prepare, |sealed| {
        if let Ok(commit) = Commit::open(session, sealed.clone(), &cipher) {
            let _ = (commit.is_mover(), commit.refsets.iter().map(RefsetHash::hash_bytes).count());
        }
    });
}

#[test]
fn fuzz_packs() {
    // The hash stands before the last words of the trailer.
    let prepare = |input: &[u8]| {
        let (key, mut bytes) = split(input);
        if let Some(at) = bytes.len().checked_sub(48) {
            let hash = blake3::hash(&bytes[..at]);
            bytes[at..at + HASH_BYTES].copy_from_slice(hash.as_bytes());
        }
        (key, Bytes::from(bytes))
    };
    fuzz("fuzz_packs", USUAL, &bodies(&["p/"], 0), prepare, |(key, bytes)| {
        let _ = verify(key, bytes);
        let pack = parse_pack_key(key).unwrap_or(PackId { session: SessionId([0; 16]), seq: 0 });
        if let Ok(span) = DirectorySpan::parse(bytes) {
            let _ = Directory::open(pack, span, bytes.get(span.offset as usize..).unwrap_or_default(), &cipher());
        }
    });
}

#[test]
fn fuzz_directories() {
    let pack = PackId { session: SessionId([1; 16]), seq: 5 };
    let aad = [&pack.session.0[..], &pack.seq.to_le_bytes()].concat();
    let (cipher, offset) = (cipher(), 100_000);
    let plain = |slots: u32| {
        let slot = |number: u32| SlotEntry {
            expected: Expected {
                id: ChunkId([number.to_le_bytes()[0]; 32]),
                kind: ChunkKind::Data,
                codec: seal_frame(&cipher, 0, ChunkKind::Data, ChunkId([0; 32]), Bytes::new(), None).unwrap().codec,
                plain_len: 500,
                counter: number,
            },
            offset: 64 + number * 100,
            len: 100,
            origin: u16::try_from(number % 2).unwrap(),
        };
        let directory = Directory::new(vec![pack.session, SessionId([2; 16])], (0..slots).map(slot).collect());
        let mut sealed = directory.seal(pack, &cipher).unwrap();
        cipher.open(Purpose::Directory, u64::from(pack.seq), &aad, &mut sealed).unwrap().to_vec()
    };
    let prepare = |input: &[u8]| {
        // What the trailer says is believed to fit, as an attacker would have it.
        let origins = input.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
        let at = origins.saturating_mul(16).saturating_add(4);
        let slots = input.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let mut sealed = input.to_vec();
        cipher.seal(Purpose::Directory, u64::from(pack.seq), &aad, &mut sealed).unwrap();
        (DirectorySpan { offset, len: u32::try_from(sealed.len()).unwrap(), slots }, sealed)
    };
    fuzz("fuzz_directories", USUAL, &[plain(0), plain(3), plain(200)], prepare, |(span, sealed)| {
        if let Ok(directory) = Directory::open(pack, *span, sealed, &cipher) {
            let _ = (directory.weight(), directory.find(&ChunkId([1; 32])).map(|(slot, _)| slot));
        }
    });
}

#[test]
fn fuzz_frames() {
    let cipher = cipher();
    let id_of = |plain: &[u8]| ChunkId(*blake3::hash(plain).as_bytes());
    let (text, zeros) = (b"some text, some text, some more text ".repeat(60), vec![0; 300_000]);
    // What the directory says of the length, then what the frame holds.
    let samples: Vec<_> = [&text, &zeros]
        .into_iter()
        .map(|plain| {
            let compressed = zstd::bulk::compress(plain, 3).unwrap();
            [&u32::try_from(plain.len()).unwrap().to_le_bytes()[..], &compressed].concat()
        })
        .collect();
    let compressing =
        seal_frame(&cipher, 0, ChunkKind::Data, id_of(&zeros), zeros.clone().into(), Some(1)).unwrap().codec;
    let prepare = |input: &[u8]| {
        let (len, packed) =
            input.split_first_chunk().map_or((0, input), |(len, rest)| (u32::from_le_bytes(*len), rest));
        let id = ChunkId([9; 32]);
        let mut sealed = packed.to_vec();
        let aad = [&id.0[..], &len.to_le_bytes(), &[1]].concat();
        cipher.seal(Purpose::Frame, 0, &aad, &mut sealed).unwrap();
        (Expected { id, kind: ChunkKind::Data, codec: compressing, plain_len: len, counter: 0 }, sealed)
    };
    // A chunk may be much larger than its frame, but not larger than a chunk.
    let bound = Bound { times: 4, more: MAX_CHUNK_BYTES + (64 << 10) };
    fuzz("fuzz_frames", bound, &samples, prepare, |(expected, sealed)| {
        let _ = open_frame(&cipher, expected, sealed, id_of);
    });
}

#[test]
fn fuzz_index_segments() {
    fuzz_hashed("fuzz_index_segments", BITMAPS, &[INDEX_PREFIX], |key, bytes| {
        let session = parse_segment_key(key).map_or(SessionId([0; 16]), |(session, _)| session);
        if let Ok(segment) = Segment::parse(session, bytes.clone()) {
            let _ = segment.packs();
            for first in [0, 0x40, 0xff] {
                let _ = segment.find(&ChunkId([first; 32]));
            }
        }
    });
}

#[test]
fn fuzz_index_parts() {
    fuzz_hashed("fuzz_index_parts", USUAL, &["x1/"], |_, _| ());
}

/// Ends with a hash under a key and one without; a list is named by its hash.
fn marked(input: &[u8]) -> (String, Bytes) {
    let (key, body) = split(input);
    let bytes = mark_key().seal(body);
    let hash = *blake3::hash(&bytes).as_bytes();
    let name = live_key(0, &hash);
    let name = name.rsplit('/').next().unwrap_or_default();
    let key = match key.rsplit_once('/') {
        Some((folder, _)) if folder.ends_with("/live") || folder.starts_with("xl/") => format!("{folder}/{name}"),
        _ => key,
    };
    (key, bytes.into())
}

#[test]
fn fuzz_index_versions() {
    let bodies = bodies(&["xv/", "xl/"], 2 * HASH_BYTES);
    fuzz("fuzz_index_versions", USUAL, &bodies, marked, |(key, bytes)| drop(verify(key, bytes)));
}

#[test]
fn fuzz_marks_of_expiry() {
    let bodies = bodies(&["g/", "t/"], 2 * HASH_BYTES);
    fuzz("fuzz_marks_of_expiry", BITMAPS, &bodies, marked, |(key, bytes)| {
        let _ = verify_with(&mark_key(), key, bytes);
        let _ = round_of(key);
    });
}

#[test]
fn fuzz_references() {
    fuzz_hashed("fuzz_references", BITMAPS, &["r/", "b/"], |key, bytes| {
        let (snapshot, version) = parse_refset_key(key).unwrap_or((SnapshotId([0; 16]), 0));
        let Ok((by, set)) = Refset::parse(snapshot, version, bytes) else { return };
        let pack = PackId { session: by, seq: 1 };
        let _ = (set.is_empty(), set.len(), set.has_pack(pack), set.contains(Place { pack, slot: 0 }));
    });
}

#[test]
fn fuzz_references_kept_locally() {
    let references = samples().of(&["r/"]);
    let samples: Vec<_> = references
        .iter()
        .map(|(key, bytes)| {
            let snapshot = parse_refset_key(key).unwrap().0;
            let (by, set) = Refset::parse(snapshot, parse_refset_key(key).unwrap().1, bytes).unwrap();
            let mut body = b"LBUNIO01\x01\0\0\0".to_vec();
            body.extend_from_slice(&[&snapshot.0[..], &[0; 4], &[5; 32]].concat());
            body.extend(set.to_bytes(SnapshotId([0; 16]), 0, by).unwrap());
            // The hash of the set, which is made anew.
            body.truncate(body.len() - HASH_BYTES);
            body
        })
        .collect();
    let prepare = |input: &[u8]| {
        let mut bytes = input.to_vec();
        // The set begins behind the members; its hash covers itself only.
        let members =
            input.get(8..).and_then(<[u8]>::first_chunk).map_or(0, |count| u32::from_le_bytes(*count) as usize);
        let at = members.saturating_mul(52).saturating_add(12).min(bytes.len());
        let hash = blake3::hash(&bytes[at..]);
        bytes.extend_from_slice(hash.as_bytes());
        seal_hash(&mut bytes);
        bytes
    };
    fuzz("fuzz_references_kept_locally", BITMAPS, &samples, prepare, |bytes| drop(parse_union(bytes)));
}

#[test]
fn fuzz_staged_copies() {
    let staged = samples().of(&["d/", "r/"]).into_iter().map(|(key, bytes)| {
        let len = u32::try_from(key.len()).unwrap().to_le_bytes();
        [&b"LBHEAL01"[..], &len, key.as_bytes(), &bytes].concat()
    });
    let prepare = |input: &[u8]| {
        let mut bytes = input.to_vec();
        let len = input.get(8..).and_then(<[u8]>::first_chunk).map_or(0, |len| u32::from_le_bytes(*len) as usize);
        let key = input.get(12..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        let at = format!("h/{}", &blake3::hash(key).to_hex()[..32]);
        seal_hash(&mut bytes);
        (at, Bytes::from(bytes))
    };
    let staged: Vec<_> = staged.collect();
    let first = prepare(&staged[0]);
    assert!(Staged::parse(&first.0, &first.1).is_ok());
    fuzz("fuzz_staged_copies", USUAL, &staged, prepare, |(at, bytes)| {
        let _ = verify(at, bytes);
        let _ = Staged::parse(at, bytes);
    });
}

fn chunk(number: u8) -> ChunkRef {
    let pack = PackId { session: SessionId([number % 3; 16]), seq: u32::from(number) };
    ChunkRef { id: ChunkId([number; 32]), len: 5000, place: Place { pack, slot: u16::from(number) } }
}

fn entries() -> Vec<Entry> {
    let part = Piece::Data { chunk: chunk(1), offset: 10, len: 100 };
    let pieces = Contents::Inline(vec![Piece::whole(chunk(0)), Piece::Hole { len: 70_000 }, part, part]);
    let regular =
        |size, contents, page_map| Kind::Regular(Regular { size, sparse: true, linked: true, contents, page_map });
    let map = Contents::Inline(vec![Piece::Data {
        chunk: chunk(2),
        offset: 0,
        len: u32::try_from(page_map_len(75_200)).unwrap(),
    }]);
    let listed = Contents::Listed(vec![chunk(3), chunk(4)]);
    let kinds = [
        Kind::Directory,
        Kind::Directory,
        regular(75_200, pieces, map),
        regular(PAGE_BYTES * 900, listed.clone(), listed),
        regular(0, Contents::default(), Contents::default()),
        Kind::Symlink { target: b"../somewhere".to_vec() },
        Kind::Link { to: b"d".to_vec() },
        Kind::CharDevice { major: 1, minor: 3 },
        Kind::BlockDevice { major: 259, minor: 70_000 },
        Kind::Fifo,
        Kind::Socket,
    ];
    let paths: [&[u8]; 11] = [b"", b"d", b"d/file", b"d/large", b"d/n", b"d/symlink", b"e", b"e-", b"e.f", b"f", b"g"];
    let meta = |number: u64| Meta {
        mode: 0o4755,
        uid: 1000,
        gid: 4_000_000_000,
        mtime: Time { seconds: -5, nanoseconds: 999_999_999 },
        ctime: Time { seconds: 1 << 33, nanoseconds: 1 },
        inode: number,
        xattrs: vec![Xattr { name: b"user.note".to_vec(), value: vec![0, 1, 2] }],
    };
    let numbered = (0..).zip(paths).zip(kinds);
    numbered.map(|((number, path), kind)| Entry { path: path.to_vec(), meta: meta(number), kind }).collect()
}

#[test]
fn fuzz_manifest_pages() {
    let page = encode_page(&entries());
    assert!(decode_page(&page).is_ok());
    let mut samples = manifests().1;
    samples.extend([page.clone(), page]);
    // An entry of some bytes has a structure of its own; a path shares its beginning with the one before, up to 16 MiB together.
    let bound = Bound { times: 600, more: (16 << 20) + (256 << 10) };
    fuzz("fuzz_manifest_pages", bound, &samples, <[u8]>::to_vec, |bytes| drop(decode_page(bytes)));
}

#[test]
fn fuzz_manifest_roots() {
    let page =
        |number: u8, first: &[u8]| PageRef { chunk: chunk(number), first: first.to_vec(), entries: 9, bytes: 1 << 40 };
    let mut samples = manifests().0;
    samples.push(encode_root(&[page(1, b""), page(2, b"dir/a"), page(3, b"dir/b/c")]));
    // Paths share their beginnings, up to 64 MiB together.
    let bound = Bound { times: 64, more: (64 << 20) + (256 << 10) };
    fuzz("fuzz_manifest_roots", bound, &samples, <[u8]>::to_vec, |bytes| drop(decode_root(bytes)));
}

#[test]
fn fuzz_lists_of_pieces() {
    let pieces = (0..200u8).flat_map(|number| {
        let part = Piece::Data { chunk: chunk(number), offset: 1, len: 8 };
        [Piece::whole(chunk(number)), part, Piece::Hole { len: 1 << 40 }, Piece::whole(chunk(number / 2))]
    });
    let samples = [encode_pieces(&pieces.collect::<Vec<_>>()), encode_pieces(&[Piece::Hole { len: 1 }])];
    assert!(samples.iter().all(|sample| decode_pieces(sample).is_ok()));
    // A piece of one byte has a structure of its own.
    let bound = Bound { times: 160, more: 64 << 10 };
    fuzz("fuzz_lists_of_pieces", bound, &samples, <[u8]>::to_vec, |bytes| drop(decode_pieces(bytes)));
}

#[test]
fn fuzz_lists_of_skipped_files() {
    let reasons = [
        Reason::Unreadable { error: "denied".to_owned() },
        Reason::Vanished,
        Reason::Shrunk,
        Reason::TooLarge,
        Reason::LinkNotKept,
    ];
    let skipped: Vec<_> =
        reasons.into_iter().map(|reason| Skipped { path: b"some/path \xff".to_vec(), reason }).collect();
    let samples = [encode_skipped(&skipped), encode_skipped(&[])];
    fuzz("fuzz_lists_of_skipped_files", USUAL, &samples, <[u8]>::to_vec, |bytes| drop(decode_skipped(bytes)));
}

#[test]
fn fuzz_lists_of_blocks() {
    let size = 1u64 << 40;
    let sample = |ranges: &[(i64, i64)]| -> Vec<u8> {
        ranges.iter().flat_map(|(offset, len)| [offset.to_le_bytes(), len.to_le_bytes()].concat()).collect()
    };
    let samples = [
        sample(&[(0, 4096), (8192, 1 << 30), (1 << 39, 5)]),
        sample(&[(1 << 39, 100_000), (5000, 4096), (4096, 1), (0, 1 << 40)]),
    ];
    fuzz("fuzz_lists_of_blocks", USUAL, &samples, <[u8]>::to_vec, |bytes| {
        let mut extents = Extents::new(size);
        for range in bytes.chunks_exact(16) {
            let number = |at: usize| range[at..].first_chunk().map_or(0, |bytes| i64::from_le_bytes(*bytes));
            let _ = extents.add(number(0), number(8));
            assert!(extents.bytes() <= size);
        }
    });
}
