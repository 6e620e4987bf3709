//! The stored forms of manifests: every entry comes back, no bytes make a decoder panic or unfold without bound, and
//! the bytes themselves do not change from version to version.

#![allow(clippy::unwrap_used, reason = "only tests use these functions; a failure here is theirs")]

use lifeboat_repository::id::{ChunkId, ChunkRef, PackId, Place, SessionId};
use lifeboat_repository::manifest::{
    Contents, Entry, Kind, MAX_PAGE_BYTES, Meta, PageRef, Piece, Reason, Regular, Skipped, Time, Xattr, compare_paths,
    decode_page, decode_pieces, decode_root, decode_skipped, encode_page, encode_pieces, encode_root, encode_skipped,
    is_valid_path, page_map_len,
};
use lifeboat_repository::sink::MAX_CHUNK_BYTES;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

fn chunk() -> impl Strategy<Value = ChunkRef> {
    // Few ids, so that chunks are shared; but one place for each.
    (0u8..6, 0u8..3).prop_map(|(id, session)| ChunkRef {
        id: ChunkId([id; 32]),
        len: 1 + u32::from(id) * 1000,
        place: Place {
            pack: PackId { session: SessionId([session; 16]), seq: u32::from(id) * 77 },
            slot: u16::from(id),
        },
    })
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        (1u64..1 << 40).prop_map(|len| Piece::Hole { len }),
        chunk().prop_map(Piece::whole),
        (chunk(), any::<u32>(), any::<u32>()).prop_map(|(chunk, offset, len)| {
            let offset = offset % chunk.len;
            Piece::Data { chunk, offset, len: 1 + len % (chunk.len - offset) }
        }),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    let flags = (any::<bool>(), any::<bool>());
    prop_oneof![
        4 => (vec(piece(), 0..5), flags).prop_map(|(pieces, (sparse, linked))| Kind::Regular(Regular {
            size: pieces.iter().map(Piece::len).sum(),
            sparse,
            linked,
            contents: Contents::Inline(pieces),
            page_map: Contents::default(),
        })),
        1 => (vec(chunk(), 1..4), flags, 1u64..1 << 62, any::<bool>()).prop_map(|(lists, (sparse, linked), size, inline)| {
            let map = Contents::Inline(vec![Piece::Hole { len: page_map_len(size) }]);
            let page_map = if inline { map } else { Contents::Listed(lists.clone()) };
            Kind::Regular(Regular { size, sparse, linked, contents: Contents::Listed(lists), page_map })
        }),
        1 => Just(Kind::Directory),
        1 => vec(1u8.., 1..50).prop_map(|target| Kind::Symlink { target }),
        1 => any::<(u32, u32)>().prop_map(|(major, minor)| Kind::CharDevice { major, minor }),
        1 => any::<(u32, u32)>().prop_map(|(major, minor)| Kind::BlockDevice { major, minor }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
        1 => Just(Kind::Link { to: b"\x01".to_vec() }),
    ]
}

fn meta() -> impl Strategy<Value = Meta> {
    let time = || (any::<i64>(), 0u32..1_000_000_000).prop_map(|(seconds, nanoseconds)| Time { seconds, nanoseconds });
    let xattr = (vec(1u8.., 1..30), vec(any::<u8>(), 0..60)).prop_map(|(name, value)| Xattr { name, value });
    (0u32..0o10000, 0..u32::MAX, 0..u32::MAX, time(), time(), any::<u64>(), vec(xattr, 0..3))
        .prop_map(|(mode, uid, gid, mtime, ctime, inode, xattrs)| Meta { mode, uid, gid, mtime, ctime, inode, xattrs })
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    // A small alphabet, so that paths share beginnings; the first byte sorts behind the target of the links.
    vec(vec(prop_oneof![Just(b'a'), Just(b'.'), Just(0xff), 2u8..], 1..5), 1..5)
        .prop_map(|names| names.join(&b'/'))
        .prop_filter("a path that leads elsewhere", |path| is_valid_path(path))
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    btree_set(path(), 1..40).prop_flat_map(|paths| {
        let count = paths.len();
        (Just(paths), vec((meta(), kind()), count)).prop_map(|(paths, rest)| {
            let mut entries: Vec<_> =
                paths.into_iter().zip(rest).map(|(path, (meta, kind))| Entry { path, meta, kind }).collect();
            entries.sort_by(|one, other| compare_paths(&one.path, &other.path));
            entries
        })
    })
}

/// What no decoder may let through.
fn assert_sound(entries: &[Entry]) {
    assert!(entries.windows(2).all(|pair| compare_paths(&pair[0].path, &pair[1].path).is_lt()));
    for entry in entries {
        assert!(is_valid_path(&entry.path) && entry.meta.mode <= 0o7777 && entry.meta.uid != u32::MAX);
        let Kind::Regular(Regular { size, contents: Contents::Inline(pieces), .. }) = &entry.kind else { continue };
        assert_eq!(pieces.iter().map(|piece| u128::from(piece.len())).sum::<u128>(), u128::from(*size));
        for piece in pieces {
            let Piece::Data { chunk, offset, len } = piece else { continue };
            assert!(chunk.len as usize <= MAX_CHUNK_BYTES && offset + len <= chunk.len && *len > 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pages_round_trip(entries in entries()) {
        let bytes = encode_page(&entries);
        prop_assert_eq!(decode_page(&bytes).unwrap(), entries);
    }

    #[test]
    fn lists_of_pieces_round_trip(pieces in vec(piece(), 1..60)) {
        prop_assert_eq!(decode_pieces(&encode_pieces(&pieces)).unwrap(), pieces);
    }

    #[test]
    fn roots_round_trip(firsts in btree_set(path(), 0..20), chunk in chunk(), entries: u64, bytes: u64) {
        let mut firsts: Vec<_> = firsts.into_iter().collect();
        firsts.sort_by(|one, other| compare_paths(one, other));
        let pages: Vec<_> = firsts.into_iter().map(|first| PageRef { chunk, first, entries, bytes }).collect();
        prop_assert_eq!(decode_root(&encode_root(&pages)).unwrap(), pages);
    }

    #[test]
    fn lists_of_skipped_paths_round_trip(paths in vec(path(), 0..20), error in ".{0,40}") {
        let reasons = [Reason::Unreadable { error }, Reason::Vanished, Reason::Shrunk, Reason::TooLarge, Reason::LinkNotKept];
        let skipped: Vec<_> =
            paths.into_iter().zip(reasons.iter().cycle()).map(|(path, reason)| Skipped { path, reason: reason.clone() }).collect();
        prop_assert_eq!(decode_skipped(&encode_skipped(&skipped)).unwrap(), skipped);
    }

    #[test]
    fn any_bytes_are_refused_or_sound(mut bytes in vec(any::<u8>(), 0..400), magic in 0usize..5) {
        if let Some(magic) = [b"LBMP\x01", b"LBPL\x01", b"LBRL\x01", b"LBSK\x01"].get(magic) {
            bytes.splice(0..0, magic.iter().copied());
        }
        if let Ok(entries) = decode_page(&bytes) {
            assert_sound(&entries);
        }
        // Refusing is fine; panicking or taking for ever is not.
        let _ = (decode_pieces(&bytes), decode_root(&bytes), decode_skipped(&bytes));
    }

    #[test]
    fn changed_pages_are_refused_or_sound(
        entries in entries(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = encode_page(&entries);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(entries) = decode_page(&bytes) {
            assert_sound(&entries);
            prop_assert_eq!(encode_page(&entries).len(), bytes.len(), "one form for each page");
        }
    }

    #[test]
    fn changed_lists_and_roots_do_not_panic(pieces in vec(piece(), 1..20), at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = encode_pieces(&pieces);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(pieces) = decode_pieces(&bytes) {
            prop_assert!(pieces.iter().all(|piece| !piece.is_empty()));
        }
        bytes[2] = b'R';
        bytes[3] = b'L';
        let _ = decode_root(&bytes);
    }
}

fn entry(path: &[u8], kind: Kind) -> Entry {
    Entry { path: path.to_vec(), meta: Meta::default(), kind }
}

fn refused(entries: &[Entry]) -> &'static str {
    decode_page(&encode_page(entries)).unwrap_err().what
}

#[test]
fn hostile_entries_are_refused() {
    for path in [&b".."[..], b".", b"a/../b", b"/etc/passwd", b"a//b", b"a/", b"a\0b", b"../../root/.ssh/x"] {
        assert_eq!(refused(&[entry(path, Kind::Fifo)]), "a path that leads elsewhere", "{path:?}");
    }
    assert_eq!(refused(&[entry(b"", Kind::Symlink { target: b"/etc".to_vec() })]), "the root is no directory");
    let one = || entry(b"a", Kind::Fifo);
    assert_eq!(refused(&[one(), one()]), "paths are not in order");
    assert_eq!(refused(&[entry(b"b", Kind::Fifo), one()]), "paths are not in order");
    assert_eq!(refused(&[entry(b"a.b", Kind::Fifo), entry(b"a/b", Kind::Fifo)]), "paths are not in order");
    for to in [&b"../x"[..], b"/etc/shadow", b"", b"b", b"c", b"a/./b"] {
        assert_eq!(refused(&[entry(b"b", Kind::Link { to: to.to_vec() })]), "a hard link to no earlier path", "{to:?}");
    }
    for target in [&b""[..], b"a\0b"] {
        assert_eq!(
            refused(&[entry(b"a", Kind::Symlink { target: target.to_vec() })]),
            "a symbolic link that cannot be"
        );
    }
    let with = |meta| Entry { path: b"a".to_vec(), meta, kind: Kind::Fifo };
    refused(&[with(Meta { mode: 0o100_644, ..Meta::default() })]);
    refused(&[with(Meta { uid: u32::MAX, ..Meta::default() })]);
    refused(&[with(Meta { mtime: Time { seconds: 0, nanoseconds: 1_000_000_000 }, ..Meta::default() })]);
    refused(&[with(Meta { xattrs: vec![Xattr { name: b"a\0b".to_vec(), value: vec![] }], ..Meta::default() })]);
    let file = |size, pieces| {
        let contents = Contents::Inline(pieces);
        entry(
            b"a",
            Kind::Regular(Regular { size, sparse: false, linked: false, contents, page_map: Contents::default() }),
        )
    };
    let place = Place { pack: PackId { session: SessionId([0; 16]), seq: 0 }, slot: 0 };
    let chunk = ChunkRef { id: ChunkId([1; 32]), len: 100, place };
    refused(&[file(5, vec![])]);
    let mapped = |size, page_map| {
        let contents = Contents::Inline(if size == 0 { vec![] } else { vec![Piece::Hole { len: size }] });
        entry(b"a", Kind::Regular(Regular { size, sparse: false, linked: false, contents, page_map }))
    };
    let map_of = |len| Contents::Inline(vec![Piece::Hole { len }]);
    assert!(decode_page(&encode_page(&[mapped(8193, map_of(32))])).is_ok());
    assert_eq!(refused(&[mapped(8193, map_of(31))]), "the pieces of a file do not make up its size");
    assert_eq!(refused(&[mapped(0, map_of(16))]), "a page map of no pages");
    refused(&[file(u64::MAX, vec![Piece::Hole { len: u64::MAX }])]);
    refused(&[file(1, vec![Piece::Hole { len: u64::MAX }, Piece::Hole { len: 2 }])]);
    refused(&[file(0, vec![Piece::Hole { len: 0 }])]);
    refused(&[file(50, vec![Piece::Data { chunk, offset: 60, len: 50 }])]);
    refused(&[file(1 << 31, vec![Piece::Data { chunk, offset: u32::MAX, len: 1 << 31 }])]);
    let huge = ChunkRef { len: u32::MAX, ..chunk };
    refused(&[file(u64::from(u32::MAX), vec![Piece::whole(huge)])]);
}

/// As the other frozen bytes: version 1 with a page map.
#[test]
fn the_bytes_of_a_page_map_are_frozen() {
    let place = Place { pack: PackId { session: SessionId([0xaa; 16]), seq: 1 }, slot: 2 };
    let chunk = |id, len| ChunkRef { id: ChunkId([id; 32]), len, place };
    let (size, contents) = (20_000, Contents::Inline(vec![Piece::whole(chunk(1, 20_000))]));
    let inline = Contents::Inline(vec![Piece::Hole { len: 16 }, Piece::whole(chunk(2, 32))]);
    let file = |page_map| Regular { size, sparse: false, linked: false, contents: contents.clone(), page_map };
    let page = [
        entry(b"a", Kind::Regular(file(inline))),
        entry(b"b", Kind::Regular(file(Contents::Listed(vec![chunk(3, 99)])))),
    ];
    let bytes = encode_page(&page);
    assert_eq!(decode_page(&bytes).unwrap(), page);
    assert_eq!(hex(&bytes), include_str!("golden/manifest-page-map-1.hex").trim());
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            if let Ok(entries) = decode_page(&changed) {
                assert_sound(&entries);
            }
        }
    }
}

#[test]
fn pages_that_unfold_without_bound_are_refused() {
    // Each path takes four bytes, sharing 30,000 with the one before.
    let long = |number: u32| [&vec![b'x'; 30_000][..], &number.to_be_bytes().map(|byte| byte | 0x80)].concat();
    let mut paths: Vec<_> = (0..2000).map(|number: u32| long(number % 128 + ((number / 128 % 128) << 8))).collect();
    paths.sort();
    paths.dedup();
    let bomb: Vec<_> = paths.into_iter().map(|path| entry(&path, Kind::Fifo)).collect();
    let bytes = encode_page(&bomb);
    assert!(bytes.len() < 100_000, "{}", bytes.len());
    assert_eq!(decode_page(&bytes).unwrap_err().what, "the paths of a page are too long together");
    assert_eq!(decode_page(&vec![0; MAX_PAGE_BYTES + 1]).unwrap_err().what, "the record is too large");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// The stored bytes of version 1. If this fails, repositories that exist can no longer be read: make a version 2.
#[test]
fn the_bytes_are_frozen() {
    let place = |seq, slot| Place { pack: PackId { session: SessionId([0xaa; 16]), seq }, slot };
    let data = ChunkRef { id: ChunkId([1; 32]), len: 300, place: place(1, 2) };
    let list = ChunkRef { id: ChunkId([2; 32]), len: 77, place: place(200, 3) };
    let meta = Meta {
        mode: 0o644,
        uid: 1000,
        gid: 5,
        mtime: Time { seconds: 1_700_000_000, nanoseconds: 7 },
        ctime: Time { seconds: -1, nanoseconds: 999_999_999 },
        inode: 300,
        xattrs: vec![Xattr { name: b"user.a".to_vec(), value: b"\0\xff".to_vec() }],
    };
    let page_map = Contents::default();
    let file = |size, sparse, linked, contents| {
        Kind::Regular(Regular { size, sparse, linked, contents, page_map: page_map.clone() })
    };
    let part = Piece::Data { chunk: data, offset: 10, len: 20 };
    let inline = Contents::Inline(vec![Piece::whole(data), Piece::Hole { len: 4096 }, part, Piece::whole(data)]);
    let page = vec![
        entry(b"", Kind::Directory),
        entry(b"a", Kind::BlockDevice { major: 8, minor: 300 }),
        Entry { path: b"a.b".to_vec(), meta, kind: file(300 + 4096 + 20 + 300, true, true, inline) },
        entry(b"a.c", Kind::Link { to: b"a.b".to_vec() }),
        entry(b"b", Kind::Symlink { target: b"../x".to_vec() }),
        entry(b"c", file(1 << 40, false, false, Contents::Listed(vec![list]))),
        entry(b"d", Kind::Socket),
    ];

    let bytes = encode_page(&page);
    assert_eq!(decode_page(&bytes).unwrap(), page);
    assert_eq!(hex(&bytes), include_str!("golden/manifest-page-1.hex").trim());
    let bytes = encode_pieces(&[Piece::whole(data), Piece::Hole { len: 1 }, part]);
    assert_eq!(hex(&bytes), include_str!("golden/piece-list-1.hex").trim());
    let first = |first: &[u8], chunk| PageRef { chunk, first: first.to_vec(), entries: 7, bytes: 1 << 20 };
    let bytes = encode_root(&[first(b"", data), first(b"a/b", list), first(b"a/c", data)]);
    assert_eq!(hex(&bytes), include_str!("golden/root-1.hex").trim());
    let unreadable = Reason::Unreadable { error: "no".to_owned() };
    let skipped = |path: &[u8], reason| Skipped { path: path.to_vec(), reason };
    let bytes = encode_skipped(&[skipped(b"a", unreadable), skipped(b"b", Reason::Shrunk)]);
    assert_eq!(hex(&bytes), include_str!("golden/skipped-1.hex").trim());
}
