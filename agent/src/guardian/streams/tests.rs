//! Commands that are real processes, and what becomes of them when they fail, hang or are left alone.

use super::super::testing::Node;
use super::*;
use std::sync::Arc;
use tokio::net::UnixStream;

fn words(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(str::to_owned).to_vec()
}

fn order_of(pod: &str, words: Vec<String>, takes_input: bool) -> Order {
    let workload =
        LeasedWorkload { namespace: "ns".into(), pod: pod.into(), pod_uid: pod.into(), container: "c".into() };
    Order { workload, words, limit: Duration::from_mins(1), takes_input }
}

/// A stream that is running.
struct Running {
    agent: UnixStream,
    serving: tokio::task::JoinHandle<()>,
}

/// Begins an order and answers what the agent would hear.
fn begin(node: &Node, order: Order) -> Running {
    let (agent, ours) = UnixStream::pair().unwrap();
    let (guardian, name) = (Arc::clone(&node.guardian), node.name.clone());
    let serving = tokio::spawn(async move {
        let (mut from, mut to) = ours.into_split();
        if let Ok(end) = run(&guardian, &name, &order, &mut from, &mut to).await {
            // The agent may be gone.
            let _ = wire::say(&mut to, &Frame::End(end)).await;
        }
    });
    Running { agent, serving }
}

impl Running {
    /// All data to the end, and how it ended.
    async fn hear_all(&mut self) -> (Vec<u8>, Option<End>) {
        let mut all = Vec::new();
        loop {
            match wire::hear(&mut self.agent).await.unwrap() {
                Some(Frame::Started) => {}
                Some(Frame::Data(bytes)) => all.extend(bytes),
                Some(Frame::End(end)) => return (all, Some(end)),
                other => return (all, other.map(|other| unreachable!("{other:?}"))),
            }
        }
    }
}

/// Nothing of the stream is left: no process, no intent.
fn is_clean(node: &Node) -> bool {
    let name = format!("lifeboat-{}", node.name);
    !node.guardian.intents.has(&name) && !node.guardian.containers.has(&name)
}

async fn becomes_clean(node: &Node) {
    let clean = async {
        while !is_clean(node) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), clean).await.expect("in time");
}

fn failed(message: &str) -> End {
    End::new(How::Failed, message)
}

#[tokio::test]
async fn an_output_comes_byte_by_byte_with_the_exit_code_behind_it() {
    let node = Node::new("dump", true);
    let mut running = begin(&node, order_of("p", words("head -c 3000000 /dev/zero; echo; echo done >&2"), false));
    let (bytes, end) = running.hear_all().await;
    assert_eq!(end, Some(End::new(How::Done, "")));
    assert!(bytes.len() == 3_000_001 && bytes.ends_with(b"\0\n"));
    becomes_clean(&node).await;
}

#[tokio::test]
async fn whatever_was_printed_before_a_command_that_fails_is_not_done() {
    for (script, says) in [
        ("echo half; echo 'no such table' >&2; exit 3", "exit code 3: no such table"),
        ("echo half; kill -9 $$", "the command was killed (exit code 137)"),
        ("seq 100000 >&2; exit 1", "99999; 100000"),
    ] {
        let node = Node::new("fails", true);
        let (_, end) = begin(&node, order_of("p", words(script), false)).hear_all().await;
        let end = end.unwrap();
        assert!(end.how == How::Failed && end.message.contains(says), "{end:?}");
        assert!(end.message.len() < WORDS + 100, "{}", end.message.len());
        becomes_clean(&node).await;
    }
    let node = Node::new("missing", true);
    let missing = begin(&node, order_of("p", vec!["no-such-program".into()], false)).hear_all().await;
    assert_eq!(missing.1, Some(failed("the container has no `no-such-program`")));
    let gone = begin(&node, order_of("gone", words("true"), false)).hear_all().await;
    assert_eq!(gone.1.map(|end| end.how), Some(How::Gone));
    assert!(is_clean(&node));
}

#[tokio::test]
async fn a_command_that_does_not_end_is_ended() {
    let node = Node::new("hangs", true);
    let mut order = order_of("p", words("echo begun; exec sleep 600"), false);
    order.limit = Duration::from_millis(300);
    let (bytes, end) = begin(&node, order).hear_all().await;
    assert_eq!((bytes.as_slice(), end.map(|end| end.how)), (&b"begun\n"[..], Some(How::TimedOut)));
    becomes_clean(&node).await;
}

#[tokio::test]
async fn a_command_ends_with_the_agent_and_with_the_guardian() {
    for takes_input in [false, true] {
        let node = Node::new("left", true);
        let order = || order_of("p", words("echo begun; exec sleep 600"), takes_input);
        let mut running = begin(&node, order());
        assert_eq!(wire::hear(&mut running.agent).await.unwrap(), Some(Frame::Started));
        drop(running.agent);
        becomes_clean(&node).await;

        // As a kill of the guardian does: locks go, and the process in the container does not.
        let mut running = begin(&node, order());
        assert_eq!(wire::hear(&mut running.agent).await.unwrap(), Some(Frame::Started));
        running.serving.abort();
        assert!(running.serving.await.is_err() && !is_clean(&node));
        // A process that another test starts just now holds the lock too, until it becomes its own program.
        for _ in 0..100 {
            assert_eq!(node.guardian.sweep().await, 0);
            if is_clean(&node) {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        assert!(is_clean(&node));
    }
}

#[tokio::test]
async fn one_attempt_runs_at_a_time() {
    let node = Node::new("twice", true);
    let mut first = begin(&node, order_of("p", words("exec sleep 600"), false));
    assert_eq!(wire::hear(&mut first.agent).await.unwrap(), Some(Frame::Started));
    let mut second = begin(&node, order_of("p", words("echo second"), false));
    sleep(Duration::from_millis(300)).await;
    drop(first.agent);
    let (bytes, end) = second.hear_all().await;
    assert_eq!((bytes.as_slice(), end.map(|end| end.how)), (&b"second\n"[..], Some(How::Done)));
}

#[tokio::test]
async fn an_input_is_given_to_its_end_and_a_command_may_end_before() {
    let node = Node::new("feed", true);
    let file = node.file("restored");
    let mut running = begin(&node, order_of("p", words(&format!("echo chatter; cat > {file}")), true));
    let bytes: Vec<_> = (0..2_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    wire::say_data(&mut running.agent, &bytes).await.unwrap();
    wire::say(&mut running.agent, &Frame::InputEnds).await.unwrap();
    assert_eq!(running.hear_all().await, (Vec::new(), Some(End::new(How::Done, ""))));
    assert!(std::fs::read(&file).unwrap() == bytes);
    becomes_clean(&node).await;

    let mut early = begin(&node, order_of("p", words("head -c 10 >/dev/null; echo enough >&2; exit 4"), true));
    let (mut from, mut to) = early.agent.split();
    let sending = async {
        // The guardian hears no more once the command is over.
        let sent = wire::say_data(&mut to, &vec![0; 50 << 20]).await;
        assert!(sent.is_err(), "all was taken for a command that is gone");
        std::future::pending::<()>().await;
    };
    let hearing = async {
        loop {
            match wire::hear(&mut from).await.unwrap() {
                Some(Frame::Started) => {}
                other => break other,
            }
        }
    };
    tokio::select! {
        () = sending => unreachable!(),
        heard = hearing => assert_eq!(heard, Some(Frame::End(failed("exit code 4: enough")))),
    }
}
