//! The CSI snapshot API of a cluster, which may lack it: its kinds, and what its classes offer for a driver.

use anyhow::{Context as _, Result};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::error::DiscoveryError;
use kube::{Api, Client, ResourceExt};
use serde_json::Value;

const SNAPSHOT_GROUP: &str = "snapshot.storage.k8s.io";
const GROUP_SNAPSHOT_GROUP: &str = "groupsnapshot.storage.k8s.io";

/// The kinds of single snapshots. Their version is fixed since 2020.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Snapshot,
    Content,
    Class,
}

impl Kind {
    fn resource(self) -> ApiResource {
        let (kind, plural) = match self {
            Self::Snapshot => ("VolumeSnapshot", "volumesnapshots"),
            Self::Content => ("VolumeSnapshotContent", "volumesnapshotcontents"),
            Self::Class => ("VolumeSnapshotClass", "volumesnapshotclasses"),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(SNAPSHOT_GROUP, "v1", kind), plural)
    }
}

/// `VolumeSnapshot`s of a namespace.
pub(crate) fn snapshots(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &Kind::Snapshot.resource())
}

/// `VolumeSnapshotContent`s.
pub(crate) fn contents(client: &Client) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &Kind::Content.resource())
}

/// An object of one of these kinds, from JSON without kind and version.
pub(crate) fn object(kind: Kind, data: Value) -> Result<DynamicObject> {
    of_resource(&kind.resource(), data)
}

fn of_resource(resource: &ApiResource, mut data: Value) -> Result<DynamicObject> {
    data["apiVersion"] = resource.api_version.clone().into();
    data["kind"] = resource.kind.clone().into();
    serde_json::from_value(data).context("a snapshot object is malformed")
}

/// The kinds of group snapshots, in the version that this cluster prefers.
#[derive(Debug, Clone)]
pub(crate) struct GroupKinds {
    snapshot: ApiResource,
    content: ApiResource,
    class: ApiResource,
}

impl GroupKinds {
    /// `None`: the cluster has no group snapshots.
    pub(crate) async fn discover(client: &Client) -> Result<Option<Self>> {
        let group = match kube::discovery::group(client, GROUP_SNAPSHOT_GROUP).await {
            Ok(group) => group,
            Err(kube::Error::Discovery(DiscoveryError::MissingApiGroup(_))) => return Ok(None),
            Err(error) => return Err(error).context("cannot ask for the kinds of group snapshots"),
        };
        let kind = |name: &str| group.recommended_kind(name).map(|(resource, _)| resource);
        let (Some(snapshot), Some(content), Some(class)) =
            (kind("VolumeGroupSnapshot"), kind("VolumeGroupSnapshotContent"), kind("VolumeGroupSnapshotClass"))
        else {
            return Ok(None);
        };
        Ok(Some(Self { snapshot, content, class }))
    }

    /// `VolumeGroupSnapshot`s of a namespace.
    pub(crate) fn snapshots(&self, client: &Client, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(client.clone(), namespace, &self.snapshot)
    }

    /// `VolumeGroupSnapshotContent`s.
    pub(crate) fn contents(&self, client: &Client) -> Api<DynamicObject> {
        Api::all_with(client.clone(), &self.content)
    }

    /// A `VolumeGroupSnapshot` from JSON without kind and version.
    pub(crate) fn object(&self, data: Value) -> Result<DynamicObject> {
        of_resource(&self.snapshot, data)
    }
}

/// A class of snapshots or of group snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) name: String,
    pub(crate) driver: String,
    pub(crate) is_default: bool,
}

/// What a cluster's storage offers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Storage {
    /// Classes of single snapshots.
    pub(crate) singles: Vec<Class>,
    /// Classes of group snapshots.
    pub(crate) groups: Vec<Class>,
    /// Storage classes: name and driver.
    pub(crate) drivers: Vec<(String, String)>,
}

impl Storage {
    pub(crate) async fn observe(client: &Client) -> Result<Self> {
        let singles =
            classes(&Api::all_with(client.clone(), &Kind::Class.resource()), "snapshot.storage.kubernetes.io").await?;
        let groups = match GroupKinds::discover(client).await? {
            Some(kinds) => {
                classes(&Api::all_with(client.clone(), &kinds.class), "groupsnapshot.storage.kubernetes.io").await?
            }
            None => Vec::new(),
        };
        let drivers = Api::<StorageClass>::all(client.clone())
            .list(&ListParams::default())
            .await
            .context("cannot list storage classes")?;
        let mut drivers: Vec<_> = drivers.into_iter().map(|class| (class.name_any(), class.provisioner)).collect();
        drivers.sort();
        Ok(Self { singles, groups, drivers })
    }
}

/// The class for a driver: the one that is asked for, else the default, else the first by name.
pub(crate) fn class_for<'a>(classes: &'a [Class], driver: &str, wanted: Option<&str>) -> Option<&'a Class> {
    let fitting = || classes.iter().filter(|class| class.driver == driver);
    match wanted {
        Some(name) => fitting().find(|class| class.name == name),
        None => fitting().find(|class| class.is_default).or_else(|| fitting().min_by_key(|class| &class.name)),
    }
}

async fn classes(api: &Api<DynamicObject>, group: &str) -> Result<Vec<Class>> {
    let default = format!("{group}/is-default-class");
    let found = match api.list(&ListParams::default()).await {
        Ok(found) => found.items,
        Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
        Err(error) => return Err(error).context("cannot list snapshot classes"),
    };
    let class = |object: DynamicObject| Class {
        name: object.name_any(),
        driver: text(&object.data, "/driver").to_owned(),
        is_default: object.annotations().get(&default).is_some_and(|value| value == "true"),
    };
    Ok(found.into_iter().map(class).collect())
}

/// A text within an object; empty when it is not there.
pub(crate) fn text<'a>(data: &'a Value, pointer: &str) -> &'a str {
    data.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Whether volumes can be made of a snapshot.
pub(crate) fn is_ready(snapshot: &DynamicObject) -> bool {
    snapshot.data.pointer("/status/readyToUse") == Some(&Value::Bool(true))
}

/// What a snapshot object's status says about an error.
pub(crate) fn error_of(object: &DynamicObject) -> Option<&str> {
    object.data.pointer("/status/error/message").and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(name: &str, driver: &str, is_default: bool) -> Class {
        Class { name: name.into(), driver: driver.into(), is_default }
    }

    #[test]
    fn the_wanted_class_then_the_default_then_the_first() {
        let all = [class("b", "d", false), class("a", "d", false), class("z", "other", true)];
        let chosen = |classes: &[Class], wanted| class_for(classes, "d", wanted).map(|class| class.name.clone());
        assert_eq!(chosen(&all, None).as_deref(), Some("a"));
        assert_eq!(chosen(&all, Some("b")).as_deref(), Some("b"));
        assert_eq!(chosen(&all, Some("z")), None, "a class of another driver");
        assert_eq!(chosen(&[class("a", "d", false), class("b", "d", true)], None).as_deref(), Some("b"));
        assert_eq!(chosen(&[], None), None);
    }
}
