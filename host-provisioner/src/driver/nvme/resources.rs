//! Queues and interrupts of secondary controllers: how many each gets, and that it has them.

use super::amiss;
use crate::driver::DriverError;
use crate::kernel::nvme::{Pool, Primary, Resource, Secondary, Subsystem};

/// Without an admin queue and another a controller does not go online, nor without an
/// interrupt (`nvme_virt_set_state` in QEMU).
const LEAST: [(Resource, u16); 2] = [(Resource::Queues, 2), (Resource::Interrupts, 1)];

/// What each VF's controller gets; absent: it has its own by nature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    queues: Option<u16>,
    interrupts: Option<u16>,
}

impl Share {
    /// The same for each of `count` VFs, as much as there is.
    ///
    /// # Errors
    /// There is less than each needs.
    pub(super) fn of(of: Subsystem<'_>, primary: Primary, count: u16) -> Result<Self, DriverError> {
        let share = |pool: Option<Pool>, (kind, least): (Resource, u16)| {
            let Some(pool) = pool else { return Ok(None) };
            let each = each(pool, count);
            if each >= least {
                return Ok(Some(each));
            }
            let most = pool.total / u32::from(least);
            Err(amiss(
                of,
                format!(
                    "its controller has {} {kind} to give, at most {} to one VF, and each of \
                     {count} VFs needs {least}; set numVFs of that PhysicalFunction to at most {most}",
                    pool.total, pool.most
                ),
            ))
        };
        let [queues, interrupts] = LEAST;
        Ok(Self {
            queues: share(primary.queues, queues)?,
            interrupts: share(primary.interrupts, interrupts)?,
        })
    }
}

fn each(pool: Pool, count: u16) -> u16 {
    let fair = pool.total / u32::from(count.max(1));
    let fair = u16::try_from(fair).unwrap_or(u16::MAX).min(pool.most);
    // As it is advised, unless nothing would be left.
    match fair - fair % pool.granularity.max(1) {
        0 => fair,
        whole => whole,
    }
}

/// Has the primary controller let go of what it could give: it is told, and reset, once. Nothing
/// is done where it has none for itself.
pub(super) fn let_go(of: Subsystem<'_>) -> Result<(), DriverError> {
    let primary = of.primary()?;
    if kept(primary).is_empty() {
        return Ok(());
    }
    for kind in kept(primary) {
        of.allocate(primary.id, kind, 0)?;
    }
    of.nvme.reset(of.pf)?;
    match kept(of.primary()?).first() {
        None => Ok(()),
        Some(kind) => Err(amiss(
            of,
            format!("its primary controller was reset and has its {kind} still"),
        )),
    }
}

/// What the primary controller has for itself.
fn kept(primary: Primary) -> Vec<Resource> {
    let pools = [
        (Resource::Queues, primary.queues),
        (Resource::Interrupts, primary.interrupts),
    ];
    let has = |(_, pool): &(Resource, Option<Pool>)| pool.is_some_and(|pool| pool.primary > 0);
    pools
        .into_iter()
        .filter(has)
        .map(|(kind, _)| kind)
        .collect()
}

/// Gives an offline controller its share and takes it online; no-op for one that is.
pub(super) fn ready(of: Subsystem<'_>, it: Secondary, share: Share) -> Result<(), DriverError> {
    if it.online {
        return Ok(());
    }
    for (kind, share, has) in [
        (Resource::Queues, share.queues, it.queues),
        (Resource::Interrupts, share.interrupts, it.interrupts),
    ] {
        if let Some(count) = share
            && count != has
        {
            of.assign(it.id, kind, count)?;
        }
    }
    Ok(of.online(it.id)?)
}
