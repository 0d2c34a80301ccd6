//! Reads QEMU's answers: plain functions from QMP values to ours. No I/O.

use common::pci::PciAddress;
use qapi::qmp::{ObjectPropertyInfo, PciDeviceInfo, PciInfo};
use serde_json::Value;

use super::super::{GuestView, Peripheral, Plugged};

/// The expansion ROM; its address shows only while somebody reads it, so it says nothing.
const ROM_BAR: i64 = 6;
/// How QEMU writes PCI_BAR_UNMAPPED (all ones) as a QAPI int.
const UNMAPPED: i64 = -1;
/// ROMs and what else VFIO maps that query-pci does not list.
const UNLISTED_MEMORY: u64 = 64 << 20;

/// The QOM types of ports that a device can be hot-added to.
#[must_use]
pub fn is_root_port(type_: &str) -> bool {
    matches!(type_, "pcie-root-port" | "ioh3420")
}

#[must_use]
pub fn is_viommu(type_: &str) -> bool {
    matches!(
        type_,
        "intel-iommu" | "amd-iommu" | "virtio-iommu" | "virtio-iommu-pci"
    )
}

/// The children in a `qom-list` answer: those of type `child<T>`, with T.
#[must_use]
pub fn children(list: &[ObjectPropertyInfo]) -> Vec<Peripheral> {
    list.iter()
        .filter_map(|entry| {
            let type_ = entry.type_.strip_prefix("child<")?.strip_suffix('>')?;
            Some(Peripheral {
                id: entry.name.clone(),
                type_: type_.to_owned(),
            })
        })
        .collect()
}

/// Whether a port's bus has a device. QOM names it `child[N]`, and N counts every device that
/// was ever plugged there (`bus_add_child` in QEMU's hw/core/qdev.c).
#[must_use]
pub fn is_occupied(bus: &[ObjectPropertyInfo]) -> bool {
    bus.iter().any(|entry| entry.name.starts_with("child["))
}

/// A device in query-pci, with the number of the bus behind the bridge above it.
pub struct Found<'a> {
    pub device: &'a PciDeviceInfo,
    /// 0 while the guest has not numbered it; `None` for a device of the root bus.
    pub bridge_bus: Option<i64>,
}

/// Looks a device up by its id, on every bus.
#[must_use]
pub fn find<'a>(buses: &'a [PciInfo], id: &str) -> Option<Found<'a>> {
    fn below<'a>(
        devices: &'a [PciDeviceInfo],
        bridge_bus: Option<i64>,
        id: &str,
    ) -> Option<Found<'a>> {
        devices.iter().find_map(|device| {
            if device.qdev_id == id {
                return Some(Found { device, bridge_bus });
            }
            let bridge = device.pci_bridge.as_ref()?;
            let inner = bridge.devices.as_deref().unwrap_or_default();
            below(inner, Some(bridge.bus.secondary), id)
        })
    }
    buses.iter().find_map(|bus| below(&bus.devices, None, id))
}

/// How far the guest has come with a device that QEMU lists.
#[must_use]
pub fn guest_view(found: &Found<'_>) -> GuestView {
    let plugged = |missing: String| GuestView::Plugged { missing };
    if found.bridge_bus == Some(0) {
        return plugged("the guest has given no number to the bus behind the port".to_owned());
    }
    let unmapped = found
        .device
        .regions
        .iter()
        .find(|r| r.bar != ROM_BAR && r.address == UNMAPPED);
    if let Some(region) = unmapped {
        return plugged(format!(
            "the guest has not enabled region {}; a driver for the device may be missing in it",
            region.bar
        ));
    }
    match address(found.device) {
        Some(address) => GuestView::Configured { address },
        None => plugged("QEMU reports an address that is none".to_owned()),
    }
}

/// A device's address in the guest; QEMU's PCI has one domain.
#[must_use]
pub fn address(device: &PciDeviceInfo) -> Option<PciAddress> {
    PciAddress::new(
        0,
        u8::try_from(device.bus).ok()?,
        u8::try_from(device.slot).ok()?,
        u8::try_from(device.function).ok()?,
    )
}

/// A device by its properties: `host` is a text, and `parent_bus` the bus's path, whose last part
/// is the id of the port above it.
pub fn plugged(host: Option<&Value>, parent_bus: Option<&Value>) -> Result<Plugged, String> {
    let bus = parent_bus.and_then(Value::as_str).unwrap_or_default();
    let port = bus.rsplit('/').next().unwrap_or_default();
    if port.is_empty() {
        return Err(format!("a device's parent_bus is {bus:?}"));
    }
    Ok(Plugged {
        host: self::host(host)?,
        port: port.to_owned(),
    })
}

/// The property `host` of a device; one that is no VFIO device has none, or an empty one.
pub fn host(property: Option<&Value>) -> Result<Option<PciAddress>, String> {
    match property.and_then(Value::as_str).unwrap_or_default() {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|e| format!("a device's host is {text:?}: {e}")),
    }
}

/// The number of the bus behind a bridge, 0 when it has none yet.
#[must_use]
pub fn secondary_bus(device: &PciDeviceInfo) -> u8 {
    device
        .pci_bridge
        .as_ref()
        .and_then(|bridge| u8::try_from(bridge.bus.secondary).ok())
        .unwrap_or(0)
}

/// Bytes that VFIO maps beside RAM: the memory regions of all devices (video memory among them)
/// and an allowance for ROMs. Too much is harmless: it only raises a limit.
#[must_use]
pub fn device_memory(buses: &[PciInfo]) -> u64 {
    fn sum(devices: &[PciDeviceInfo]) -> u64 {
        devices.iter().fold(0, |total: u64, device| {
            let own = device
                .regions
                .iter()
                .filter(|r| r.type_ == "memory")
                .filter_map(|r| u64::try_from(r.size).ok())
                .fold(0, u64::saturating_add);
            let behind = device
                .pci_bridge
                .as_ref()
                .and_then(|b| b.devices.as_deref())
                .map_or(0, sum);
            total.saturating_add(own).saturating_add(behind)
        })
    }
    buses
        .iter()
        .map(|bus| sum(&bus.devices))
        .fold(UNLISTED_MEMORY, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn device(id: &str, regions: Value, bridge: Option<Value>) -> Value {
        let mut d = json!({
            "bus": 4, "slot": 0, "function": 0, "qdev_id": id, "irq_pin": 1,
            "class_info": {"class": 512}, "id": {"device": 1, "vendor": 2}, "regions": regions,
        });
        if let Some(bridge) = bridge {
            d["pci_bridge"] = bridge;
        }
        d
    }

    fn tree(secondary: i64, regions: Value) -> Vec<PciInfo> {
        let range = json!({"base": 0, "limit": 0});
        let bridge = json!({
            "bus": {"number": 0, "secondary": secondary, "subordinate": secondary,
                "io_range": range, "memory_range": range, "prefetchable_range": range},
            "devices": [device("vfc-1", regions, None)],
        });
        let port = device("pci.7", json!([]), Some(bridge));
        serde_json::from_value(json!([{"bus": 0, "devices": [port]}])).unwrap()
    }

    fn bar(bar: i64, address: i64) -> Value {
        json!({"bar": bar, "type": "memory", "address": address, "size": 4096})
    }

    #[test]
    fn configured_means_all_regions_and_a_numbered_bus() {
        let view = |secondary, regions| {
            let buses = tree(secondary, regions);
            guest_view(&find(&buses, "vfc-1").unwrap())
        };
        let good = view(4, json!([bar(0, 0xfe00_0000), bar(6, -1)]));
        assert!(
            matches!(good, GuestView::Configured { address } if address.to_string() == "0000:04:00.0")
        );
        assert!(matches!(
            view(0, json!([bar(0, 4096)])),
            GuestView::Plugged { .. }
        ));
        assert!(matches!(
            view(4, json!([bar(0, 4096), bar(3, -1)])),
            GuestView::Plugged { missing } if missing.contains("region 3")
        ));
        assert!(find(&tree(4, json!([])), "vfc-2").is_none());
    }

    #[test]
    fn a_device_says_what_it_is_of_and_where() {
        let bus = json!("/machine/peripheral/pci.10/pci.10");
        let of = |host: Option<Value>, bus: &Value| plugged(host.as_ref(), Some(bus));
        let found = of(Some(json!("0000:05:10.2")), &bus).unwrap();
        assert_eq!(found.host.unwrap().to_string(), "0000:05:10.2");
        assert_eq!(found.port, "pci.10");
        assert_eq!(of(None, &bus).unwrap().host, None);
        assert!(of(Some(json!("05:10")), &bus).is_err());
        assert!(of(None, &json!("")).is_err() && plugged(None, None).is_err());
    }

    #[test]
    fn memory_of_devices_is_added_up() {
        let buses = tree(4, json!([bar(0, 1), bar(1, 1)]));
        assert_eq!(device_memory(&buses), UNLISTED_MEMORY + 8192);
    }

    #[test]
    fn only_children_are_peripherals() {
        let list: Vec<ObjectPropertyInfo> = serde_json::from_value(json!([
            {"name": "type", "type": "string"},
            {"name": "pci.1", "type": "child<pcie-root-port>"},
            {"name": "child[7]", "type": "link<x>"},
        ]))
        .unwrap();
        assert_eq!(children(&list).len(), 1);
        assert!(is_occupied(&list) && is_root_port(&children(&list)[0].type_));
        assert!(!is_occupied(&list[..2]));
    }
}
