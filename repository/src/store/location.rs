//! Where a repository lies, as people write it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use super::retry::{Retry, RetryPolicy};
use super::{Store, cloud, local};
use crate::error::{Classified, ErrorClass};

/// Where a repository lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A directory.
    Local(PathBuf),
    /// A folder in a bucket.
    S3(S3Settings),
}

/// A folder in a bucket, and how to reach it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct S3Settings {
    /// The bucket.
    pub bucket: String,
    /// Folder in the bucket; may be empty.
    pub prefix: String,
    /// URL of the server; AWS when absent. `http://` allows plain HTTP.
    pub endpoint: Option<String>,
    /// Region; `us-east-1` when absent.
    pub region: Option<String>,
    /// Access key; from the environment when absent.
    pub access_key: Option<String>,
    /// Secret key; from the environment when absent.
    pub secret_key: Option<String>,
    /// Session token of temporary credentials.
    pub session_token: Option<String>,
    /// Certificates to trust besides the system's, in PEM form.
    pub ca_bundle_pem: Option<String>,
    /// Whether the bucket stands in the path of the URL; when absent: at custom endpoints, yes.
    pub path_style: Option<bool>,
}

impl S3Settings {
    /// The location without secrets.
    pub fn describe(&self) -> String {
        let mut text = format!("s3://{}", self.bucket);
        if !self.prefix.is_empty() {
            text = format!("{text}/{}", self.prefix);
        }
        match &self.endpoint {
            Some(endpoint) => format!("{text} at {endpoint}"),
            None => text,
        }
    }
}

impl fmt::Debug for S3Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Settings({})", self.describe())
    }
}

/// A location that cannot be used.
#[derive(Debug, Error)]
pub enum LocationError {
    /// Nothing was given.
    #[error("no repository location was given; write /a/path or s3://bucket/folder?endpoint=https://host")]
    Empty,
    /// A scheme that is not supported.
    #[error("the scheme {scheme:?} is not supported; write /a/path, file:///a/path or s3://bucket/folder")]
    UnknownScheme {
        /// The scheme.
        scheme: String,
    },
    /// An S3 location without a bucket.
    #[error("the location names no bucket; write s3://bucket/folder")]
    NoBucket,
    /// A parameter that is not known.
    #[error("the parameter {name:?} is not known; known are endpoint, region and path-style")]
    UnknownParameter {
        /// The parameter.
        name: String,
    },
    /// A value that a parameter does not take.
    #[error("the parameter {name:?} cannot be {value:?}; {expected}")]
    BadValue {
        /// The parameter.
        name: &'static str,
        /// The value.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// A certificate bundle that cannot be read.
    #[error("cannot read the certificates of the CA bundle")]
    ReadCaBundle {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Settings that S3 does not take.
    #[error("cannot configure the S3 client")]
    ConfigureS3 {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Classified for LocationError {
    fn class(&self) -> ErrorClass {
        ErrorClass::Invalid
    }
}

impl Location {
    /// Reads `s3://bucket/folder?endpoint=http://…&region=…&path-style=true`, `/path` or `file:///path`.
    pub fn parse(text: &str) -> Result<Self, LocationError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(LocationError::Empty);
        }
        match text.split_once("://") {
            None => Ok(Self::Local(PathBuf::from(text))),
            Some(("file", path)) if path.starts_with('/') => Ok(Self::Local(PathBuf::from(path))),
            Some(("file", path)) => Err(LocationError::BadValue {
                name: "file",
                value: path.to_owned(),
                expected: "an absolute path follows three slashes",
            }),
            Some(("s3", rest)) => parse_s3(rest).map(Self::S3),
            Some((scheme, _)) => Err(LocationError::UnknownScheme { scheme: scheme.to_owned() }),
        }
    }
}

fn parse_s3(rest: &str) -> Result<S3Settings, LocationError> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    if bucket.is_empty() {
        return Err(LocationError::NoBucket);
    }
    let mut settings =
        S3Settings { bucket: bucket.to_owned(), prefix: prefix.trim_matches('/').to_owned(), ..S3Settings::default() };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = percent_decoded(value);
        match name {
            "endpoint" if value.starts_with("http://") || value.starts_with("https://") => {
                settings.endpoint = Some(value);
            }
            "endpoint" => {
                let expected = "an address that starts with http:// or https:// is needed";
                return Err(LocationError::BadValue { name: "endpoint", value, expected });
            }
            "region" => settings.region = Some(value),
            "path-style" => match value.as_str() {
                "true" => settings.path_style = Some(true),
                "false" => settings.path_style = Some(false),
                _ => return Err(LocationError::BadValue { name: "path-style", value, expected: "true or false" }),
            },
            _ => return Err(LocationError::UnknownParameter { name: name.to_owned() }),
        }
    }
    Ok(settings)
}

/// Decodes `%XX`; anything that is not such a sequence stays as it is.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                at += 3;
            }
            (byte, _) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        Self::parse(text)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::S3(settings) => f.write_str(&settings.describe()),
        }
    }
}

/// The store at a location, with retries. Nothing is contacted or created yet.
pub fn open(location: &Location) -> Result<Arc<dyn Store>, LocationError> {
    let store: Arc<dyn Store> = match location {
        Location::Local(path) => Arc::new(local::Local::new(path)),
        Location::S3(settings) => cloud::s3(settings)?,
    };
    Ok(Arc::new(Retry::new(store, RetryPolicy::default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_read() {
        assert_eq!(Location::parse("/srv/backup").unwrap(), Location::Local("/srv/backup".into()));
        assert_eq!(Location::parse("file:///srv/backup").unwrap(), Location::Local("/srv/backup".into()));
        let text = "s3://bucket/a/b/?endpoint=http%3A%2F%2F127.0.0.1:9000&region=eu&path-style=false";
        let Location::S3(settings) = Location::parse(text).unwrap() else { panic!("not S3") };
        assert_eq!((settings.bucket.as_str(), settings.prefix.as_str()), ("bucket", "a/b"));
        assert_eq!(settings.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        assert_eq!((settings.region.as_deref(), settings.path_style), (Some("eu"), Some(false)));
    }

    #[test]
    fn wrong_locations_say_what_to_write() {
        for (text, says) in [
            ("", "no repository location"),
            ("ftp://host", "\"ftp\" is not supported"),
            ("s3:///folder", "no bucket"),
            ("s3://b?endpoint=host", "http://"),
            ("s3://b?colour=red", "\"colour\" is not known"),
            ("s3://b?path-style=1", "true or false"),
            ("file://relative", "three slashes"),
        ] {
            let message = Location::parse(text).unwrap_err().to_string();
            assert!(message.contains(says), "{text:?}: {message}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let settings = S3Settings { secret_key: Some("hidden".into()), bucket: "b".into(), ..S3Settings::default() };
        assert!(!format!("{settings:?}").contains("hidden"));
    }
}
