//! What can go wrong in a claim's reconcile, whichever step it came from.

use common::kube::{ErrorClass, class_of};
use thiserror::Error;

use super::ledger::Doubled;
use super::pool::WishError;
use super::qemu::VmError;
use super::vf::VfError;

/// Why a reconcile could not go on.
#[derive(Debug, Error)]
pub enum ReconcileError {
    #[error("the API server: {0}")]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Vf(#[from] VfError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Wish(#[from] WishError),
    #[error(transparent)]
    Doubled(#[from] Doubled),
    #[error("the claim's {0} is incomplete; it was written by another version or by hand")]
    Incomplete(&'static str),
    #[error("no end after {steps} steps, the last being {last}; this is a defect")]
    NoEnd { steps: usize, last: String },
}

impl ReconcileError {
    /// Who can do something about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Api(error) => class_of(error),
            Self::Wish(_) | Self::Doubled(_) | Self::Incomplete(_) => ErrorClass::TellUser,
            Self::Vf(_) | Self::Vm(_) | Self::NoEnd { .. } => ErrorClass::Retry,
        }
    }
}
