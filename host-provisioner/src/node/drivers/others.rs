//! Modules that the cluster's kernel-module operator (KMM) loads: those are left to it.

use std::collections::BTreeMap;

use common::kube::is_gone;
use kube::api::{DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;

use crate::kernel::modules::ModuleName;

/// One `Module` of the operator (kubernetes-sigs/kernel-module-management,
/// api/v1beta1/module_types.go).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Theirs {
    /// `NAMESPACE/NAME`.
    pub name: String,
    pub module: ModuleName,
    /// Labels of its nodes.
    pub selector: BTreeMap<String, String>,
}

/// The operator's kind.
#[must_use]
pub fn kind() -> ApiResource {
    let kind = GroupVersionKind::gvk("kmm.sigs.x-k8s.io", "v1beta1", "Module");
    ApiResource::from_gvk_with_plural(&kind, "modules")
}

/// All of the operator's modules; none where there is no operator.
///
/// # Errors
/// The API server's: what could not be read is not taken for none.
pub async fn list(client: &Client) -> Result<Vec<Theirs>, kube::Error> {
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &kind());
    match api.list(&ListParams::default()).await {
        Ok(all) => Ok(all.items.iter().filter_map(read).collect()),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// One that is loaded by arguments of its own has no name here and is nobody's rival.
fn read(object: &DynamicObject) -> Option<Theirs> {
    let spec = object.data.get("spec")?;
    let name = spec.pointer("/moduleLoader/container/modprobe/moduleName")?;
    let selector = spec.get("selector").and_then(Value::as_object);
    let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
    let namespace = object.namespace().unwrap_or_default();
    Some(Theirs {
        name: format!("{namespace}/{}", object.name_any()),
        module: ModuleName::new(name.as_str()?),
        selector: selector.into_iter().flatten().filter_map(text).collect(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn module(spec: Value) -> DynamicObject {
        let mut object = DynamicObject::new("card", &kind()).within("kmm");
        object.data = json!({ "spec": spec });
        object
    }

    #[test]
    fn a_module_is_read_by_its_name_and_nodes() {
        let loader = json!({"container": {"modprobe": {"moduleName": "mlx5-core"}}});
        let read = read(&module(
            json!({"moduleLoader": loader, "selector": {"zone": "a"}}),
        ));
        let read = read.unwrap();
        assert_eq!(
            (read.name.as_str(), read.module.as_str()),
            ("kmm/card", "mlx5_core")
        );
        assert_eq!(read.selector["zone"], "a");
    }

    #[test]
    fn what_names_no_module_is_passed_over() {
        for spec in [
            json!(null),
            json!({}),
            json!({"moduleLoader": {"container": {"modprobe": {"rawArgs": {"load": ["x"]}}}}}),
            json!({"moduleLoader": {"container": {"modprobe": {"moduleName": 7}}}}),
        ] {
            assert_eq!(read(&module(spec)), None);
        }
    }
}
