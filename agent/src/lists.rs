//! What a driver says about the blocks of a snapshot: the client of the CSI `SnapshotMetadata` service.
//!
//! The service is asked as a user of the cluster would: over TLS that its own `SnapshotMetadataService` vouches for, with a
//! token of this agent's account that is good for this service alone. A list that is broken, too long or of another volume is
//! an error, and the caller reads more instead.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;
use lifeboat_crds::volume_task::BlockLists;
use lifeboat_repository::backup::image::{Extents, ExtentsError};
use thiserror::Error;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status, Streaming};

/// The shortest life that the API server gives a token.
const TOKEN_SECONDS: i64 = 600;
/// A list comes within this time.
const LIST_LIMIT: Duration = Duration::from_mins(5);
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// A sidecar may be restarting.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);
/// Ranges that one message may have.
const MAX_RESULTS: i32 = 4096;
const MAX_MESSAGE: usize = 4 << 20;

/// A list that cannot be used.
#[derive(Debug, Error)]
pub(crate) enum ListError {
    #[error("no token for the service: {0}")]
    Token(String),
    #[error("the service cannot be reached: {0}")]
    Connect(String),
    #[error("the service answers {code:?}: {message}")]
    Refused { code: Code, message: String },
    #[error("the list did not come within {LIST_LIMIT:?}")]
    TooSlow,
    #[error("the list is of a volume of {listed} bytes, the device has {size}")]
    OtherSize { listed: i64, size: u64 },
    #[error("the list is empty of any answer")]
    NoAnswer,
    #[error(transparent)]
    Range(#[from] ExtentsError),
}

impl ListError {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Refused { code: Code::Unavailable, .. })
    }
}

impl From<Status> for ListError {
    fn from(status: Status) -> Self {
        let message = status.message().chars().filter(|c| !c.is_control()).take(200).collect();
        Self::Refused { code: status.code(), message }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct AllocatedRequest {
    #[prost(string, tag = "1")]
    security_token: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    snapshot_name: String,
    #[prost(int64, tag = "4")]
    starting_offset: i64,
    #[prost(int32, tag = "5")]
    max_results: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DeltaRequest {
    #[prost(string, tag = "1")]
    security_token: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    base_snapshot_id: String,
    #[prost(string, tag = "4")]
    target_snapshot_name: String,
    #[prost(int64, tag = "5")]
    starting_offset: i64,
    #[prost(int32, tag = "6")]
    max_results: i32,
}

/// The reply of both calls. Ranges have an offset and a length, whether their lengths are all the same or not.
#[derive(Clone, PartialEq, prost::Message)]
struct Reply {
    #[prost(int64, tag = "2")]
    volume_capacity_bytes: i64,
    #[prost(message, repeated, tag = "3")]
    block_metadata: Vec<Range>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Range {
    #[prost(int64, tag = "1")]
    byte_offset: i64,
    #[prost(int64, tag = "2")]
    size_bytes: i64,
}

/// Asks for lists, with tokens of one account.
#[derive(Clone)]
pub(crate) struct Lister {
    pub(crate) accounts: Api<ServiceAccount>,
    /// The account that the agent runs as.
    pub(crate) account: String,
    /// The namespace of the snapshots that are asked about.
    pub(crate) namespace: String,
}

impl Lister {
    /// What is allocated in the snapshot, of a device of this size.
    pub(crate) async fn allocated(&self, lists: &BlockLists, size: u64) -> Result<Extents, ListError> {
        let request = |security_token| AllocatedRequest {
            security_token,
            namespace: self.namespace.clone(),
            snapshot_name: lists.snapshot.clone(),
            starting_offset: 0,
            max_results: MAX_RESULTS,
        };
        self.list("/snapshotmetadata.SnapshotMetadata/GetMetadataAllocated", lists, size, request).await
    }

    /// What changed since the snapshot of this handle.
    pub(crate) async fn delta(&self, lists: &BlockLists, base: &str, size: u64) -> Result<Extents, ListError> {
        let request = |security_token| DeltaRequest {
            security_token,
            namespace: self.namespace.clone(),
            base_snapshot_id: base.to_owned(),
            target_snapshot_name: lists.snapshot.clone(),
            starting_offset: 0,
            max_results: MAX_RESULTS,
        };
        self.list("/snapshotmetadata.SnapshotMetadata/GetMetadataDelta", lists, size, request).await
    }

    async fn list<Q>(
        &self,
        path: &'static str,
        lists: &BlockLists,
        size: u64,
        request: impl Fn(String) -> Q,
    ) -> Result<Extents, ListError>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
    {
        let mut attempt = 1;
        loop {
            let asked = async {
                let token = self.token(&lists.audience).await?;
                let stream = call(path, lists, request(token)).await?;
                gather(stream, size).await
            };
            match tokio::time::timeout(LIST_LIMIT, asked).await.unwrap_or(Err(ListError::TooSlow)) {
                Err(error) if error.may_pass() && attempt < ATTEMPTS => {
                    tracing::info!(%error, path, "the list of blocks is asked for again");
                    tokio::time::sleep(PAUSE * attempt).await;
                    attempt += 1;
                }
                ended => return ended,
            }
        }
    }

    async fn token(&self, audience: &str) -> Result<String, ListError> {
        let spec = TokenRequestSpec {
            audiences: vec![audience.to_owned()],
            expiration_seconds: Some(TOKEN_SECONDS),
            bound_object_ref: None,
        };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let made = self.accounts.create_token_request(&self.account, &PostParams::default(), &request).await;
        let status = made.map_err(|error| ListError::Token(error.to_string()))?.status;
        status.map(|status| status.token).ok_or_else(|| ListError::Token("the API server gave none".to_owned()))
    }
}

async fn call<Q>(path: &'static str, lists: &BlockLists, request: Q) -> Result<Streaming<Reply>, ListError>
where
    Q: prost::Message + Default + Send + Sync + 'static,
{
    let unreachable = |error: tonic::transport::Error| ListError::Connect(lifeboat_process::telemetry::chain(&error));
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&lists.ca_certificate));
    let endpoint = Endpoint::from_shared(format!("https://{}", lists.address)).map_err(unreachable)?;
    let endpoint = endpoint.connect_timeout(CONNECT_LIMIT).tls_config(tls).map_err(unreachable)?;
    let channel: Channel = endpoint.connect().await.map_err(unreachable)?;
    let mut client = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE);
    client.ready().await.map_err(unreachable)?;
    let codec = tonic_prost::ProstCodec::<Q, Reply>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    Ok(client.server_streaming(Request::new(request), path, codec).await?.into_inner())
}

async fn gather(mut stream: Streaming<Reply>, size: u64) -> Result<Extents, ListError> {
    let mut list = Extents::new(size);
    let mut has_answer = false;
    while let Some(reply) = stream.message().await? {
        has_answer = true;
        take(&mut list, &reply)?;
    }
    if has_answer { Ok(list) } else { Err(ListError::NoAnswer) }
}

fn take(list: &mut Extents, reply: &Reply) -> Result<(), ListError> {
    let listed = reply.volume_capacity_bytes;
    if u64::try_from(listed) != Ok(list.size()) {
        return Err(ListError::OtherSize { listed, size: list.size() });
    }
    for range in &reply.block_metadata {
        list.add(range.byte_offset, range.size_bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn messages_are_as_the_interface_numbers_them() {
        let request = DeltaRequest {
            security_token: "t".into(),
            namespace: "n".into(),
            base_snapshot_id: "b".into(),
            target_snapshot_name: "s".into(),
            starting_offset: 0,
            max_results: 1,
        };
        assert_eq!(request.encode_to_vec(), [10, 1, b't', 18, 1, b'n', 26, 1, b'b', 34, 1, b's', 48, 1]);
        // The type of the ranges, 1, is passed over.
        let reply = Reply::decode(&[8, 2, 16, 100, 26, 4, 8, 10, 16, 20][..]).unwrap();
        assert_eq!(reply.volume_capacity_bytes, 100);
        assert_eq!(reply.block_metadata, [Range { byte_offset: 10, size_bytes: 20 }]);
    }

    #[test]
    fn a_list_of_another_volume_or_with_ranges_outside_is_refused() {
        let reply = |volume_capacity_bytes, byte_offset, size_bytes| Reply {
            volume_capacity_bytes,
            block_metadata: vec![Range { byte_offset, size_bytes }],
        };
        let mut list = Extents::new(1 << 20);
        take(&mut list, &reply(1 << 20, 0, 4096)).unwrap();
        assert_eq!(list.bytes(), 8192, "whole pages");
        assert!(matches!(take(&mut list, &reply(1 << 21, 0, 4096)), Err(ListError::OtherSize { .. })));
        assert!(matches!(take(&mut list, &reply(1 << 20, 1 << 20, 4096)), Err(ListError::Range(_))));
        assert!(matches!(take(&mut list, &reply(1 << 20, -1, 4096)), Err(ListError::Range(_))));
    }
}
