//! The conformance suite and a whole backup on two real S3 servers of different origin, started here on loopback.
#![cfg(feature = "s3-servers")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifeboat_repository::backup::{self, TreeBackup};
use lifeboat_repository::check::CheckOptions;
use lifeboat_repository::error::{Classified, ErrorClass};
use lifeboat_repository::keys::Secret;
use lifeboat_repository::repository::{InitOptions, OpenOptions, Repository};
use lifeboat_repository::restore::{self, RestoreOptions};
use lifeboat_repository::store::{self, Location, S3Settings, Store, suite};

const ACCESS_KEY: &str = "suite-access-key";
const SECRET_KEY: &str = "suite-secret-key";

/// A server that ends with the test.
struct Server {
    process: Child,
    endpoint: String,
    data: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn program(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set; run through `make store-test`"))
}

impl Server {
    fn start(name: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let address = format!("127.0.0.1:{}", free_port());
        for folder in ["data/bucket", "iam", "versions"] {
            std::fs::create_dir_all(data.path().join(folder)).unwrap();
        }
        let at = |folder: &str| data.path().join(folder).to_string_lossy().into_owned();
        let mut command = if name == "versitygw" {
            let mut command = Command::new(program("LIFEBOAT_S3_VERSITYGW"));
            command.args([
                "--port",
                &address,
                "--health",
                "/health",
                "--quiet",
                "--iam-dir",
                &at("iam"),
                "posix",
                "--versioning-dir",
                &at("versions"),
                &at("data"),
            ]);
            command.envs([("ROOT_ACCESS_KEY", ACCESS_KEY), ("ROOT_SECRET_KEY", SECRET_KEY)]);
            command
        } else {
            let mut command = Command::new(program("LIFEBOAT_S3_MINIO"));
            command.args(["server", "--address", &address, "--quiet", &at("data")]);
            command.envs([
                ("MINIO_ROOT_USER", ACCESS_KEY),
                ("MINIO_ROOT_PASSWORD", SECRET_KEY),
                ("MINIO_BROWSER", "off"),
                ("MINIO_UPDATE", "off"),
            ]);
            command
        };
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { process, endpoint: format!("http://{address}"), data };
        let end = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < end, "{name} did not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    fn settings(&self) -> S3Settings {
        S3Settings {
            bucket: "bucket".into(),
            prefix: "some/prefix".into(),
            endpoint: Some(self.endpoint.clone()),
            access_key: Some(ACCESS_KEY.into()),
            secret_key: Some(SECRET_KEY.into()),
            ..S3Settings::default()
        }
    }

    fn store(&self, change: impl Fn(&mut S3Settings)) -> Arc<dyn Store> {
        let mut settings = self.settings();
        change(&mut settings);
        store::open(&Location::S3(settings)).unwrap()
    }

    /// Waits until the server serves, not only listens.
    async fn serve(&self) {
        let end = Instant::now() + Duration::from_secs(30);
        let store = self.store(|_| {});
        loop {
            match store.get("nothing", 10).await {
                Err(error) if error.is_not_found() => return,
                other => assert!(Instant::now() < end, "{other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn conforms(name: &str) {
    let server = Server::start(name);
    server.serve().await;
    suite::run(&server.store(|settings| settings.prefix = "suite".into())).await.unwrap();
    errors_are_told_apart(&server).await;
    a_backup_comes_back(&server.store(|_| {})).await;
    assert!(has_files(server.data.path()), "the bucket is a folder of this test");
}

fn has_files(folder: &Path) -> bool {
    std::fs::read_dir(folder.join("data/bucket/some/prefix")).is_ok_and(|mut entries| entries.next().is_some())
}

/// What controllers act upon: wrong key, missing bucket, no server.
async fn errors_are_told_apart(server: &Server) {
    let class = async |store: Arc<dyn Store>| {
        let secret = Secret::key_file([1; 32]);
        Repository::init(store, &secret, InitOptions::default()).await.unwrap_err().class()
    };
    assert_eq!(class(server.store(|s| s.secret_key = Some("wrong".into()))).await, ErrorClass::Permission);
    assert_eq!(class(server.store(|s| s.access_key = Some("nobody".into()))).await, ErrorClass::Permission);
    assert_eq!(class(server.store(|s| s.bucket = "no-such-bucket".into())).await, ErrorClass::NotFound);
}

async fn a_backup_comes_back(store: &Arc<dyn Store>) {
    let secret = Secret::passphrase("on a real server".into());
    let repository = Repository::init(Arc::clone(store), &secret, InitOptions::default()).await.unwrap();
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let large: Vec<u8> = (0..20_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    std::fs::write(source.path().join("large"), &large).unwrap();
    for number in 0..200 {
        std::fs::write(source.path().join(format!("small{number}")), format!("file {number}")).unwrap();
    }
    let plan = TreeBackup { lineage: "l".into(), ..TreeBackup::default() };
    let report = backup::tree(&repository, source.path(), plan, Arc::default()).await.unwrap();
    let reopened = Repository::open(Arc::clone(store), &secret, OpenOptions::default()).await.unwrap();
    let snapshot = reopened.find(&report.snapshot.id.to_string()).await.unwrap();
    let restored =
        restore::tree(&reopened, &snapshot, target.path(), RestoreOptions::default(), Arc::default()).await.unwrap();
    assert_eq!(restored.failed, []);
    assert_eq!(std::fs::read(target.path().join("large")).unwrap(), large);
    assert_eq!(std::fs::read_to_string(target.path().join("small199")).unwrap(), "file 199");
    let checked = reopened.check(CheckOptions::all_data(), Arc::default()).await.unwrap();
    assert!(checked.problems.is_empty(), "{:?}", checked.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn versitygw_conforms() {
    conforms("versitygw").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn minio_conforms() {
    conforms("minio").await;
}
