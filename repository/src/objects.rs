//! What an object must look like by its key, as far as anyone can tell who has no key of the repository.
//!
//! Every kind of object carries a hash of its bytes or is one constant, so a changed byte anywhere is found here; but for
//! heartbeats, which are hints.

use crate::config::{CONFIG_KEY, Config, MAX_CONFIG_BYTES};
use crate::expire::marks::{self, MARKS_PREFIX, MAX_MARK_BYTES, TOMBSTONE_PREFIX};
use crate::heal::{self, LOST_PREFIX, MAX_STAGED_BYTES, STAGING_PREFIX, Staged};
use crate::id::SessionId;
use crate::index::{self, INDEX_PREFIX, MAX_SEGMENT_BYTES, SEAL_MAGIC, Segment, parse_segment_key};
use crate::keys::{KEYS_PREFIX, MAX_SLOT_BYTES, SessionKeys, Slot};
use crate::pack::{MAX_PACK_BYTES, parse_header, parse_pack_key, verify_checksum};
use crate::refset::{MAX_REFSET_BYTES, Refset, parse_refset_key};
use crate::session::decision::{DECISION_PREFIX, Decision, MAX_DECISION_BYTES, parse_decision_key};
use crate::session::registration::{self, REGISTRATIONS_PREFIX};

/// Objects of no other kind are larger.
const MAX_OTHER_BYTES: u64 = 64 << 20;

/// No object with this key is larger.
pub(crate) fn limit(key: &str) -> u64 {
    match key.split('/').next() {
        Some(CONFIG_KEY) => MAX_CONFIG_BYTES,
        Some("keys" | "k" | "e" | "hb" | "t") => MAX_SLOT_BYTES,
        Some("p") => MAX_PACK_BYTES,
        Some("x0") => MAX_SEGMENT_BYTES,
        Some("x1") => index::MAX_PART_BYTES,
        Some("xl") => index::MAX_LIST_BYTES,
        Some("xv") => index::MAX_VERSION_BYTES,
        Some("r" | "b") => MAX_REFSET_BYTES,
        Some("g") => MAX_MARK_BYTES,
        Some("h") => MAX_STAGED_BYTES,
        Some("d") => MAX_DECISION_BYTES,
        _ => MAX_OTHER_BYTES,
    }
}

/// Says what is wrong with an object. Objects of unknown kinds are nobody's business.
pub(crate) fn verify(key: &str, bytes: &bytes::Bytes) -> Result<(), String> {
    let text = |error: crate::wire::WireError| error.to_string();
    let stray = || "the key is not one that a repository has".to_owned();
    if key == CONFIG_KEY {
        return Config::parse(bytes).map(drop).map_err(|error| error.to_string());
    }
    if key.starts_with(KEYS_PREFIX) {
        return Slot::parse(bytes).map(drop).map_err(text);
    }
    if let Some(rest) = key.strip_prefix("k/") {
        let session = rest.split('/').next().and_then(|session| session.parse::<SessionId>().ok());
        return SessionKeys::verify(bytes, session.ok_or_else(stray)?).map_err(text);
    }
    if key.starts_with(REGISTRATIONS_PREFIX) {
        return registration::verify(key, bytes).map_err(text);
    }
    if key.starts_with("p/") {
        let pack = parse_pack_key(key).ok_or_else(stray)?;
        verify_checksum(bytes).map_err(text)?;
        let found = parse_header(bytes).map_err(text)?;
        return if found == pack { Ok(()) } else { Err(format!("the object holds the pack {found}")) };
    }
    if key.starts_with(INDEX_PREFIX) {
        let (session, _) = parse_segment_key(key).ok_or_else(stray)?;
        if &bytes[..] == SEAL_MAGIC {
            return Ok(());
        }
        return Segment::parse(session, bytes.clone()).map(drop).map_err(text);
    }
    if key.starts_with(index::PARTS_PREFIX) {
        return index::verify_part(bytes).map_err(text);
    }
    if key.starts_with(index::LISTS_PREFIX) || key.starts_with(index::VERSIONS_PREFIX) {
        return index::verify_version(key, bytes).map_err(text);
    }
    if key.starts_with("r/") {
        let (snapshot, version) = parse_refset_key(key).ok_or_else(stray)?;
        return Refset::parse(snapshot, version, bytes).map(drop).map_err(text);
    }
    if key.starts_with(DECISION_PREFIX) {
        return Decision::parse(parse_decision_key(key).ok_or_else(stray)?, bytes).map(drop).map_err(text);
    }
    if key.starts_with(MARKS_PREFIX) || key.starts_with(TOMBSTONE_PREFIX) {
        return marks::verify(key, bytes).map_err(text);
    }
    if key.starts_with(LOST_PREFIX) {
        return heal::verify_lost(key, bytes).map_err(text);
    }
    if key.starts_with(STAGING_PREFIX) {
        return Staged::parse(key, bytes).map(drop).map_err(text);
    }
    if key.starts_with("hb/") {
        let time = std::str::from_utf8(bytes).ok().and_then(|text| text.parse::<jiff::Timestamp>().ok());
        return time.map(drop).ok_or_else(|| "no time".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{Cipher, Purpose, SecretKey};
    use crate::id::PackId;
    use crate::pack::{Directory, DirectorySpan};
    use crate::session::decision::Commit;
    use crate::wire::seal_hash;
    use proptest::prelude::*;

    const SESSION: &str = "01010101010101010101010101010101";

    /// A key of each kind of object, and how its bytes begin.
    fn kinds() -> Vec<(String, Vec<u8>)> {
        let id = [1; 16];
        let with = |magic: &[u8]| [magic, &id].concat();
        vec![
            (CONFIG_KEY.to_owned(), b"{\"format\": ".to_vec()),
            (format!("keys/{SESSION}"), b"LBKEYS01\x01".to_vec()),
            (format!("k/{SESSION}/0"), with(b"LBSKEY01")),
            (format!("e/{:010}/{:04}/{:010}", 0, 0, 0), with(b"LBREGI01")),
            (format!("p/{SESSION}/00000000"), b"LBPACK01\x01\0".to_vec()),
            (format!("x0/{SESSION}/00000000"), b"LBINDX01".to_vec()),
            (format!("e/{:010}/{:04}/{:010}", 0, 0, 1), with(b"LBPINR01")),
            (format!("g/{:010}/condemned", 1), b"LBCOND01\x01\0\0\0\0\0\0\0".to_vec()),
            (format!("g/{:010}/final", 1), b"LBFINA01\x01\0\0\0\0\0\0\0".to_vec()),
            (format!("g/{:010}/live/{SESSION}", 1), b"LBLIVE01\x01\0\0\0\0\0\0\0".to_vec()),
            (format!("g/{:010}/done", 1), b"LBDONE01\x01\0\0\0\0\0\0\0".to_vec()),
            (format!("t/{SESSION}"), with(b"LBTOMB01")),
            (format!("r/{SESSION}/0"), [&b"LBREFS01"[..], &id, &[0; 4]].concat()),
            (format!("d/{SESSION}"), with(b"LBCOMM01")),
            (format!("b/{SESSION}"), [&b"LBREFS01"[..], &id, &[0; 4]].concat()),
            (format!("h/{SESSION}"), b"LBHEAL01".to_vec()),
            (format!("hb/{SESSION}/00000000"), b"2026-".to_vec()),
            (format!("x1/{:010}/{SESSION}", 1), b"LBINDX02".to_vec()),
            (format!("xv/{:010}", 1), b"LBXVER01\x01\0\0\0\0\0\0\0".to_vec()),
            (format!("xl/{:010}/{SESSION}", 1), b"LBXLST01\x01\0\0\0\0\0\0\0".to_vec()),
        ]
    }

    proptest! {
        // A hash keeps accidents out, not an attacker: he can compute one that fits.
        #[test]
        fn hostile_objects_never_panic(kind in 0usize..20, body in proptest::collection::vec(any::<u8>(), 0..300), hashed: bool) {
            let (key, mut bytes) = kinds().swap_remove(kind);
            bytes.extend_from_slice(&body);
            if hashed {
                seal_hash(&mut bytes);
            }
            let _ = verify(&key, &bytes.into());
        }

        #[test]
        fn hostile_pack_trailers_never_panic(numbers: [u32; 4], body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = body;
            let start = bytes.len();
            bytes.resize(start + 64, 0);
            for (at, number) in numbers.iter().enumerate() {
                bytes[start + at * 4..][..4].copy_from_slice(&number.to_le_bytes());
            }
            bytes[start + 12..][..4].copy_from_slice(&1u32.to_le_bytes());
            let hash = blake3::hash(&bytes[..start + 16]);
            bytes[start + 16..][..32].copy_from_slice(hash.as_bytes());
            bytes[start + 56..].copy_from_slice(b"LBPEND01");
            let _ = verify(&format!("p/{SESSION}/00000000"), &bytes.into());
        }

        // Whoever has a writer's key can seal what he likes.
        #[test]
        fn hostile_directories_and_commits_never_panic(body in proptest::collection::vec(any::<u8>(), 0..300), origins in 0u32..4, slots in 0u32..4) {
            let cipher = Cipher::new(&SecretKey::random()).unwrap();
            let pack = PackId { session: SessionId([1; 16]), seq: 0 };
            let aad = [&pack.session.0[..], &pack.seq.to_le_bytes()].concat();
            let mut sealed = origins.to_le_bytes().to_vec();
            sealed.extend_from_slice(&[2; 64][..origins as usize * 16]);
            sealed.extend_from_slice(&slots.to_le_bytes());
            sealed.extend_from_slice(&body);
            cipher.seal(Purpose::Directory, 0, &aad, &mut sealed).unwrap();
            let span = DirectorySpan { offset: 1000, len: u32::try_from(sealed.len()).unwrap(), slots };
            let _ = Directory::open(pack, span, &sealed, &cipher);

            let mut sealed = body;
            cipher.seal(Purpose::Commit, 0, &pack.session.0, &mut sealed).unwrap();
            prop_assert!(Commit::open(pack.session, sealed, &cipher).is_err());
        }
    }
}
