//! Reads rtnetlink's answers. Only the attributes that are needed are parsed:
//! a kernel that is newer than the packet library must not make an interface
//! unreadable by an attribute that nobody here looks at.

use std::net::{Ipv4Addr, Ipv6Addr};

use common::api::{LinkState, VlanProtocol as Ours};
use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlaBuffer,
    NlasIterator, ParseableParametrized as _,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{LinkAttribute, VfInfo, VfLinkState, VfVlan, VlanProtocol};

use super::Link;
use crate::kernel::{MacAddr, TxRate, VfConfig, VlanTag};

// include/uapi/linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_PERM_ADDRESS: u16 = 54;
const IFLA_INFO_KIND: u16 = 1;
// include/uapi/linux/if_addr.h, rtnetlink.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;
const IFF_UP: u32 = 1;
const RTM_NEWLINK: u16 = 16;
/// NLMSG_ERROR/NLMSG_DONE end every request; a dump that was changed under the
/// reader says so by this flag (include/uapi/linux/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;

const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;

/// An answer's body, not yet read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Body(pub Vec<u8>);

impl NetlinkDeserializable for Body {
    type Error = DecodeError;

    fn deserialize(_header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(payload.to_vec()))
    }
}

/// The answers to one request, as its datagrams bring them.
#[derive(Debug, Default)]
pub struct Answers {
    pub bodies: Vec<Vec<u8>>,
    interrupted: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Complete,
    /// The tables changed meanwhile: what was read may miss something.
    Interrupted,
}

/// Why a request has no answers.
#[derive(Debug)]
pub enum Fault {
    /// The kernel refused.
    Errno(i32),
    Malformed(DecodeError),
}

impl Answers {
    /// Reads one datagram; `None` while more is to come.
    pub fn take(&mut self, datagram: &[u8]) -> Result<Option<End>, Fault> {
        let mut rest = datagram;
        while !rest.is_empty() {
            let answer = NetlinkMessage::<Body>::deserialize(rest).map_err(Fault::Malformed)?;
            self.interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            let next = advance(answer.header.length);
            match answer.payload {
                NetlinkPayload::InnerMessage(Body(body)) => self.bodies.push(body),
                NetlinkPayload::Error(error) => {
                    return match error.code {
                        None => Ok(Some(End::Complete)),
                        Some(code) => Err(Fault::Errno(code.get().saturating_neg())),
                    };
                }
                NetlinkPayload::Done(_) if self.interrupted => return Ok(Some(End::Interrupted)),
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(Fault::Errno(done.code.saturating_neg()));
                }
                NetlinkPayload::Done(_) => return Ok(Some(End::Complete)),
                NetlinkPayload::Overrun(_) => return Err(Fault::Errno(libc::ENOBUFS)),
                _ => {}
            }
            rest = rest.get(next..).unwrap_or_default();
        }
        Ok(None)
    }
}

/// Names of the interfaces that a notification (RTM_NEWLINK) tells of.
pub fn changed_links(datagram: &[u8]) -> Result<Vec<String>, DecodeError> {
    let mut names = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkMessage::<Body>::deserialize(rest)?;
        if message.header.message_type == RTM_NEWLINK
            && let NetlinkPayload::InnerMessage(Body(body)) = &message.payload
        {
            names.push(link(body)?.name);
        }
        rest = rest
            .get(advance(message.header.length)..)
            .unwrap_or_default();
    }
    Ok(names)
}

/// From one message of a datagram to the next: they are aligned to 4 bytes.
fn advance(length: u32) -> usize {
    let length = usize::try_from(length).unwrap_or(usize::MAX - 3);
    length.max(1).next_multiple_of(4)
}

pub(super) type Attribute<'a> = NlaBuffer<&'a [u8]>;

/// The attributes behind a fixed header. A cut-off list is an error.
pub(super) fn attributes(body: &[u8], header: usize) -> Result<Vec<Attribute<'_>>, DecodeError> {
    let rest = body
        .get(header..)
        .ok_or_else(|| DecodeError::buffer_too_small(body.len(), header))?;
    NlasIterator::new(rest).collect()
}

fn number(bytes: &[u8], offset: usize) -> Result<u32, DecodeError> {
    bytes
        .get(offset..offset + 4)
        .and_then(|four| four.try_into().ok())
        .map(u32::from_ne_bytes)
        .ok_or_else(|| DecodeError::buffer_too_small(bytes.len(), offset + 4))
}

fn byte(bytes: &[u8], offset: usize) -> Result<u8, DecodeError> {
    bytes
        .get(offset)
        .copied()
        .ok_or_else(|| DecodeError::buffer_too_small(bytes.len(), offset + 1))
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

/// Six bytes make a MAC; other link layers (InfiniBand) have other lengths.
fn mac(value: &[u8]) -> Option<MacAddr> {
    value.try_into().ok().map(MacAddr)
}

/// An `RTM_NEWLINK` body.
pub fn link(body: &[u8]) -> Result<Link, DecodeError> {
    let mut link = Link {
        index: number(body, 4)?,
        up: number(body, 8)? & IFF_UP != 0,
        ..Link::default()
    };
    let mut elsewhere = false;
    for attribute in attributes(body, LINK_HEADER)? {
        let value = attribute.value();
        match attribute.kind() {
            IFLA_IFNAME => link.name = text(value),
            IFLA_ADDRESS => link.mac = mac(value),
            // Software devices may report zero: not an address.
            IFLA_PERM_ADDRESS => link.permanent_mac = mac(value).filter(|mac| !mac.is_zero()),
            IFLA_MASTER => link.master = Some(number(value, 0)?).filter(|index| *index != 0),
            IFLA_LINK => link.lower = Some(number(value, 0)?).filter(|index| *index != 0),
            IFLA_LINK_NETNSID => elsewhere = true,
            IFLA_LINKINFO => {
                for info in attributes(value, 0)? {
                    if info.kind() == IFLA_INFO_KIND {
                        link.kind = Some(text(info.value()));
                    }
                }
            }
            _ => {}
        }
    }
    // The index of a lower interface in another namespace means nothing here,
    // and a veth's "lower" is its peer.
    if elsewhere || link.kind.as_deref() == Some("veth") {
        link.lower = None;
    }
    Ok(link)
}

/// The VF of this index in an `RTM_NEWLINK` body; `None` when it is not listed.
///
/// A setting that the PF's driver does not report reads as off.
pub fn vf(body: &[u8], index: u16) -> Result<Option<VfConfig>, DecodeError> {
    for attribute in attributes(body, LINK_HEADER)? {
        if attribute.kind() != IFLA_VFINFO_LIST {
            continue;
        }
        let parsed = LinkAttribute::parse_with_param(&attribute, AddressFamily::Unspec)?;
        let LinkAttribute::VfInfoList(vfs) = parsed else {
            continue;
        };
        for infos in vfs {
            if let Some(config) = vf_config(&infos.0, u32::from(index)) {
                return Ok(Some(config));
            }
        }
    }
    Ok(None)
}

fn vf_config(infos: &[VfInfo], index: u32) -> Option<VfConfig> {
    let mut config = VfConfig {
        spoof_check: false,
        ..VfConfig::CLEAN
    };
    let mut found = false;
    for info in infos {
        match info {
            // The kernel begins each VF with its MAC (net/core/rtnetlink.c,
            // rtnl_fill_vfinfo), so this alone decides which VF it is.
            VfInfo::Mac(info) => {
                found = info.vf_id == index;
                config.mac = info.mac.get(..6).and_then(mac)?;
            }
            VfInfo::Vlan(info) if config.vlan.is_none() => {
                config.vlan = tag(info.vlan_id, info.qos, Ours::Ieee8021Q)?;
            }
            // The same again, with the protocol (one entry, rtnl_fill_vfinfo).
            VfInfo::VlanList(list) => {
                if let Some(VfVlan::Info(info)) = list.first() {
                    config.vlan = tag(info.vlan_id, info.qos, protocol(info.protocol))?;
                }
            }
            VfInfo::SpoofCheck(info) => config.spoof_check = info.enabled,
            VfInfo::LinkState(info) => config.link_state = link_state(info.state)?,
            VfInfo::Trust(info) => config.trust = info.enabled,
            VfInfo::Rate(info) => {
                config.rate = TxRate {
                    min: info.min_tx_rate,
                    max: info.max_tx_rate,
                }
            }
            _ => {}
        }
    }
    found.then_some(config)
}

/// `Some(None)`: no tag. Identifier 0 with a priority is a tag too.
fn tag(id: u32, qos: u32, protocol: Ours) -> Option<Option<VlanTag>> {
    let tag = VlanTag {
        id: u16::try_from(id).ok()?,
        qos: u8::try_from(qos).ok()?,
        protocol,
    };
    Some(Some(tag).filter(|tag| tag.id != 0 || tag.qos != 0))
}

/// What is neither is said by a driver that has no tag to tell of.
fn protocol(said: VlanProtocol) -> Ours {
    match said {
        VlanProtocol::Ieee8021Ad => Ours::Ieee8021Ad,
        _ => Ours::Ieee8021Q,
    }
}

/// `None` for a state that this program does not know.
fn link_state(said: VfLinkState) -> Option<LinkState> {
    match said {
        VfLinkState::Auto => Some(LinkState::Auto),
        VfLinkState::Enable => Some(LinkState::Enable),
        VfLinkState::Disable => Some(LinkState::Disable),
        _ => None,
    }
}

/// An `RTM_NEWADDR` body: interface and address, when its scope is global.
pub fn global_address(body: &[u8]) -> Result<Option<(u32, String)>, DecodeError> {
    let prefix = byte(body, 1)?;
    if byte(body, 3)? != RT_SCOPE_UNIVERSE {
        return Ok(None);
    }
    let index = number(body, 4)?;
    let mut address = None;
    for attribute in attributes(body, ADDRESS_HEADER)? {
        // On a point-to-point interface IFA_ADDRESS is the peer's, so the
        // local one wins where both are there.
        let value = match attribute.kind() {
            IFA_LOCAL => ip(attribute.value()),
            IFA_ADDRESS if address.is_none() => ip(attribute.value()),
            _ => continue,
        };
        address = value.or(address);
    }
    Ok(address.map(|address| (index, format!("{address}/{prefix}"))))
}

fn ip(value: &[u8]) -> Option<String> {
    if let Ok(four) = <[u8; 4]>::try_from(value) {
        return Some(Ipv4Addr::from(four).to_string());
    }
    let sixteen = <[u8; 16]>::try_from(value).ok()?;
    Some(Ipv6Addr::from(sixteen).to_string())
}

/// An `RTM_NEWROUTE` body: the interfaces that it leaves by, when it is a
/// default route, in whatever table.
pub fn default_route(body: &[u8]) -> Result<Vec<u32>, DecodeError> {
    let (prefix, kind) = (byte(body, 1)?, byte(body, 7)?);
    let mut interfaces = Vec::new();
    if prefix != 0 || kind != RTN_UNICAST {
        return Ok(interfaces);
    }
    for attribute in attributes(body, ROUTE_HEADER)? {
        match attribute.kind() {
            RTA_OIF => interfaces.push(number(attribute.value(), 0)?),
            RTA_MULTIPATH => interfaces.extend(next_hops(attribute.value())?),
            _ => {}
        }
    }
    Ok(interfaces)
}

/// `struct rtnexthop`: length (16 bits, attributes included), flags, hops, interface.
fn next_hops(mut rest: &[u8]) -> Result<Vec<u32>, DecodeError> {
    const HEADER: usize = 8;
    let mut interfaces = Vec::new();
    while rest.len() >= HEADER {
        interfaces.push(number(rest, 4)?);
        let length = usize::from(u16::from_ne_bytes([byte(rest, 0)?, byte(rest, 1)?]));
        let next = length.max(HEADER).next_multiple_of(4);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(interfaces)
}

#[cfg(test)]
mod tests;
