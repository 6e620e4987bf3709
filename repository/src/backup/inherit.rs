//! What a large file takes over from the parent: all that it lists, or nothing.

use std::sync::Arc;

use futures::StreamExt;

use super::BackupError;
use super::read::Context;
use crate::manifest::{self, Contents, Entry, Kind, Piece, Regular};

/// Whether a chunk of the file is lost. Then it is cut as a whole: windows and patches would be other chunks, in which
/// earlier snapshots do not find what they lost.
pub(super) async fn has_lost(context: &Context, file: &Regular) -> Result<bool, BackupError> {
    let Some(source) = context.source.as_ref().filter(|_| context.sink.knows_lost()) else { return Ok(false) };
    if matches!(&file.contents, Contents::Listed(lists) if lists.iter().any(|list| context.sink.is_lost(list))) {
        return Ok(true);
    }
    let mut pieces = manifest::pieces(Arc::clone(source), file);
    while let Some(list) = pieces.next().await {
        let is_lost = |piece: &Piece| matches!(piece, Piece::Data { chunk, .. } if context.sink.is_lost(chunk));
        match list {
            Ok(list) if list.iter().any(is_lost) => return Ok(true),
            Ok(_) => {}
            Err(error) if super::parent::is_lost(&error) => return Ok(true),
            Err(error) => return Err(BackupError::ReadParent(error)),
        }
    }
    Ok(false)
}

/// Takes over the lists of a large file and all that they list.
pub(super) async fn inherit_lists(context: &Context, entry: &Entry) -> Result<bool, BackupError> {
    let Kind::Regular(file) = &entry.kind else { return Ok(false) };
    let Some(source) = &context.source else { return Ok(false) };
    for file in [file, &file.page_map_as_file()] {
        if let Contents::Listed(lists) = &file.contents
            && !lists.iter().all(|list| context.sink.inherit(list))
        {
            return Ok(false);
        }
        let mut pieces = manifest::pieces(Arc::clone(source), file);
        while let Some(list) = pieces.next().await {
            match list {
                Ok(list) if context.inherits(&list) => {}
                Ok(_) => return Ok(false),
                Err(error) if super::parent::is_lost(&error) => return Ok(false),
                Err(error) => return Err(BackupError::ReadParent(error)),
            }
        }
    }
    Ok(true)
}
