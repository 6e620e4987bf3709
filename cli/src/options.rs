//! What can be written on the command line, and the exit codes.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use lifeboat_repository::session::Compression;
use lifeboat_repository::share::Share;

/// Everything was done.
pub(crate) const DONE: u8 = 0;
/// Nothing was done, or not to the end.
pub(crate) const FAILED: u8 = 1;
/// Done, but some files could not be read or restored, or damage was found; all are listed.
pub(crate) const INCOMPLETE: u8 = 3;

/// Back up, list, restore and check without a cluster.
///
/// A recovery needs this program, the repository's location and its password or key file, and nothing else.
///
/// Exit codes: 0 done; 1 failed, or not done to the end; 2 wrong arguments; 3 done, but some files could not be read or
/// restored, or damage was found: all of it is listed.
#[derive(Parser, Debug)]
#[command(name = "lifeboat", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the repository is and how it is opened.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// The repository: a folder, or `s3://BUCKET/FOLDER?endpoint=URL&region=REGION`
    #[arg(short, long, env = "LIFEBOAT_REPOSITORY", global = true, value_name = "LOCATION")]
    pub(crate) repository: Option<String>,
    /// The password, from the environment only, so that it shows in no list of processes
    #[arg(long, env = "LIFEBOAT_PASSWORD", global = true, hide = true, hide_env_values = true)]
    pub(crate) password: Option<String>,
    /// A file whose first line is the password
    #[arg(long, env = "LIFEBOAT_PASSWORD_FILE", global = true, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
    /// A file with a key of 32 random bytes, instead of a password
    #[arg(long, env = "LIFEBOAT_KEY_FILE", global = true, value_name = "FILE", conflicts_with_all = ["password", "password_file"])]
    pub(crate) key_file: Option<PathBuf>,
    /// Where index files are kept between runs; may be deleted at any time
    #[arg(long, env = "LIFEBOAT_CACHE_DIR", global = true, value_name = "FOLDER")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress and no summary; errors only
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Make a repository at the location
    Init,
    /// Back up a folder
    Backup(Backup),
    /// List the snapshots
    Snapshots(Snapshots),
    /// List the files of a snapshot
    Ls(Ls),
    /// Print a file of a snapshot
    Cat(Cat),
    /// Show what differs between two snapshots
    Diff(Diff),
    /// Restore a snapshot into a folder
    Restore(Restore),
    /// Show snapshots as folders, read-only, until Ctrl-C or `umount`
    Mount(Mount),
    /// Show how large the repository is, and what made it so
    Stats,
    /// List and change what opens the repository
    Keys(Keys),
    /// Check that all snapshots are there and whole
    Check(Check),
    /// Take snapshots off the list, by rules or by name; `expire` gives their space back
    Forget(Forget),
    /// Delete what no snapshot refers to any more, and repack what is mostly dead
    Expire(Expire),
    /// Read all objects and compare their hashes; needs no password
    Scrub(Scrub),
    /// Replace what is damaged from a copy, or let the next backup store it again
    Heal(Heal),
    /// Make copies of snapshots in another repository
    Replicate(Replicate),
    /// Make the index anew where it is missing or damaged
    RebuildIndex,
    /// Print a script that completes commands in a shell
    Completions(Completions),
    /// Write the manual pages
    #[command(hide = true)]
    Man(Man),
}

impl Command {
    /// Whether it keeps a repository in order, behind backups and applications on the same machine.
    pub(crate) fn is_upkeep(&self) -> bool {
        matches!(self, Self::Check(_) | Self::Forget(_) | Self::Expire(_) | Self::Scrub(_))
    }
}

#[derive(Args, Debug)]
pub(crate) struct Backup {
    /// The folder
    pub(crate) path: PathBuf,
    /// A label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
    /// What this is a backup of; snapshots of one lineage build on each other. Default: HOST:PATH
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Leave out what matches; may be given several times
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Do not cross into other file systems
    #[arg(short = 'x', long)]
    pub(crate) one_file_system: bool,
    /// How hard to compress: 0 (not at all), 1 (fast) to 19 (small, slow)
    #[arg(long, value_name = "LEVEL", default_value = "1")]
    pub(crate) compression: Compression,
    /// Read every file, also those that did not change since the last snapshot
    #[arg(long)]
    pub(crate) force: bool,
    /// PATH is a block device or a disk image: its bytes are backed up as the file `volume.img`, holes and zeros for nothing
    #[arg(long, conflicts_with_all = ["exclude", "one_file_system"])]
    pub(crate) image: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Snapshots {
    /// Only this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Only with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
}

#[derive(Args, Debug)]
pub(crate) struct Ls {
    /// A snapshot's id, its first characters, or `latest`
    pub(crate) snapshot: String,
    /// Only this folder or file of the snapshot
    pub(crate) path: Option<PathBuf>,
    /// Also what lies in subfolders
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,
}

#[derive(Args, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(crate) struct Restore {
    /// A snapshot's id, its first characters, or `latest`
    pub(crate) snapshot: String,
    /// The folder to restore into; made if missing
    pub(crate) target: PathBuf,
    /// Only this path of the snapshot, or what matches; may be given several times
    #[arg(long, value_name = "PATH|GLOB")]
    pub(crate) include: Vec<String>,
    /// Replace files that exist; without it an existing file is an error
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Do not restore owners (for restores without root)
    #[arg(long)]
    pub(crate) no_owner: bool,
    /// With `latest`: the latest of this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Only list what would be restored
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// The snapshot is an image: write it over TARGET, a block device or a file; whatever was there is lost
    #[arg(long, conflicts_with_all = ["include", "dry_run", "no_owner"], requires = "overwrite")]
    pub(crate) image: bool,
}

/// `snapshots/TIME` are the trees. Links lead to them: `snapshots/latest`, `ids/ID`, `lineages/LINEAGE/TIME` and `latest`,
/// `tags/NAME=VALUE/TIME` and `latest` (a slash in a name is shown as `%2F`). New snapshots appear. What is entered is kept
/// from expiring until the end. A file that cannot be read is an I/O error and named here. Exit code 3 when there was any.
#[derive(Args, Debug)]
pub(crate) struct Mount {
    /// The folder to show them in; it must be empty
    pub(crate) mountpoint: PathBuf,
    /// Only the files of this snapshot, directly in MOUNTPOINT: an id, its first characters, or `latest`
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "tag")]
    pub(crate) snapshot: Option<String>,
    /// Only this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Only with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
    /// Let other users in as well; the kernel checks owners, permissions and access control lists of files
    #[arg(long)]
    pub(crate) allow_other: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Cat {
    /// A snapshot's id, its first characters, or `latest`
    pub(crate) snapshot: String,
    /// The file in the snapshot
    pub(crate) path: PathBuf,
    /// With `latest`: the latest of this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
}

/// Each line begins with `+` (new), `-` (gone) or `M` (changed; in what stands behind the path). With --json: one object a line.
#[derive(Args, Debug)]
pub(crate) struct Diff {
    /// The earlier snapshot
    pub(crate) before: String,
    /// The later snapshot
    pub(crate) after: String,
}

#[derive(Args, Debug)]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) command: KeysCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum KeysCommand {
    /// List the key slots
    List,
    /// Add a password or key file that opens the repository
    Add(KeysAdd),
    /// Remove a key slot; never the last one that opens data
    Remove(KeysRemove),
    /// Replace the password or key file that opened the repository
    Change(NewSecret),
}

#[derive(Args, Debug)]
pub(crate) struct KeysAdd {
    #[command(flatten)]
    pub(crate) secret: NewSecret,
    /// Opens for writing, listing and checking only: no data can be read with it
    #[arg(long)]
    pub(crate) writer: bool,
}

#[derive(Args, Debug)]
pub(crate) struct KeysRemove {
    /// The slot's name, or its first characters
    pub(crate) slot: String,
}

/// The new password or key.
#[derive(Args, Debug)]
pub(crate) struct NewSecret {
    /// The new password, from the environment only
    #[arg(
        long = "new-password",
        id = "new_password",
        env = "LIFEBOAT_NEW_PASSWORD",
        hide = true,
        hide_env_values = true
    )]
    pub(crate) password: Option<String>,
    /// A file whose first line is the new password; or set `LIFEBOAT_NEW_PASSWORD`
    #[arg(long = "new-password-file", id = "new_password_file", value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
    /// A file with the new key of 32 random bytes
    #[arg(long = "new-key-file", id = "new_key_file", value_name = "FILE", conflicts_with = "new_password_file")]
    pub(crate) key_file: Option<PathBuf>,
}

/// Exit code 3 when damage was found.
#[derive(Args, Debug)]
pub(crate) struct Check {
    /// Read, decrypt and compare all data, not only the structure; or a share of it: 1/7 is the next seventh
    #[arg(long, value_name = "SHARE", num_args = 0..=1, default_missing_value = "1/1", require_equals = true)]
    pub(crate) read_data: Option<Share>,
}

/// Exit code 3 when damage was found.
#[derive(Args, Debug)]
pub(crate) struct Scrub {
    /// Only a share of the packs, those after the ones of the last run: 1/7 is a seventh. Needs --cache-dir
    #[arg(long, value_name = "SHARE", default_value = "1/1")]
    pub(crate) share: Share,
}

/// Without a copy, damaged chunks are masked: the next backup that has them stores them again, and earlier snapshots
/// find them there. Exit code 3 when damage is left.
#[derive(Args, Debug)]
pub(crate) struct Heal {
    /// A copy of this repository's store, as a bucket's replication makes it
    #[arg(long, value_name = "LOCATION")]
    pub(crate) from: Option<String>,
    /// Do not read data: only damage of the structure is found
    #[arg(long)]
    pub(crate) quick: bool,
    /// Only list what could be done
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// The other repository keeps its own retention: what it let go does not come back unless it is named here.
#[derive(Args, Debug)]
pub(crate) struct Replicate {
    /// The other repository
    #[arg(long, value_name = "LOCATION")]
    pub(crate) to: String,
    /// Its password, from the environment only
    #[arg(long, env = "LIFEBOAT_TO_PASSWORD", hide = true, hide_env_values = true)]
    pub(crate) to_password: Option<String>,
    /// A file whose first line is its password; default: the password or key of this repository
    #[arg(long, value_name = "FILE")]
    pub(crate) to_password_file: Option<PathBuf>,
    /// A file with its key
    #[arg(long, value_name = "FILE", conflicts_with = "to_password_file")]
    pub(crate) to_key_file: Option<PathBuf>,
    /// Make it if it does not exist, with the keys of this repository: then nothing that it has is read again
    #[arg(long)]
    pub(crate) init: bool,
    /// Only these snapshots, also if the other repository let them go
    #[arg(value_name = "SNAPSHOT")]
    pub(crate) snapshots: Vec<String>,
    /// Only this lineage; may be given several times
    #[arg(long)]
    pub(crate) lineage: Vec<String>,
    /// Only with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
    /// Only snapshots that are not older, such as `30 days`
    #[arg(long, value_name = "DURATION")]
    pub(crate) max_age: Option<jiff::Span>,
    /// Only so many of each lineage, the newest
    #[arg(long, value_name = "COUNT")]
    pub(crate) newest: Option<usize>,
    /// Only list what would be replicated
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Args, Debug)]
pub(crate) struct Man {
    /// The folder to write them into; made if missing
    pub(crate) folder: PathBuf,
}

/// Forgotten snapshots disappear from every list at once and cannot be brought back. Their space comes back with
/// `lifeboat expire`. Rules look at each lineage by itself; its newest snapshot, and its newest without skipped files,
/// stay whatever the rules say.
#[derive(Args, Debug)]
pub(crate) struct Forget {
    /// Forget exactly these: ids or their first characters. A recovery point goes with its members
    #[arg(value_name = "SNAPSHOT", required_unless_present = "rules", conflicts_with_all = ["rules", "lineage", "tag"])]
    pub(crate) snapshots: Vec<String>,
    #[command(flatten)]
    pub(crate) rules: Rules,
    /// Only this lineage
    #[arg(long)]
    pub(crate) lineage: Option<String>,
    /// Only with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    pub(crate) tag: Vec<(String, String)>,
    /// Where days, weeks, months and years begin: a name like Europe/Berlin. Default: this machine's
    #[arg(long, value_name = "ZONE")]
    pub(crate) time_zone: Option<String>,
    /// Change nothing, and say what would stay and why
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
}

/// What stays. Several rules keep what any of them keeps.
#[derive(Args, Debug)]
#[group(id = "rules", multiple = true)]
pub(crate) struct Rules {
    /// The newest N
    #[arg(long = "keep-last", value_name = "N")]
    pub(crate) last: Option<u32>,
    /// The newest of each of the last N hours that have any
    #[arg(long = "keep-hourly", value_name = "N")]
    pub(crate) hourly: Option<u32>,
    /// The newest of each of the last N days that have any
    #[arg(long = "keep-daily", value_name = "N")]
    pub(crate) daily: Option<u32>,
    /// The newest of each of the last N weeks that have any
    #[arg(long = "keep-weekly", value_name = "N")]
    pub(crate) weekly: Option<u32>,
    /// The newest of each of the last N months that have any
    #[arg(long = "keep-monthly", value_name = "N")]
    pub(crate) monthly: Option<u32>,
    /// The newest of each of the last N years that have any
    #[arg(long = "keep-yearly", value_name = "N")]
    pub(crate) yearly: Option<u32>,
    /// All that are at most so much older than the newest: 30d, 2w, 1y6mo
    #[arg(long = "keep-within", value_name = "AGE")]
    pub(crate) within: Option<jiff::Span>,
}

/// Any number may run at once, also while others back up or restore. Stopped at any point, the next one goes on.
#[derive(Args, Debug)]
pub(crate) struct Expire {
    /// How much may be copied to take the space of dead files back from packs that are mostly dead: 500MiB, 4GiB, 0
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size)]
    pub(crate) repack_budget: u64,
    /// How long to wait for backups that are running, before the rest is left for the next time
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) wait: Duration,
    /// A backup or restore that gave no sign of life for so long is taken for dead
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = duration)]
    pub(crate) silence: Duration,
    /// Change nothing, and say what would be done
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|_| "write a time like 30s, 15m or 2h".to_owned())?;
    Duration::try_from(parsed).map_err(|_| "a time cannot be negative".to_owned())
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        "TiB" | "T" => 40,
        _ => return Err("write a size like 500MiB or 4GiB".to_owned()),
    };
    let number: u64 = digits.trim().parse().map_err(|_| "write a size like 500MiB or 4GiB".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size is too large".to_owned())
}

fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_and_times_are_read_as_they_are_written() {
        assert_eq!((size("0"), size("500MiB"), size("4GiB")), (Ok(0), Ok(500 << 20), Ok(4 << 30)));
        assert!(["", "GiB", "1GB", "-1", "99999999999TiB"].iter().all(|text| size(text).is_err()));
        assert_eq!(duration("15m"), Ok(Duration::from_mins(15)));
        assert!(["", "5", "-5m"].iter().all(|text| duration(text).is_err()));
    }

    #[test]
    fn a_tag_needs_a_name() {
        assert_eq!(tag("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(tag("a").is_err());
        assert!(tag("=b").is_err());
    }
}
