//! A pack's directory: what lies in each slot, and whose key opens it.

use std::collections::HashMap;

use super::frame::{Codec, Expected, kind_number, parse_kind};
use super::layout::{DirectorySpan, HEADER_BYTES};
use crate::crypto::{Cipher, Purpose};
use crate::id::{ChunkId, PackId, SessionId};
use crate::wire::{Fields, WireError};

/// Stored bytes of a slot.
const SLOT_BYTES: usize = 52;

/// One chunk of a pack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotEntry {
    /// What the frame must be.
    pub(crate) expected: Expected,
    /// Where it begins in the pack.
    pub(crate) offset: u32,
    /// Sealed bytes.
    pub(crate) len: u32,
    /// Index into the origins.
    pub(crate) origin: u16,
}

/// The directory of a pack.
#[derive(Debug)]
pub(crate) struct Directory {
    /// Sessions whose keys sealed the frames; a pack that was never repacked has one.
    pub(crate) origins: Vec<SessionId>,
    pub(crate) slots: Vec<SlotEntry>,
    by_id: HashMap<ChunkId, u16>,
}

fn aad(pack: PackId) -> [u8; 20] {
    let mut aad = [0; 20];
    aad[..16].copy_from_slice(&pack.session.0);
    aad[16..].copy_from_slice(&pack.seq.to_le_bytes());
    aad
}

impl Directory {
    pub(crate) fn new(origins: Vec<SessionId>, slots: Vec<SlotEntry>) -> Self {
        // Slots are at most 2^16: the layout refuses more.
        let by_id = (0..=u16::MAX).zip(&slots).map(|(number, slot)| (slot.expected.id, number)).collect();
        Self { origins, slots, by_id }
    }

    /// The slot that holds the chunk.
    pub(crate) fn find(&self, id: &ChunkId) -> Option<(u16, &SlotEntry)> {
        let number = *self.by_id.get(id)?;
        Some((number, &self.slots[usize::from(number)]))
    }

    /// Bytes of memory that it takes, about.
    pub(crate) fn weight(&self) -> usize {
        self.slots.len() * (size_of::<SlotEntry>() + 48) + 256
    }

    /// The sealed form.
    pub(crate) fn seal(&self, pack: PackId, cipher: &Cipher) -> Result<Vec<u8>, crate::crypto::CryptoError> {
        let mut bytes = Vec::with_capacity(8 + self.origins.len() * 16 + self.slots.len() * SLOT_BYTES + 16);
        bytes.extend_from_slice(&u32::try_from(self.origins.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.origins.iter().for_each(|origin| bytes.extend_from_slice(&origin.0));
        bytes.extend_from_slice(&u32::try_from(self.slots.len()).unwrap_or(u32::MAX).to_le_bytes());
        for slot in &self.slots {
            bytes.extend_from_slice(&slot.expected.id.0);
            for number in [slot.offset, slot.len, slot.expected.plain_len] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.push(slot.expected.codec as u8);
            bytes.push(kind_number(slot.expected.kind));
            bytes.extend_from_slice(&slot.origin.to_le_bytes());
            bytes.extend_from_slice(&slot.expected.counter.to_le_bytes());
        }
        cipher.seal(Purpose::Directory, u64::from(pack.seq), &aad(pack), &mut bytes)?;
        Ok(bytes)
    }

    /// Opens the sealed form and checks that all slots lie in the pack.
    pub(crate) fn open(pack: PackId, span: DirectorySpan, sealed: &[u8], cipher: &Cipher) -> Result<Self, WireError> {
        let mut sealed = sealed.to_vec();
        let plain = cipher
            .open(Purpose::Directory, u64::from(pack.seq), &aad(pack), &mut sealed)
            .map_err(|_| WireError { what: "the directory does not decrypt", at: span.offset as usize })?;
        let mut fields = Fields::new(plain);
        let origins = (0..fields.count(16)?).map(|_| fields.array().map(SessionId)).collect::<Result<Vec<_>, _>>()?;
        let count = fields.count(SLOT_BYTES)?;
        if count != span.slots as usize || count > usize::from(u16::MAX) + 1 {
            return Err(fields.error("the number of slots is not the trailer's"));
        }
        let mut slots = Vec::with_capacity(count);
        for _ in 0..count {
            slots.push(parse_slot(&mut fields, span, origins.len())?);
        }
        fields.end()?;
        Ok(Self::new(origins, slots))
    }
}

fn parse_slot(fields: &mut Fields<'_>, span: DirectorySpan, origins: usize) -> Result<SlotEntry, WireError> {
    let id = ChunkId(fields.array()?);
    let (offset, len, plain_len) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let codec = Codec::parse(fields.u8()?).ok_or_else(|| fields.error("unknown codec"))?;
    let kind = parse_kind(fields.u8()?).ok_or_else(|| fields.error("unknown kind of chunk"))?;
    let (origin, counter) = (fields.u16()?, fields.u32()?);
    let inside = offset as usize >= HEADER_BYTES && u64::from(offset) + u64::from(len) <= u64::from(span.offset);
    if !inside || usize::from(origin) >= origins {
        return Err(fields.error("a slot lies outside of the pack"));
    }
    Ok(SlotEntry { expected: Expected { id, kind, codec, plain_len, counter }, offset, len, origin })
}
