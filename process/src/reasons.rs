//! Which condition reason an error of the repository becomes.

use lifeboat_crds::conditions::Reason;
use lifeboat_repository::error::ErrorClass;

/// The reason for an error while a repository is read or written.
pub fn of_class(class: ErrorClass) -> Reason {
    match class {
        ErrorClass::Transient | ErrorClass::Unreachable => Reason::Unreachable,
        ErrorClass::Permission => Reason::AccessDenied,
        ErrorClass::NotFound => Reason::BucketNotFound,
        ErrorClass::Full => Reason::StoreFull,
        ErrorClass::Key => Reason::WrongKey,
        ErrorClass::Damaged => Reason::RepositoryDamaged,
        ErrorClass::Unsupported => Reason::FormatUnsupported,
        ErrorClass::Conflict | ErrorClass::Invalid | ErrorClass::Local => Reason::InternalError,
    }
}

/// What a person can do about it; empty when the error says it itself.
pub fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::Unreachable => "; check endpoint, DNS and network policies (it is tried again)",
        Reason::AccessDenied => "; check the credentials Secret and the rights of that key on the bucket",
        Reason::BucketNotFound => "; create the bucket or correct its name",
        Reason::StoreFull => "; free space in the store or raise its quota",
        Reason::WrongKey => "; put the repository's own password into the encryption Secret",
        Reason::RepositoryDamaged => "; run `lifeboat check --read-data` on the repository",
        _ => "",
    }
}
