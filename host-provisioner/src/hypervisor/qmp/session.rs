//! A conversation with one QEMU: what each step of an attachment asks, and how it is answered.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::pci::PciAddress;
use qapi::qmp;
use serde_json::{Value, json};
use tokio::sync::{Mutex, broadcast};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::super::{
    Event, GuestMemory, GuestView, HypervisorError, Machine, Peripheral, Plugged, RootPort,
    Session, Unplug, ViommuFacts,
};
use super::transport::Connection;
use super::{Address, inspect};
use crate::points::{Point, reach};

/// Queries are answered at once unless QEMU's big lock is held: pinning a guest's memory for
/// another device may take this long.
const QUERY_TIME: Duration = Duration::from_secs(60);
/// Between two connections to a QEMU that closes them.
const CONNECT_AGAIN: Duration = Duration::from_secs(1);
const PERIPHERAL: &str = "/machine/peripheral";
const PERIPHERAL_ANON: &str = "/machine/peripheral-anon";

type Result<T> = std::result::Result<T, HypervisorError>;

#[derive(Debug)]
pub(super) struct QmpSession {
    address: Address,
    connection: Mutex<Option<Arc<Connection>>>,
}

impl QmpSession {
    pub(super) fn new(address: Address) -> Self {
        Self {
            address,
            connection: Mutex::new(None),
        }
    }

    pub(super) async fn ensure_connected(&self) -> Result<()> {
        self.connection().await.map(drop)
    }

    /// The connection there is, or a new one in the place of a lost one.
    async fn connection(&self) -> Result<Arc<Connection>> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|c| c.is_open()) {
            return Ok(Arc::clone(connection));
        }
        // The old one goes first: QEMU serves one client at a time and greets no second.
        *slot = None;
        let connection = Arc::new(self.address.connect().await?);
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    async fn raw(&self, name: &str, arguments: Value, limit: Duration) -> Result<Value> {
        let connection = self.connection().await?;
        connection.execute(name, arguments, limit).await
    }

    async fn query<C: qmp::QmpCommand>(&self, command: &C) -> Result<C::Ok> {
        self.command(command, QUERY_TIME).await
    }

    async fn command<C: qmp::QmpCommand>(&self, command: &C, limit: Duration) -> Result<C::Ok> {
        let malformed = |e: serde_json::Error| HypervisorError::Malformed {
            command: C::NAME.to_owned(),
            reason: e.to_string(),
        };
        let arguments = serde_json::to_value(command).map_err(malformed)?;
        let answer = self.raw(C::NAME, arguments, limit).await?;
        serde_json::from_value(answer).map_err(malformed)
    }

    async fn list(&self, path: String) -> Result<Vec<qmp::ObjectPropertyInfo>> {
        self.query(&qmp::qom_list { path }).await
    }

    /// A property, `None` where this QEMU does not have it.
    async fn property(&self, path: &str, property: &str) -> Result<Option<Value>> {
        let asked = qmp::qom_get {
            path: path.to_owned(),
            property: property.to_owned(),
        };
        match self.query(&asked).await {
            Ok(value) => Ok(Some(value)),
            Err(HypervisorError::Refused { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A text field of a query whose qapi type lists values that later QEMUs add to.
    async fn text(&self, command: &str, field: &str) -> Result<String> {
        let answer = self.raw(command, json!({}), QUERY_TIME).await?;
        text_of(answer.get(field), command, field)
    }

    async fn port(&self, id: &str, buses: &[qmp::PciInfo]) -> Result<RootPort> {
        let path = format!("{PERIPHERAL}/{id}");
        let hotplug = self.property(&path, "hotplug").await?;
        // The bus behind a port has the port's id as its name.
        let bus = self.list(format!("{path}/{id}")).await?;
        let found = inspect::find(buses, id);
        Ok(RootPort {
            id: id.to_owned(),
            address: found.as_ref().and_then(|f| inspect::address(f.device)),
            // Ports without the property always take hotplug.
            hotplug: hotplug.is_none_or(|v| v == Value::Bool(true)),
            occupied: inspect::is_occupied(&bus),
            secondary_bus: found.map_or(0, |f| inspect::secondary_bus(f.device)),
        })
    }

    async fn memory(&self, buses: &[qmp::PciInfo]) -> Result<GuestMemory> {
        let sizes = self.query(&qmp::query_memory_size_summary {}).await?;
        let present = sizes
            .base_memory
            .saturating_add(sizes.plugged_memory.unwrap_or(0));
        let maximum = self
            .property("/machine", "memory")
            .await?
            .and_then(|m| m.get("max-size").and_then(Value::as_u64))
            .unwrap_or(0)
            .max(present);
        Ok(GuestMemory {
            present,
            maximum,
            device: inspect::device_memory(buses),
        })
    }

    async fn viommu(
        &self,
        folder: &str,
        peripherals: &[Peripheral],
    ) -> Result<Option<ViommuFacts>> {
        let Some(found) = peripherals.iter().find(|p| inspect::is_viommu(&p.type_)) else {
            return Ok(None);
        };
        let path = format!("{folder}/{}", found.id);
        let caching_mode = match found.type_.as_str() {
            "intel-iommu" => self.property(&path, "caching-mode").await? == Some(Value::Bool(true)),
            // virtio-iommu reports every mapping by its nature; amd-iommu never does.
            other => other.starts_with("virtio-iommu"),
        };
        Ok(Some(ViommuFacts {
            type_: found.type_.clone(),
            caching_mode,
        }))
    }

    async fn exists(&self, id: &str) -> Result<bool> {
        let list = self.list(PERIPHERAL.to_owned()).await?;
        Ok(list.iter().any(|entry| entry.name == id))
    }

    /// Waits for the device's end among events, until `until`.
    async fn wait_deleted(
        &self,
        id: &str,
        events: &mut broadcast::Receiver<Event>,
        until: Instant,
    ) -> Result<Unplug> {
        let pending = |reason: &str| {
            Ok(Unplug::Pending {
                reason: reason.to_owned(),
            })
        };
        let not_yet = "the guest has not let the device go yet";
        loop {
            let event = match timeout_at(until, events.recv()).await {
                Ok(Ok(event)) => event,
                Ok(Err(_)) if !self.exists(id).await? => return Ok(Unplug::Deleted),
                // What is ready is taken before the time is looked at: a QEMU that floods us, or
                // closes each connection, would be listened to for ever.
                Ok(Err(_)) if Instant::now() >= until => return pending(not_yet),
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => continue,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    sleep_until(until.min(Instant::now() + CONNECT_AGAIN)).await;
                    *events = self.events().await?;
                    // It may have gone between the look above and the new ear.
                    if !self.exists(id).await? {
                        return Ok(Unplug::Deleted);
                    }
                    continue;
                }
                Err(_) => return pending(not_yet),
            };
            match (event.name.as_str(), event.device() == Some(id)) {
                ("DEVICE_DELETED", true) => return Ok(Unplug::Deleted),
                ("DEVICE_UNPLUG_GUEST_ERROR", true) => {
                    return pending("the guest refused to let the device go");
                }
                _ => {}
            }
        }
    }
}

fn text_of(value: Option<&Value>, command: &str, field: &str) -> Result<String> {
    value
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| HypervisorError::Malformed {
            command: command.to_owned(),
            reason: format!("it has no {field}"),
        })
}

fn malformed_property(reason: String) -> HypervisorError {
    HypervisorError::Malformed {
        command: "qom-get".to_owned(),
        reason,
    }
}

#[async_trait]
impl Session for QmpSession {
    async fn machine(&self) -> Result<Machine> {
        let run_state = self.text("query-status", "status").await?;
        let uuid = self.text("query-uuid", "UUID").await?.to_ascii_lowercase();
        let type_ = self.property("/machine", "type").await?;
        let machine_type = text_of(type_.as_ref(), "qom-get", "machine type")?;
        let confidential = self
            .property("/machine", "confidential-guest-support")
            .await?
            .is_some_and(|link| link.as_str().is_some_and(|path| !path.is_empty()));
        let peripherals = inspect::children(&self.list(PERIPHERAL.to_owned()).await?);
        let unnamed = inspect::children(&self.list(PERIPHERAL_ANON.to_owned()).await?);
        let viommu = match self.viommu(PERIPHERAL, &peripherals).await? {
            Some(found) => Some(found),
            None => self.viommu(PERIPHERAL_ANON, &unnamed).await?,
        };
        let buses = self.query(&qmp::query_pci {}).await?;
        let mut ports = Vec::new();
        for port in peripherals
            .iter()
            .filter(|p| inspect::is_root_port(&p.type_))
        {
            ports.push(self.port(&port.id, &buses).await?);
        }
        let memory = self.memory(&buses).await?;
        Ok(Machine {
            machine_type,
            uuid,
            run_state,
            viommu,
            confidential,
            memory,
            ports,
            peripherals,
        })
    }

    async fn device_add(
        &self,
        id: &str,
        host: PciAddress,
        port: &str,
        timeout: Duration,
    ) -> Result<()> {
        let properties = [("host".to_owned(), json!(host.to_string()))];
        let command = qmp::device_add::new("vfio-pci", id.to_owned(), port.to_owned(), properties);
        self.command(&command, timeout).await.map(drop)
    }

    async fn device_del(&self, id: &str, deadline: Duration) -> Result<Unplug> {
        let until = Instant::now() + deadline;
        // Listening starts before the request, or a fast guest's answer would be missed.
        let mut events = self.events().await?;
        let asked = self
            .command(&qmp::device_del { id: id.to_owned() }, QUERY_TIME)
            .await;
        match asked {
            Ok(_) => {}
            Err(e) if e.is_device_not_found() => return Ok(Unplug::Deleted),
            // "Device x is already in the process of unplug": an earlier request stands.
            Err(HypervisorError::Refused { description, .. })
                if description.contains("already in the process of unplug") => {}
            Err(e) => return Err(e),
        }
        reach(Point::UnplugRequested);
        self.wait_deleted(id, &mut events, until).await
    }

    async fn guest_view(&self, id: &str) -> Result<GuestView> {
        let buses = self.query(&qmp::query_pci {}).await?;
        if let Some(found) = inspect::find(&buses, id) {
            return Ok(inspect::guest_view(&found));
        }
        if self.exists(id).await? {
            return Ok(GuestView::Plugged {
                missing: "QEMU has the device, but on no PCI bus".to_owned(),
            });
        }
        Ok(GuestView::Absent)
    }

    async fn host(&self, id: &str) -> Result<Option<PciAddress>> {
        let host = self.property(&format!("{PERIPHERAL}/{id}"), "host").await?;
        inspect::host(host.as_ref()).map_err(malformed_property)
    }

    async fn plugged(&self, id: &str) -> Result<Option<Plugged>> {
        if !self.exists(id).await? {
            return Ok(None);
        }
        let path = format!("{PERIPHERAL}/{id}");
        let host = self.property(&path, "host").await?;
        let bus = self.property(&path, "parent_bus").await?;
        inspect::plugged(host.as_ref(), bus.as_ref())
            .map(Some)
            .map_err(malformed_property)
    }

    async fn events(&self) -> Result<broadcast::Receiver<Event>> {
        let connection = self.connection().await?;
        connection.events().ok_or_else(|| HypervisorError::Lost {
            command: "listening for events".to_owned(),
            reason: "it was closed".to_owned(),
        })
    }
}
