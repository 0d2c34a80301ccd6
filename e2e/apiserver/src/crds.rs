//! Installing CRDs.

use std::path::Path;
use std::time::{Duration, Instant};

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::{ESTABLISHED, Error, io};

/// Applies every CRD in the YAML files of `dir` and waits until each is established.
pub(crate) async fn install(client: &Client, dir: &Path) -> Result<(), Error> {
    let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let resource = ApiResource::from_gvk(&kind);
    let crds: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let found = read_crds(dir)?;
    if found.is_empty() {
        return Err(Error::Yaml {
            path: dir.to_owned(),
            why: "no CRD found".into(),
        });
    }
    for (name, crd) in &found {
        let params = PatchParams::apply("test-apiserver").force();
        crds.patch(name, &params, &Patch::Apply(crd))
            .await
            .map_err(|e| Error::Api {
                what: format!("applying CRD {name}"),
                source: Box::new(e),
            })?;
    }
    for (name, _) in &found {
        established(&crds, name).await?;
    }
    Ok(())
}

async fn established(crds: &Api<DynamicObject>, name: &str) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        let crd = crds.get(name).await.map_err(|e| Error::Api {
            what: format!("reading CRD {name}"),
            source: Box::new(e),
        })?;
        let conditions = crd
            .data
            .pointer("/status/conditions")
            .cloned()
            .unwrap_or(Value::Null);
        let yes = conditions.as_array().is_some_and(|all| {
            all.iter().any(|c| {
                c.get("type") == Some(&json!("Established"))
                    && c.get("status") == Some(&json!("True"))
            })
        });
        if yes {
            return Ok(());
        }
        if begun.elapsed() > ESTABLISHED {
            return Err(Error::NotEstablished {
                name: name.to_owned(),
                last: conditions.to_string(),
            });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn read_crds(dir: &Path) -> Result<Vec<(String, Value)>, Error> {
    let bad = |path: &Path, why: String| Error::Yaml {
        path: path.to_owned(),
        why,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io(format!("reading {}", dir.display())))? {
        let path = entry
            .map_err(io(format!("reading {}", dir.display())))?
            .path();
        if path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
        {
            files.push(path);
        }
    }
    files.sort();
    let mut crds = Vec::new();
    for path in files {
        let text =
            std::fs::read_to_string(&path).map_err(io(format!("reading {}", path.display())))?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).map_err(|e| bad(&path, e.to_string()))?;
        for doc in documents {
            if doc.get("kind") != Some(&json!("CustomResourceDefinition")) {
                continue;
            }
            let name = doc.pointer("/metadata/name").and_then(Value::as_str);
            let name = name
                .ok_or_else(|| bad(&path, "a CRD without a name".into()))?
                .to_owned();
            crds.push((name, doc));
        }
    }
    Ok(crds)
}
