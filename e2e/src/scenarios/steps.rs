//! The steps of the proposal's test plan, each proven where it happens. (Step 2, the
//! driver's installation, needs a boot of its own and is among the drivers.)

use anyhow::{Context, Result, ensure};
use common::api::{PhysicalFunction, SriovNode, type_};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{DeleteParams, ListParams};

use super::support::site::{L1_NODE, L2_NODE, PF_MACS};
use super::support::{Lab, Wish, l1, l2};
use super::{Scenario, scenario};
use crate::clusters::not_ready;
use crate::deploy::names::{CLAIM_NAMESPACE, GUEST_CLUSTER, TENANT_NAMESPACE, VM_NAMESPACE};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "step1-guest-node-registered",
            "a VM of the host is a Ready node of the guest cluster, under the UUID of its domain",
            step1
        ),
        scenario!(
            "inventory-is-the-kernels",
            "each SR-IOV function of L1 is a PhysicalFunction that says what the kernel says",
            inventory
        ),
        scenario!(
            "step3-claim-created",
            "a tenant's claim gets the syncer's finalizer and defaults, and is listed with its columns",
            step3
        ),
        scenario!(
            "step4-synced-to-host",
            "the claim's copy stands in the host cluster under its deterministic name, with the guest's identity",
            step4
        ),
        scenario!(
            "step5-vf-created-by-sysfs",
            "from a pool of none, the VFs are created by one write to sriov_numvfs, and the kernel's count is reported",
            step5
        ),
        scenario!(
            "step6-7-bound-to-vfio-alone-in-group",
            "the VF is set up as asked, bound to vfio-pci, and alone in its IOMMU group",
            step6_7
        ),
        scenario!(
            "step8-device-add-in-qemu",
            "QEMU's own device list has the VF under the claim's id, with addresses from the guest",
            step8
        ),
        scenario!(
            "guest-sees-device",
            "the guest's kernel has the device at the reported address, its driver bound, with the MAC asked for",
            guest_sees_device
        ),
    ]
}

async fn step1(lab: &Lab<'_>) -> Result<()> {
    let nodes: Api<Node> = Api::all(lab.guest.clone());
    let node = nodes.get(L2_NODE).await?;
    let why = not_ready(&node);
    ensure!(why.is_none(), "node {L2_NODE} is not Ready: {why:?}");
    let (uuid, _) = lab.node_identity(L2_NODE).await?;
    let domain = lab.qemu.virsh(&format!("domuuid {}", lab.qemu.domain));
    let domain = l1_says(lab, &domain).await?;
    ensure!(
        uuid.eq_ignore_ascii_case(&domain),
        "systemUUID {uuid}, the domain's is {domain}"
    );
    let vmis = super::support::kinds::vms(&lab.host, VM_NAMESPACE);
    let vmis = vmis.list(&ListParams::default()).await?.items;
    let uuids: Vec<_> = vmis
        .iter()
        .filter_map(|v| v.data.pointer("/spec/domain/firmware/uuid")?.as_str())
        .collect();
    ensure!(
        uuids
            .iter()
            .filter(|u| u.eq_ignore_ascii_case(&uuid))
            .count()
            == 1,
        "not one VM of the host has UUID {uuid}: {uuids:?}"
    );
    Ok(())
}

async fn l1_says(lab: &Lab<'_>, script: &str) -> Result<String> {
    super::support::far::sh(&lab.l1, script).await
}

async fn inventory(lab: &Lab<'_>) -> Result<()> {
    let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
    // What is compared is the work of the agent that runs, which makes it from nothing.
    let name = &lab.shared.object;
    let old = api.get(name).await?.metadata.uid;
    api.delete(name, &DeleteParams::default()).await?;
    let limit = super::support::claims::ATTACH;
    super::support::watch::until(&api, name, "the object to be made anew", limit, |p| {
        use crate::wait::Probe;
        let new = p.filter(|p| p.metadata.uid != old && p.status.is_some());
        Ok(new.map_or(Probe::NotYet("it is not".into()), |_| Probe::Ready(())))
    })
    .await?;
    let all = api.list(&ListParams::default()).await?.items;
    let count = l1_says(lab, "ls -d /sys/bus/pci/devices/*/sriov_totalvfs | wc -l").await?;
    ensure!(
        all.len() == count.parse::<usize>()?,
        "{} objects for {count} functions",
        all.len()
    );
    for (pf, mac) in [&lab.wired, &lab.uplink, &lab.shared, &lab.second]
        .into_iter()
        .zip(PF_MACS)
    {
        let object = api.get(&pf.object).await?;
        ensure!(
            object.spec.node_name == L1_NODE,
            "{} is on {}",
            pf.object,
            object.spec.node_name
        );
        let status = object
            .status
            .with_context(|| format!("{} has no status", pf.object))?;
        let told = (
            status.mac_address.as_deref(),
            status.interface_name.as_deref(),
        );
        ensure!(
            told == (Some(mac), Some(&*pf.interface)),
            "{} says {told:?}",
            pf.object
        );
        ensure!(
            status.driver.as_deref() == Some("igb"),
            "{:?}",
            status.driver
        );
        ensure!(
            status.total_vfs == 7,
            "igb has 7 VFs, {} says {}",
            pf.object,
            status.total_vfs
        );
        let kernel = l1::pf(&lab.l1, &pf.address).await?;
        ensure!(
            status.num_vfs == kernel.num_vfs,
            "{} says {}",
            pf.object,
            status.num_vfs
        );
    }
    let unmanaged = api.get(&lab.uplink.object).await?;
    ensure!(!unmanaged.spec.managed, "hardware was taken over unasked");
    let node: Api<SriovNode> = Api::all(lab.host.clone());
    let node = node
        .get(L1_NODE)
        .await?
        .status
        .context("the SriovNode has no status")?;
    let kernel = l1_says(lab, "uname -r").await?;
    ensure!(
        node.kernel_version.as_deref() == Some(&*kernel),
        "{:?}",
        node.kernel_version
    );
    ensure!(
        node.iommu.enabled,
        "L1 has an IOMMU, its SriovNode does not say so"
    );
    Ok(())
}

async fn step3(lab: &Lab<'_>) -> Result<()> {
    let claim = lab.create(&Wish::new("step3")).await?;
    let api = lab.guest_claims();
    let what = "the syncer's finalizer and Synced";
    super::support::watch::until(
        &api,
        &claim.name,
        what,
        super::support::claims::ATTACH,
        |c| {
            use crate::wait::Probe;
            let c = c.context("the claim is gone")?;
            let finalizers = c.metadata.finalizers.clone().unwrap_or_default();
            let kept = finalizers.iter().any(|f| f == common::api::GUEST_FINALIZER);
            let conditions = c
                .status
                .as_ref()
                .map(|s| s.conditions.as_slice())
                .unwrap_or_default();
            let synced = common::api::condition(conditions, type_::SYNCED);
            Ok(if kept && synced.is_some_and(|s| s.status == "True") {
                Probe::Ready(())
            } else {
                Probe::NotYet(format!(
                    "{finalizers:?} {}",
                    super::support::claims::told(c)
                ))
            })
        },
    )
    .await?;
    let table = lab
        .dc
        .guest
        .exec()
        .args(["kubectl", "get", "vfclaims", "-n", TENANT_NAMESPACE]);
    let table = table.text()?;
    let header = table.lines().next().unwrap_or_default();
    for column in ["HOST-NODE", "VF", "GUEST-ADDRESS", "READY", "REASON", "AGE"] {
        ensure!(header.contains(column), "no column {column}: {header}");
    }
    Ok(())
}

async fn step4(lab: &Lab<'_>) -> Result<()> {
    let wish = Wish::new("step4").mac("02:5f:00:00:04:01").vlan(104);
    let claim = lab.create(&wish).await?;
    lab.host_status(&claim, "the controller to admit the copy", |s| {
        s.admitted.clone()
    })
    .await?;
    let copy = lab.host_copy(&claim).await?.context("the copy is gone")?;
    ensure!(copy.metadata.namespace.as_deref() == Some(CLAIM_NAMESPACE));
    let guest = copy
        .spec
        .guest
        .context("the copy does not say whose it is")?;
    let (uuid, ip) = lab.node_identity(L2_NODE).await?;
    let system: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(lab.guest.clone());
    let system = system.get("kube-system").await?.metadata.uid;
    ensure!(guest.cluster == GUEST_CLUSTER, "{guest:?}");
    ensure!(
        Some(&guest.cluster_uid) == system.as_ref(),
        "{guest:?}, kube-system is {system:?}"
    );
    ensure!(
        guest.namespace == TENANT_NAMESPACE && guest.name == claim.name,
        "{guest:?}"
    );
    ensure!(
        guest.uid == claim.uid && guest.node_name == L2_NODE,
        "{guest:?}"
    );
    ensure!(
        guest.system_uuid.eq_ignore_ascii_case(&uuid),
        "{guest:?}, the node says {uuid}"
    );
    ensure!(
        copy.spec.vm_ip.as_deref() == Some(&*ip),
        "{:?}, the node says {ip}",
        copy.spec.vm_ip
    );
    let asked = lab.guest_claims().get(&claim.name).await?.spec.network;
    ensure!(
        copy.spec.network == asked,
        "{:?} became {:?}",
        asked,
        copy.spec.network
    );
    Ok(())
}

/// The agent gives an idle PF its VFs when the first claim needs one, so the pool is
/// emptied by hand first. Nobody holds a VF here: the laboratory was tidied.
async fn step5(lab: &Lab<'_>) -> Result<()> {
    let l1 = &lab.l1;
    l1_says(
        lab,
        &format!(
            "echo 0 >/sys/bus/pci/devices/{}/sriov_numvfs",
            lab.wired.address
        ),
    )
    .await?;
    let before = lab.trace().await?;
    let (_, attached) = lab.attach(&Wish::new("step5")).await?;
    let kernel = l1::pf(l1, &lab.wired.address).await?;
    ensure!(kernel.num_vfs == 7, "the kernel has {} VFs", kernel.num_vfs);
    let vf = kernel.vfs.iter().find(|v| v.index == attached.vf_index);
    let vf = vf.with_context(|| format!("no virtfn{}: {:?}", attached.vf_index, kernel.vfs))?;
    ensure!(
        vf.address == attached.vf,
        "the claim says {}, the kernel {}",
        attached.vf,
        vf.address
    );
    let after = lab.trace().await?;
    let counts = super::support::writes::num_vfs(&before, &after, &lab.wired.address)?;
    ensure!(counts == ["7"], "sriov_numvfs was written {counts:?}");
    let api: Api<PhysicalFunction> = Api::all(lab.host.clone());
    let what = "the PhysicalFunction to report the kernel's count";
    super::support::watch::until(
        &api,
        &lab.wired.object,
        what,
        super::support::claims::ATTACH,
        |p| {
            use crate::wait::Probe;
            let status = p.and_then(|p| p.status.clone()).context("no status")?;
            Ok(
                if status.num_vfs == 7 && status.counts.attached == 1 && status.counts.free == 6 {
                    Probe::Ready(())
                } else {
                    Probe::NotYet(format!("{} VFs, {:?}", status.num_vfs, status.counts))
                },
            )
        },
    )
    .await
}

async fn step6_7(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:06:01";
    let wish = Wish::new("step6").mac(mac).vlan(106).trust(true);
    let (_, attached) = lab.attach(&wish).await?;
    let kernel = l1::pf(&lab.l1, &lab.wired.address).await?;
    let vf = kernel
        .vfs
        .iter()
        .find(|v| v.address == attached.vf)
        .context("no such VF")?;
    ensure!(vf.driver.as_deref() == Some("vfio-pci"), "{vf:?}");
    ensure!(
        vf.members == [attached.vf.clone()],
        "its group has {:?}",
        vf.members
    );
    ensure!(
        vf.group == Some(attached.iommu_group),
        "{vf:?}, the claim: {}",
        attached.iommu_group
    );
    let settings = l1::vf_settings(&lab.l1, &lab.wired.interface).await?;
    let seen = settings.get(&attached.vf_index).context("no settings")?;
    let want = l1::VfSettings {
        mac: mac.into(),
        vlan: 106,
        spoof_check: true,
        trust: true,
        max_rate: 0,
    };
    ensure!(*seen == want, "the kernel reads back {seen:?}");
    let script = format!("cat /sys/bus/pci/devices/{}/driver_override", attached.vf);
    let left = l1_says(lab, &script).await?;
    ensure!(
        left == "(null)" || left.is_empty(),
        "driver_override was left at {left}"
    );
    Ok(())
}

async fn step8(lab: &Lab<'_>) -> Result<()> {
    let (claim, attached) = lab.attach(&Wish::new("step8")).await?;
    let ours = lab.qemu.ours().await?;
    let [device] = ours.as_slice() else {
        anyhow::bail!("QEMU has {ours:?}")
    };
    ensure!(device.id == claim.qemu_id(), "QEMU calls it {}", device.id);
    ensure!(
        (device.vendor, device.device) == (0x8086, 0x10ca),
        "{device:?}"
    );
    ensure!(
        device.guest_address() == attached.guest_address,
        "{device:?}: {}",
        attached.guest_address
    );
    ensure!(
        !device.regions.is_empty() && device.regions.iter().all(|r| *r > 0),
        "{device:?}"
    );
    // The agent takes the node away once QEMU has it open.
    let held = format!(
        r"for f in /proc/{}/fd/*; do readlink $f; done | grep -cxE '/dev/vfio/{}( \(deleted\))?' || true",
        lab.qemu.pid, attached.iommu_group
    );
    ensure!(
        l1_says(lab, &held).await? == "1",
        "QEMU does not hold group {}",
        attached.iommu_group
    );
    Ok(())
}

async fn guest_sees_device(lab: &Lab<'_>) -> Result<()> {
    let mac = "02:5f:00:00:09:01";
    let (_, attached) = lab.attach(&Wish::new("guest").mac(mac)).await?;
    ensure!(attached.mac == mac, "the claim says {}", attached.mac);
    let vf = l2::bound(&lab.l2, &attached.guest_address).await?;
    ensure!(vf.driver.as_deref() == Some("igbvf"), "{vf:?}");
    ensure!(vf.mac.as_deref() == Some(mac), "{vf:?}");
    Ok(())
}
