//! Acts with the rights of a `ServiceAccount` instead of Lifeboat's own.
//!
//! What lies outside of a tenant's namespace is read and created only like this, so that nobody can have Lifeboat do what the
//! account of their namespace may not do. Whether Lifeboat may act as an account is up to the installation.

use anyhow::{Context as _, Result};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use lifeboat_crds::conditions::Reason;

use crate::backup::refusal::Refusal;
use crate::context::Context;

impl Context {
    /// A client that has the rights of a `ServiceAccount`; `Err`: the installation does not allow it.
    pub(crate) async fn acting_as(&self, namespace: &str, account: &str) -> Result<Result<Client, Refusal>> {
        let wanted = ResourceAttributes {
            verb: Some("impersonate".to_owned()),
            resource: Some("serviceaccounts".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(account.to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(wanted), non_resource_attributes: None };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let reviewed = Api::<SelfSubjectAccessReview>::all(self.client.clone())
            .create(&PostParams::default(), &review)
            .await
            .context("cannot ask whether an account may be used")?;
        if !reviewed.status.is_some_and(|status| status.allowed) {
            let message = format!(
                "this installation does not let Lifeboat act as a ServiceAccount `{account}`; its owner can allow it by the chart's value clusterResources.serviceAccounts"
            );
            return Ok(Err(Refusal::new(Reason::ClusterResourcesNotAllowed, message)));
        }
        let mut config = self.config.clone();
        config.auth_info.impersonate = Some(format!("system:serviceaccount:{namespace}:{account}"));
        Ok(Ok(Client::try_from(config).context("cannot speak to the API server as a ServiceAccount")?))
    }
}
