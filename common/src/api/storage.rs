//! Storage wishes and grants of an NVMe VF.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a tenant asks of the storage that it gets by its VF.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageRequest {
    /// Number of the namespace in its NVMe subsystem; one that the class hands
    /// out.
    #[serde(rename = "namespaceID")]
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub namespace_id: u32,
}

/// The NVMe namespaces that a class hands out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClassStorage {
    /// Their numbers, in the subsystem of each PF that the class selects. A
    /// claim gets one, alone. It is erased when the claim goes; what is in it
    /// before its first claim is not.
    #[schemars(
        length(min = 1, max = 64),
        inner(range(min = 1, max = 4_294_967_294_u32)),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub namespaces: Vec<u32>,
}

/// What a claim was granted of a class's storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantedStorage {
    /// Numbers of NVMe namespaces, one of which the claim gets.
    #[schemars(length(min = 1, max = 64))]
    pub namespaces: Vec<u32>,
}
