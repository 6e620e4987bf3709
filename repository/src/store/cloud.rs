//! S3 and whatever speaks like it.
//!
//! Conditional puts by `If-None-Match: *`; path-style addresses at custom endpoints; one attempt per call
//! (retries are the `retry` decorator's).

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::{BackoffConfig, Certificate, ClientOptions, RetryConfig};

use super::Store;
use super::location::{LocationError, S3Settings};
use super::object::ObjectBacked;

/// Long enough for a pack over a slow line.
const REQUEST_TIMEOUT: Duration = Duration::from_mins(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes the client. Nothing is contacted yet.
///
/// Credentials that the settings lack come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
/// `AWS_SESSION_TOKEN`, web identity and container credentials).
pub fn s3(settings: &S3Settings) -> Result<Arc<dyn Store>, LocationError> {
    let plain_http = settings.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let mut client = ClientOptions::new()
        .with_timeout(REQUEST_TIMEOUT)
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_allow_http(plain_http);
    if let Some(pem) = &settings.ca_bundle_pem {
        let bundle = Certificate::from_pem_bundle(pem.as_bytes());
        let bundle = bundle.map_err(|source| LocationError::ReadCaBundle { source: Box::new(source) })?;
        client = bundle.into_iter().fold(client, ClientOptions::with_root_certificate);
    }
    let once = RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: REQUEST_TIMEOUT };
    let path_style = settings.path_style.unwrap_or(settings.endpoint.is_some());
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(&settings.bucket)
        .with_region(settings.region.as_deref().unwrap_or("us-east-1"))
        .with_virtual_hosted_style_request(!path_style)
        .with_allow_http(plain_http)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_client_options(client)
        .with_retry(once);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
    }
    if let (Some(access), Some(secret)) = (&settings.access_key, &settings.secret_key) {
        builder = builder.with_access_key_id(access).with_secret_access_key(secret);
    }
    if let Some(token) = &settings.session_token {
        builder = builder.with_token(token);
    }
    let store = builder.build().map_err(|source| LocationError::ConfigureS3 { source: Box::new(source) })?;
    Ok(Arc::new(ObjectBacked::new(Arc::new(store), settings.describe(), &settings.prefix)))
}
