//! Commands that hold an application at rest from inside its container, and let it go whatever dies outside.
//!
//! The guardian of a node sends them through the container runtime, the controller through the API server where no
//! guardian is. They need `sh`, `cat`, `sleep` and `rm` in the container, and one folder that can be written to.

use std::time::Duration;

const HOLD: &str = include_str!("hold/hold.sh");
const AWAIT: &str = include_str!("hold/await.sh");
const RELEASE: &str = include_str!("hold/release.sh");
const VOICE: &str = include_str!("hold/voice.sh");
const COMMANDS: &str = include_str!("hold/commands.sh");

/// The exit code of a pair of commands whose thaw failed three times.
pub const THAW_FAILED: i32 = 90;

/// A point on the clock that runs since the boot of a node, as `/proc/uptime` shows it in every container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(u64);

impl BootTime {
    /// From the first number of `/proc/uptime`.
    pub fn parse(uptime: &str) -> Option<Self> {
        let (seconds, hundredths) = uptime.split_whitespace().next()?.split_once('.')?;
        Some(Self(seconds.parse::<u64>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)?))
    }

    /// Now, on this node. `None`: there is no `/proc/uptime`.
    pub fn now() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/uptime").ok()?)
    }

    /// That much later.
    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(hundredths(time)))
    }

    /// From a number of hundredths of a second.
    pub const fn from_hundredths(hundredths: u64) -> Self {
        Self(hundredths)
    }

    /// Hundredths of a second since the boot.
    pub const fn hundredths(self) -> u64 {
        self.0
    }
}

/// Until when something is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// A point on the node's clock.
    At(BootTime),
    /// That long from when it starts, for those who do not know the node's clock.
    For(Duration),
}

impl Until {
    fn word(self) -> String {
        match self {
            Self::At(time) => time.0.to_string(),
            Self::For(time) => format!("+{}", hundredths(time)),
        }
    }
}

fn hundredths(time: Duration) -> u64 {
    u64::try_from(time.as_millis() / 10).unwrap_or(u64::MAX)
}

fn shell(script: &str, arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    ["sh", "-c", script, "lifeboat"].into_iter().map(str::to_owned).chain(arguments).collect()
}

/// Runs `command` until it is released, until `end`, or until whoever sent this is gone; then gives it `grace` to end.
pub fn hold(token: &str, end: Until, grace: Duration, command: &[String]) -> Vec<String> {
    let first = [token.to_owned(), end.word(), hundredths(grace).to_string()];
    shell(HOLD, first.into_iter().chain(command.iter().cloned()))
}

/// Ends well as soon as the application is at rest.
pub fn await_frozen(token: &str, end: Until) -> Vec<String> {
    shell(AWAIT, [token.to_owned(), end.word()])
}

/// Lets go and waits until that is done. Ends well also when nothing is held.
pub fn release(token: &str, patience: Duration) -> Vec<String> {
    shell(RELEASE, [token.to_owned(), hundredths(patience).to_string()])
}

/// Does what [`await_frozen`] and [`release`] do, as one process that is there before either is needed: it prints `frozen` as soon
/// as the application is at rest, and tells it to let go when it is given a line.
pub fn voice(token: &str, end: Until) -> Vec<String> {
    shell(VOICE, [token.to_owned(), end.word()])
}

/// A pair of commands as one command that holds.
pub fn commands(freeze: Option<&[String]>, thaw: Option<&[String]>) -> Vec<String> {
    let words = |command: Option<&[String]>| command.map(quoted).unwrap_or_default();
    shell(COMMANDS, [words(freeze), words(thaw)])
}

/// The words of a command for a shell, which sees in them nothing but themselves.
fn quoted(command: &[String]) -> String {
    let words: Vec<_> = command.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect();
    words.join(" ")
}

/// What a command that held has said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// It was let go because its end had come.
    pub is_late: bool,
    /// Its last words, fit for a status.
    pub words: String,
}

impl Said {
    /// Reads the standard output of [`hold`].
    pub fn read(output: &[u8]) -> Self {
        let text = String::from_utf8_lossy(output);
        let (late, lines): (Vec<_>, Vec<_>) =
            text.lines().filter(|line| !line.is_empty()).partition(|line| *line == "lifeboat-late");
        let words: String = lines.join("; ").chars().filter(|c| !c.is_control()).take(400).collect();
        Self { is_late: !late.is_empty(), words }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Output, Stdio};

    use super::*;

    fn start(command: &[String]) -> Child {
        Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    }

    fn run(command: &[String]) -> Output {
        start(command).wait_with_output().unwrap()
    }

    fn in_seconds(seconds: u64) -> Until {
        Until::At(BootTime::now().unwrap().after(Duration::from_secs(seconds)))
    }

    fn in_millis(millis: u64) -> Until {
        Until::For(Duration::from_millis(millis))
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    /// A token that no other test of this machine has.
    fn token(name: &str) -> String {
        format!("test-{name}-{}", std::process::id())
    }

    const GRACE: Duration = Duration::from_secs(2);

    #[test]
    fn what_is_held_is_at_rest_until_it_is_released() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("it's frozen");
        let name = file.to_string_lossy().into_owned();
        let pair = commands(Some(&words(&["touch", &name])), Some(&words(&["rm", &name])));
        let token = token("released");
        let held = start(&hold(&token, in_seconds(20), GRACE, &pair));
        assert!(run(&await_frozen(&token, in_seconds(10))).status.success());
        assert!(file.exists());
        assert!(run(&release(&token, GRACE)).status.success());
        assert!(!file.exists());
        let output = held.wait_with_output().unwrap();
        assert_eq!((output.status.code(), Said::read(&output.stdout)), (Some(0), Said::default()));
        assert!(run(&release(&token, GRACE)).status.success(), "nothing is held");
    }

    #[test]
    fn a_voice_says_that_the_application_is_at_rest_and_hands_on_the_word_to_let_go() {
        use std::io::{BufRead, BufReader, Write};

        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("frozen").to_string_lossy().into_owned();
        let pair = commands(Some(&words(&["touch", &name])), Some(&words(&["rm", &name])));
        let token = token("voice");
        let (command, unheard) = (voice(&token, in_seconds(20)), voice("nobody", in_millis(50)));
        let mut voice = Command::new(&command[0]);
        let mut voice = voice.args(&command[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let held = start(&hold(&token, in_seconds(20), GRACE, &pair));
        let mut said = String::new();
        BufReader::new(voice.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "frozen\n");
        assert!(folder.path().join("frozen").exists());
        let mut input = voice.stdin.take().unwrap();
        input.write_all(b"release\n").unwrap();
        assert!(held.wait_with_output().unwrap().status.success());
        assert!(!folder.path().join("frozen").exists());
        assert!(voice.wait().unwrap().success(), "it ends with what is held, its input open or not");

        assert_eq!(run(&unheard).status.code(), Some(93));
    }

    #[test]
    fn the_end_and_the_loss_of_the_holder_let_go_too() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("frozen").to_string_lossy().into_owned();
        let pair = commands(Some(&words(&["touch", &name])), Some(&words(&["rm", &name])));
        let late = start(&hold(&token("late"), in_millis(300), GRACE, &pair));
        let output = late.wait_with_output().unwrap();
        assert!(output.status.success() && Said::read(&output.stdout).is_late);
        assert!(!folder.path().join("frozen").exists());

        let token = token("lost");
        let mut lost = start(&hold(&token, in_seconds(60), GRACE, &pair));
        assert!(run(&await_frozen(&token, in_seconds(10))).status.success());
        lost.kill().unwrap();
        lost.wait().unwrap();
        let end = BootTime::now().unwrap().after(Duration::from_secs(10));
        while folder.path().join("frozen").exists() {
            assert!(BootTime::now().unwrap() < end, "still frozen without its holder");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn failures_are_told_apart() {
        let thaw = words(&["true"]);
        let failing = commands(Some(&words(&["sh", "-c", "echo no space >&2; exit 3"])), Some(&thaw));
        let output = run(&hold(&token("fails"), in_seconds(20), GRACE, &failing));
        assert_eq!((output.status.code(), Said::read(&output.stdout).words.as_str()), (Some(3), "no space"));

        let missing = run(&hold(&token("missing"), in_seconds(20), GRACE, &words(&["no-such-command"])));
        assert_eq!(missing.status.code(), Some(127));

        let stuck = commands(None, Some(&words(&["false"])));
        let end = in_millis(50);
        assert_eq!(run(&hold(&token("stuck"), end, Duration::from_secs(9), &stuck)).status.code(), Some(THAW_FAILED));
    }

    #[test]
    fn a_hanging_freeze_and_a_deaf_session_are_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("thawed").to_string_lossy().into_owned();
        let hanging = commands(Some(&words(&["sh", "-c", "exec sleep 30"])), Some(&words(&["touch", &name])));
        let output = run(&hold(&token("hangs"), in_millis(200), GRACE, &hanging));
        assert!(!output.status.success() && folder.path().join("thawed").exists());
        let deaf = words(&["sh", "-c", "echo frozen; exec sleep 30"]);
        let output = run(&hold(&token("deaf"), in_millis(200), Duration::from_millis(200), &deaf));
        assert_eq!(output.status.code(), Some(137));
    }

    #[test]
    fn times_are_read_as_proc_shows_them() {
        assert_eq!(BootTime::parse("12345.67 23456.78\n"), Some(BootTime::from_hundredths(1_234_567)));
        assert_eq!(BootTime::parse("nonsense"), None);
    }
}
