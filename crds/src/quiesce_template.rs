//! `QuiesceTemplate`: how a kind of application is brought to rest, written once for many policies.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::DurationString;
use crate::quiesce_lease::{CommandPair, HoldCommand};

/// How a kind of application is brought to rest. In commands, `$(name)` stands for a parameter's value.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lifeboat.dev",
    version = "v1alpha1",
    kind = "QuiesceTemplate",
    shortname = "qtpl",
    category = "lifeboat",
    derive = "PartialEq",
    doc = "How a kind of application is brought to rest.",
    printcolumn(name = "Tested", type_ = "boolean", json_path = ".spec.tested"),
    printcolumn(name = "Description", type_ = "string", json_path = ".spec.description"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.hold), has(self.exec), has(self.fsfreeze)].exists_one(it, it)")
    .message("write exactly one of hold, exec and fsfreeze"))]
pub struct QuiesceTemplateSpec {
    /// What it does, in a sentence.
    #[serde(default)]
    #[schemars(length(max = 512))]
    pub description: String,
    /// Whether it was tried with the real application.
    #[serde(default)]
    pub tested: bool,
    /// What a policy may or must give.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub parameters: Vec<TemplateParameter>,
    /// A command that holds the application at rest as long as it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldCommand>,
    /// A command that brings it to rest and one that lets go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<CommandPair>,
    /// Freeze the file systems of all claims that the pod has mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fsfreeze: Option<AllVolumes>,
    /// The longest time that bringing it to rest may take. Default: `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationString>,
}

/// All claims that the pod has mounted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AllVolumes {}

/// A parameter of a template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateParameter {
    /// How commands and policies name it.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[A-Za-z][A-Za-z0-9]*$"))]
    pub name: String,
    /// What it means.
    #[serde(default)]
    #[schemars(length(max = 512))]
    pub description: String,
    /// Its value when a policy gives none. Without a default a policy must give one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub default: Option<String>,
}

/// Why a template and the parameters of a policy do not go together; a sentence for a condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template does not know the parameter.
    #[error("it has no parameter `{0}`; it has: {1}")]
    Unknown(String, String),
    /// There is neither a value nor a default.
    #[error("it needs a value for the parameter `{0}`")]
    Missing(String),
    /// A command uses what is no parameter.
    #[error("its command uses `$({0})`, which is none of its parameters")]
    Undeclared(String),
}

impl QuiesceTemplateSpec {
    /// The value of every parameter.
    pub fn values(&self, given: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, TemplateError> {
        let names: Vec<_> = self.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        if let Some(unknown) = given.keys().find(|name| !names.contains(&name.as_str())) {
            return Err(TemplateError::Unknown(unknown.clone(), names.join(", ")));
        }
        let value = |parameter: &TemplateParameter| {
            let found = given.get(&parameter.name).or(parameter.default.as_ref());
            let found = found.cloned().ok_or_else(|| TemplateError::Missing(parameter.name.clone()))?;
            Ok((parameter.name.clone(), found))
        };
        self.parameters.iter().map(value).collect()
    }
}

/// Puts values in the places of `$(name)`; `$$(name)` is left as `$(name)`, for shells.
pub fn fill(words: &[String], values: &BTreeMap<String, String>) -> Result<Vec<String>, TemplateError> {
    words.iter().map(|word| fill_word(word, values)).collect()
}

fn fill_word(word: &str, values: &BTreeMap<String, String>) -> Result<String, TemplateError> {
    let mut filled = String::new();
    let mut rest = word;
    while let Some(at) = rest.find("$(") {
        if rest[..at].ends_with('$') {
            filled.push_str(&rest[..at - 1]);
            filled.push_str("$(");
            rest = &rest[at + 2..];
            continue;
        }
        filled.push_str(&rest[..at]);
        let Some((name, after)) = rest[at + 2..].split_once(')') else {
            return Err(TemplateError::Undeclared(rest[at + 2..].to_owned()));
        };
        filled.push_str(values.get(name).ok_or_else(|| TemplateError::Undeclared(name.to_owned()))?);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template() -> QuiesceTemplateSpec {
        serde_json::from_value(serde_json::json!({
            "parameters": [{"name": "user", "default": "root"}, {"name": "database"}], "hold": {"command": ["x"]}
        }))
        .unwrap()
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn parameters_have_values_or_a_sentence_says_which_has_none() {
        let values = template().values(&map(&[("database", "shop")])).unwrap();
        assert_eq!(values, map(&[("user", "root"), ("database", "shop")]));
        assert_eq!(template().values(&map(&[])), Err(TemplateError::Missing("database".into())));
        assert!(template().values(&map(&[("databse", "x")])).unwrap_err().to_string().contains("user, database"));
    }

    #[test]
    fn values_are_put_where_their_names_stand_and_nowhere_else() {
        let values = map(&[("user", "a $(b)")]);
        let fill = |word: &str| fill(&[word.to_owned()], &values).map(|words| words[0].clone());
        assert_eq!(fill("--user=$(user);$(user)").unwrap(), "--user=a $(b);a $(b)");
        assert_eq!(fill("$$(date) $HOME").unwrap(), "$(date) $HOME");
        assert_eq!(fill("$(nobody)"), Err(TemplateError::Undeclared("nobody".into())));
        assert_eq!(fill("$(open"), Err(TemplateError::Undeclared("open".into())));
    }
}
