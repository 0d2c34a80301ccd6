//! Named points between any two steps of attach and release, at which a test stops or kills
//! this program. They exist in the image that the end-to-end tests run (cargo feature
//! `crash-points`); without the feature [`reach`] is nothing and no name is compiled in.
//!
//! A point is armed by a file of its name in [`FOLDER`] on the host that holds the name of a
//! signal, `SIGSTOP` or `SIGKILL`. Who reaches an armed point removes the file and sends
//! itself that signal: the file's absence says that the point was reached, and that it is
//! not reached a second time by a successor. Stopped is stopped with every thread, so what
//! kernel and QEMU have is the state of the point, until SIGCONT or SIGKILL.

/// Where tests arm points.
#[cfg(feature = "crash-points")]
pub const FOLDER: &str = "/run/vf-provisioner/points";

/// The points in the order in which a claim passes them.
#[derive(Clone, Copy, Eq, PartialEq)]
#[cfg_attr(feature = "crash-points", derive(Debug))]
pub enum Point {
    /// The ledger has the choice, the claim not yet.
    Chosen,
    /// The claim records its VF.
    Allocated,
    /// The PF has its VFs.
    VfsCreated,
    /// The VF has its settings and no driver yet.
    Configured,
    /// The VF is on vfio-pci.
    Bound,
    /// The claim records its attachment.
    AttachmentRecorded,
    /// The journal says what is going to be opened.
    JournalWritten,
    /// QEMU may lock the guest's memory.
    MemlockRaised,
    /// The device programs let the group through.
    RulesSet,
    /// The container has the group's node.
    NodesMade,
    /// QEMU has the device.
    DeviceAdded,
    /// The group's node and rule are gone from the container again.
    GroupClosed,
    /// The guest has given the device its addresses; the claim does not say so yet.
    GuestConfigured,
    /// QEMU was told to unplug the device.
    UnplugRequested,
    /// DEVICE_DELETED came.
    Unplugged,
    /// The container has no node any more.
    NodesRemoved,
    /// The device programs are as they were.
    RulesRestored,
    /// The memlock limit is as it was.
    MemlockRestored,
    /// Nothing of the launcher's is open, and no journal says so.
    GatesClosed,
    /// The VF has been reset and has no settings; it is on vfio-pci yet.
    Reset,
    /// Its group was let go, and anybody can open it until it is off vfio-pci.
    LetGo,
    /// The VF has no driver.
    Unbound,
    /// The claim records no VF any more.
    DeviceCleared,
}

/// Does what the point was armed with; nothing if it was not.
#[cfg(feature = "crash-points")]
pub fn reach(point: Point) {
    use nix::sys::signal::{Signal, raise};

    let file = std::path::Path::new(FOLDER).join(name(point));
    let Ok(text) = std::fs::read_to_string(&file) else {
        return;
    };
    let signal: Signal = match text.trim().parse() {
        Ok(signal) => signal,
        Err(error) => {
            tracing::error!(?point, %error, "what a point is armed with must be a signal");
            return;
        }
    };
    tracing::warn!(?point, %signal, "an armed point is reached");
    let sent = std::fs::remove_file(&file)
        .map_err(|e| e.to_string())
        // To this thread: sent to the process, it would go on until another thread has taken it.
        .and_then(|()| raise(signal).map_err(|e| e.to_string()));
    if let Err(error) = sent {
        tracing::error!(?point, error, "an armed point did nothing");
    }
}

/// Nothing: this program was built without points.
#[cfg(not(feature = "crash-points"))]
#[inline]
pub const fn reach(_: Point) {}

/// The name of a point's file: its own in lower case with hyphens.
#[cfg(feature = "crash-points")]
fn name(point: Point) -> String {
    let mut name = String::new();
    for c in format!("{point:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('-');
        }
        name.push(c.to_ascii_lowercase());
    }
    name
}

#[cfg(all(test, feature = "crash-points"))]
mod tests {
    use super::*;

    #[test]
    fn files_are_called_as_points_are() {
        assert_eq!(name(Point::Bound), "bound");
        assert_eq!(name(Point::UnplugRequested), "unplug-requested");
    }
}
