//! `lifeboat keys`

use anyhow::{Context, Result};
use lifeboat_repository::{
    keys::{KeySlot, Role, Secret, SlotKind},
    repository::Repository,
};
use serde_json::json;

use crate::output::say;
use crate::{
    options::{DONE, Global, KeysCommand, NewSecret},
    output, repository,
};

/// Lists and changes what opens the repository.
pub(crate) async fn run(global: &Global, command: KeysCommand) -> Result<u8> {
    // A missing secret is told before Argon2id takes its time.
    let new = match &command {
        KeysCommand::Add(options) => Some(secret(&options.secret)?),
        KeysCommand::Change(options) => Some(secret(options)?),
        KeysCommand::List | KeysCommand::Remove(_) => None,
    };
    let repository = repository::open(global).await?;
    let done = match (command, new) {
        (KeysCommand::Add(options), Some(new)) => {
            let role = if options.writer { Role::Writer } else { Role::Full };
            ("added", repository.add_key(&new, role).await?)
        }
        (KeysCommand::Change(_), Some(new)) => ("changed", repository.change_key(&new).await?),
        (KeysCommand::Remove(options), _) => ("removed", repository.remove_key(&options.slot).await?),
        _ => return list(global, &repository).await,
    };
    if global.json {
        say!("{}", json!({done.0: done.1}));
    } else if !global.quiet {
        say!("{} the key slot {}", done.0, done.1);
    }
    Ok(DONE)
}

fn secret(new: &NewSecret) -> Result<Secret> {
    let found =
        repository::secret_from(new.key_file.as_deref(), new.password_file.as_deref(), new.password.as_deref())?;
    found.context(
        "no new password given; set LIFEBOAT_NEW_PASSWORD, or write --new-password-file or --new-key-file FILE",
    )
}

async fn list(global: &Global, repository: &Repository) -> Result<u8> {
    let slots = repository.key_slots().await?;
    if global.json {
        let slots: Vec<_> = slots
            .iter()
            .map(|slot| {
                let (kind, role) = words(slot);
                json!({"name": slot.name, "kind": kind, "role": role, "opened": slot.opened})
            })
            .collect();
        say!("{}", serde_json::to_string_pretty(&slots)?);
        return Ok(DONE);
    }
    let mut rows = vec![["SLOT", "KIND", "ROLE", "OPENED"].map(str::to_owned).to_vec()];
    rows.extend(slots.iter().map(|slot| {
        let (kind, role) = words(slot);
        vec![output::path(slot.name.as_bytes()), kind.into(), role.into(), if slot.opened { "*" } else { "" }.into()]
    }));
    output::print(format_args!("{}", output::table(&rows)));
    Ok(DONE)
}

fn words(slot: &KeySlot) -> (&'static str, &'static str) {
    match slot.usable {
        None => ("unusable", "none"),
        Some((kind, role)) => (
            match kind {
                SlotKind::Passphrase => "password",
                SlotKind::KeyFile => "key-file",
            },
            match role {
                Role::Full => "full",
                Role::Writer => "writer",
            },
        ),
    }
}
