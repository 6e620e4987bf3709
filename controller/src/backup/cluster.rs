//! Captures the cluster-scoped objects that belong to a namespace's application.
//!
//! With Lifeboat's own rights only what is related to the application; all else that a scope asks for with the rights of the
//! `ServiceAccount` that it names.

use std::collections::BTreeMap;

use kube::api::DynamicObject;
use kube::{Api, Client, ResourceExt};
use lifeboat_crds::plan::ClusterScope;
use lifeboat_repository::backup::VirtualFile;
use serde_json::Value;

use super::capture::{Offered, each_object, file, with_types};
use crate::object::{ResourceName, captured_form};
use crate::recovery_point::CLUSTER_FOLDER;
use crate::related::{Related, is_built_in};
use crate::scope;

/// Gathers files by their place, so that what is found in two ways is captured once.
pub(super) struct Gathering<'a> {
    client: &'a Client,
    /// With the rights of the account that the scope names.
    reader: Option<&'a Client>,
    offered: &'a [Offered],
    scope: ClusterScope,
    files: BTreeMap<(String, String), VirtualFile>,
    /// What could not be read, with the reason.
    errors: Vec<String>,
}

/// Resources whose objects name the application, not the other way round.
const BINDINGS: (&str, &str) = ("clusterrolebindings", "rbac.authorization.k8s.io");
const EXTENSIONS: &[(&str, &str)] = &[
    ("validatingwebhookconfigurations", "admissionregistration.k8s.io"),
    ("mutatingwebhookconfigurations", "admissionregistration.k8s.io"),
    ("apiservices", "apiregistration.k8s.io"),
];

impl<'a> Gathering<'a> {
    pub(super) fn new(
        client: &'a Client,
        reader: Option<&'a Client>,
        offered: &'a [Offered],
        scope: ClusterScope,
    ) -> Self {
        Self { client, reader, offered, scope, files: BTreeMap::new(), errors: Vec::new() }
    }

    /// The files in the order of their paths, and what could not be read.
    pub(super) async fn gather(mut self, related: Related) -> (Vec<VirtualFile>, Vec<String>) {
        if self.scope.related {
            self.related(related).await;
        }
        self.included().await;
        (self.files.into_values().collect(), self.errors)
    }

    fn find(&self, plural: &str, group: &str) -> Option<&'a Offered> {
        self.offered.iter().find(|one| one.cluster && one.name.plural == plural && one.name.group == group)
    }

    fn failed(&mut self, resource: &ResourceName, error: &kube::Error) {
        self.errors.push(format!("{}: {error}", resource.qualified()));
    }

    fn keep(&mut self, offered: &Offered, object: Value) {
        let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if is_built_in(&offered.name, &object) || scope::excludes(&self.scope, &offered.name, &name) {
            return;
        }
        match file(Some(CLUSTER_FOLDER), offered, &name, &captured_form(object)) {
            Ok(file) => drop(self.files.insert((offered.name.folder(), name), file)),
            Err(error) => self.failed(&offered.name, &error),
        }
    }

    async fn related(&mut self, mut related: Related) {
        if let Some(offered) = self.find(BINDINGS.0, BINDINGS.1) {
            for binding in self.list(offered).await {
                if let Some(own) = related.own_part(binding) {
                    related.note_role(&own);
                    self.keep(offered, own);
                }
            }
        }
        for (plural, group) in EXTENSIONS {
            let Some(offered) = self.find(plural, group) else { continue };
            for extension in self.list(offered).await {
                if related.answers(&extension) {
                    self.keep(offered, extension);
                }
            }
        }
        for (resource, name) in related.named() {
            let Some(offered) = self.find(&resource.plural, &resource.group) else { continue };
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &offered.api);
            match api.get_opt(name).await.and_then(|found| found.map(|object| with_types(object, offered)).transpose())
            {
                Ok(Some(object)) if related.may_be_captured(resource, &object) => self.keep(offered, object),
                // What an object names need not exist: a volume's class may be gone, a kind may be built in.
                Ok(_) => {}
                Err(error) => self.failed(resource, &error),
            }
        }
    }

    async fn list(&mut self, offered: &Offered) -> Vec<Value> {
        let api = Api::all_with(self.client.clone(), &offered.api);
        let mut all = Vec::new();
        let listed = each_object(&api, |object: DynamicObject| {
            all.push(with_types(object, offered)?);
            Ok(())
        })
        .await;
        if let Err(error) = listed {
            self.failed(&offered.name, &error);
        }
        all
    }

    async fn included(&mut self) {
        let Some(reader) = self.reader else { return };
        let all = self.offered;
        for offered in all.iter().filter(|one| one.cluster) {
            if !scope::may_include(&self.scope, &offered.name) {
                continue;
            }
            let api = Api::all_with(reader.clone(), &offered.api);
            let mut found = Vec::new();
            let listed = each_object(&api, |object: DynamicObject| {
                if scope::includes(&self.scope, &offered.name, &object.name_any(), object.labels()) {
                    found.push(with_types(object, offered)?);
                }
                Ok(())
            })
            .await;
            for object in found {
                self.keep(offered, object);
            }
            if let Err(error) = listed {
                self.failed(&offered.name, &error);
            }
        }
    }
}
