//! Every store runs the conformance suite; stores that cannot carry a repository are refused.

use std::sync::Arc;

use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::store::faulty::{Fault, Faulty, Operation};
use lifeboat_repository::store::local::Local;
use lifeboat_repository::store::memory::Memory;
use lifeboat_repository::store::retry::{Retry, RetryPolicy};
use lifeboat_repository::store::{self, Location, Payload, PutOutcome, Reason, S3Settings, Store, suite};

#[tokio::test]
async fn memory_conforms() {
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    suite::run(&store).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn local_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(Local::new(folder.path().join("made/by/the/first/write")));
    suite::run(&store).await.unwrap();
}

#[tokio::test]
async fn retried_store_conforms() {
    let store: Arc<dyn Store> = Arc::new(Retry::new(Arc::new(Memory::new()), RetryPolicy::default()));
    suite::run(&store).await.unwrap();
}

/// Every second operation fails once before or after its effect; above the retries nothing is to be seen of it.
#[tokio::test]
async fn retries_hide_transient_faults() {
    let memory = Memory::new();
    let mut calls = 0;
    let faulty = Faulty::new(Arc::new(memory.clone()), move |operation, _| {
        calls += 1;
        match calls % 4 {
            _ if operation == Operation::List => Fault::None,
            1 => Fault::Before(Reason::Busy),
            3 => Fault::After(Reason::Busy),
            _ => Fault::None,
        }
    });
    let store = Retry::new(Arc::new(faulty), RetryPolicy::immediate(8));
    for round in 0..50_u8 {
        let key = format!("object/{round}");
        let payload = Payload::from(vec![round; 70_000]);
        assert!(store.put_if_absent(&key, payload.clone()).await.unwrap().is_ours());
        assert_eq!(store.get(&key, 70_000).await.unwrap(), vec![round; 70_000]);
        assert_eq!(memory.object(&key).unwrap(), payload.to_bytes());
    }
}

#[tokio::test]
async fn a_lost_answer_is_recognised_as_own_success_and_only_as_such() {
    for (existing, expected) in [
        (None, PutOutcome::CreatedEarlier),
        (Some(b"other".to_vec()), PutOutcome::Exists),
        (Some(b"longer content".to_vec()), PutOutcome::Exists),
    ] {
        let memory = Memory::new();
        if let Some(bytes) = existing {
            memory.put_if_absent("key", bytes.into()).await.unwrap();
        }
        let mut first = true;
        let faulty = Faulty::new(Arc::new(memory), move |operation, _| {
            let fails = operation == Operation::Put && std::mem::take(&mut first);
            if fails { Fault::After(Reason::Busy) } else { Fault::None }
        });
        let store = Retry::new(Arc::new(faulty), RetryPolicy::immediate(3));
        assert_eq!(store.put_if_absent("key", b"bytes".to_vec().into()).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn retries_are_bounded_and_spare_what_they_cannot_change() {
    for (reason, attempts) in [(Reason::Busy, 5), (Reason::Unreachable, 5), (Reason::Denied, 1), (Reason::Full, 1)] {
        let count = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let counted = Arc::clone(&count);
        let faulty = Faulty::new(Arc::new(Memory::new()), move |_, _| {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Fault::Before(reason)
        });
        let store = Retry::new(Arc::new(faulty), RetryPolicy::immediate(5));
        assert_eq!(store.get("key", 1).await.unwrap_err().reason, reason);
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), attempts, "{reason:?}");
    }
}

#[tokio::test]
async fn a_store_without_put_if_absent_is_refused() {
    let memory = Memory::new();
    let overwriting = Faulty::new(Arc::new(memory.clone()), |_, _| Fault::IgnoreCondition);
    let error = store::probe(&overwriting).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Unsupported);
    assert!(error.to_string().contains("If-None-Match"), "{error}");
    let suite_error = suite::run(&(Arc::new(overwriting) as Arc<dyn Store>)).await.unwrap_err();
    assert!(suite_error.to_string().contains("creates once"), "{suite_error}");
    let good = Memory::new();
    store::probe(&good).await.unwrap();
    assert!(good.keys().is_empty(), "the probe leaves nothing behind");
}

#[tokio::test]
async fn an_unreachable_endpoint_is_told() {
    // Nothing listens on a port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = S3Settings {
        bucket: "bucket".into(),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        access_key: Some("access".into()),
        secret_key: Some("secret".into()),
        ..S3Settings::default()
    };
    let store = store::open(&Location::S3(settings)).unwrap();
    let error = store.get("config", 100).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Unreachable, "{error:?}");
}

#[tokio::test]
async fn a_missing_directory_reads_as_empty() {
    let folder = tempfile::tempdir().unwrap();
    let store = Local::new(folder.path().join("absent"));
    assert_eq!(store.get("config", 10).await.unwrap_err().class(), ErrorClass::NotFound);
    store.delete("config").await.unwrap();
    assert!(!folder.path().join("absent").exists());
}
