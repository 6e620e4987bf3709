//! Who lists the blocks of a volume: the driver's `SnapshotMetadataService`, if the cluster has one.

use anyhow::{Context as _, Result};
use k8s_openapi::ByteString;
use kube::Api;
use kube::api::{ApiResource, DynamicObject};
use kube::error::DiscoveryError;
use lifeboat_crds::backup::VolumeBackupStatus;
use lifeboat_crds::volume_task::{BlockLists, ImageSource};
use serde_json::Value;

use super::{Run, expose};
use crate::context::Context;
use crate::storage::text;

const GROUP: &str = "cbt.storage.k8s.io";
const KIND: &str = "SnapshotMetadataService";
/// Unless a rule says otherwise.
const AUDIT_EVERY: u32 = 10;

/// What an agent needs to know of a block volume besides its device; `None` of a file system.
pub(super) async fn source(run: &Run, context: &Context, volume: &VolumeBackupStatus) -> Result<Option<ImageSource>> {
    let Some(cut) = volume.cut.as_ref().filter(|_| volume.block) else { return Ok(None) };
    let (lists, no_lists) = match service(context, &cut.driver).await? {
        Ok(service) => (Some(BlockLists { snapshot: expose::name(run, volume), ..service }), None),
        Err(why) => (None, Some(why)),
    };
    Ok(Some(ImageSource {
        driver: cut.driver.clone(),
        volume_handle: cut.volume_handle.clone(),
        snapshot_handle: cut.handle.clone().context("the volume has no snapshot")?,
        audit_every: cut.audit_every.unwrap_or(AUDIT_EVERY).max(1),
        lists,
        no_lists,
    }))
}

/// The service of a driver, or why there is none. It has the driver's name.
async fn service(context: &Context, driver: &str) -> Result<Result<BlockLists, String>> {
    let lacking = || format!("the driver {driver} has no {KIND}");
    let Some(resource) = resource(context).await? else { return Ok(Err(lacking())) };
    let api: Api<DynamicObject> = Api::all_with(context.client.clone(), &resource);
    let Some(found) = api.get_opt(driver).await.context("cannot read a SnapshotMetadataService")? else {
        return Ok(Err(lacking()));
    };
    Ok(parse(&found.data).map_err(|what| format!("the {KIND} of the driver {driver} {what}")))
}

async fn resource(context: &Context) -> Result<Option<ApiResource>> {
    match kube::discovery::group(&context.client, GROUP).await {
        Ok(group) => Ok(group.recommended_kind(KIND).map(|(resource, _)| resource)),
        Err(kube::Error::Discovery(DiscoveryError::MissingApiGroup(_))) => Ok(None),
        Err(error) => Err(error).context("cannot ask for the kinds of lists of blocks"),
    }
}

fn parse(data: &Value) -> Result<BlockLists, &'static str> {
    let (address, audience) = (text(data, "/spec/address"), text(data, "/spec/audience"));
    if address.is_empty() || audience.is_empty() {
        return Err("names no address and audience");
    }
    let certificate: Option<ByteString> =
        data.pointer("/spec/caCert").and_then(|value| serde_json::from_value(value.clone()).ok());
    let certificate = certificate.and_then(|bytes| String::from_utf8(bytes.0).ok()).filter(|text| !text.is_empty());
    Ok(BlockLists {
        address: address.to_owned(),
        audience: audience.to_owned(),
        ca_certificate: certificate.ok_or("has no certificate that is PEM")?,
        snapshot: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_service_has_an_address_an_audience_and_a_certificate() {
        let whole = json!({"spec": {"address": "host:50051", "audience": "a", "caCert": "cGVt"}});
        let found = parse(&whole).unwrap();
        assert_eq!((found.address.as_str(), found.ca_certificate.as_str()), ("host:50051", "pem"));
        for missing in ["address", "audience", "caCert"] {
            let mut part = whole.clone();
            part["spec"].as_object_mut().unwrap().remove(missing);
            assert!(parse(&part).is_err(), "{missing}");
        }
        let mut strange = whole;
        strange["spec"]["caCert"] = json!("%%%");
        assert!(parse(&strange).is_err());
    }
}
