//! A blocking rtnetlink socket: one request, its answers, one errno.

use std::io;

use common::api::{LinkState, VlanProtocol as Ours};
use common::pci::PciAddress;
use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Request;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState,
    VfInfoMac, VfInfoRate, VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState, VfVlan,
    VfVlanInfo, VlanProtocol,
};
use netlink_packet_route::route::RouteMessage;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

use super::devlink;
use super::parse::{self, Answers, End, Fault};
use super::{Link, NetUse, Netlink, VfSetting};
use crate::kernel::{Eswitch, KernelError, VfConfig, VlanTag};

/// Speaks to the kernel of the network namespace that the process is in. A
/// socket a request: they are cheap, and an answer left over from a request
/// that failed half way cannot be taken for another's.
#[derive(Clone, Copy, Debug, Default)]
pub struct RtNetlink;

/// An interrupted dump is asked for again so often.
const DUMP_TRIES: usize = 8;

/// What one request brought.
enum Answer {
    Complete(Vec<Vec<u8>>),
    /// The tables changed meanwhile: what was read may miss something.
    Interrupted,
}

fn exchange(request: Request, flags: u16, what: &str) -> Result<Answer, KernelError> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    send(NETLINK_ROUTE, &bytes, what)
}

/// One request to a netlink family, and its answers to the end.
fn send(family: isize, request: &[u8], what: &str) -> Result<Answer, KernelError> {
    let fail = |source| KernelError::Netlink {
        request: what.to_owned(),
        source,
    };
    let mut socket = Socket::new(family).map_err(fail)?;
    socket.bind_auto().map_err(fail)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
    socket.send(request, 0).map_err(fail)?;

    let mut answers = Answers::default();
    loop {
        let (datagram, _) = socket.recv_from_full().map_err(fail)?;
        match answers.take(&datagram) {
            Ok(None) => {}
            Ok(Some(End::Complete)) => return Ok(Answer::Complete(answers.bodies)),
            Ok(Some(End::Interrupted)) => return Ok(Answer::Interrupted),
            Err(Fault::Errno(errno)) => return Err(fail(io::Error::from_raw_os_error(errno))),
            Err(Fault::Malformed(error)) => return Err(unreadable(what, &error)),
        }
    }
}

fn unreadable(what: &str, error: &DecodeError) -> KernelError {
    KernelError::NetlinkAnswer {
        request: what.to_owned(),
        detail: error.to_string(),
    }
}

/// One generic netlink request; its first answer, `None` where there is nobody to ask: no
/// such family, no such device, or a driver without it.
fn ask_generic(request: &[u8], what: &str) -> Result<Option<Vec<u8>>, KernelError> {
    match send(NETLINK_GENERIC, request, what) {
        Ok(Answer::Complete(bodies)) => Ok(bodies.into_iter().next()),
        // Said of dumps alone.
        Ok(Answer::Interrupted) => Err(KernelError::NetlinkAnswer {
            request: what.to_owned(),
            detail: "no answer".to_owned(),
        }),
        Err(error) => match error.errno() {
            Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(error),
        },
    }
}

fn order(request: Request, what: &str) -> Result<(), KernelError> {
    exchange(request, NLM_F_REQUEST | NLM_F_ACK, what).map(|_| ())
}

fn dump(request: &Request, what: &str) -> Result<Vec<Vec<u8>>, KernelError> {
    for _ in 0..DUMP_TRIES {
        if let Answer::Complete(answers) =
            exchange(request.clone(), NLM_F_REQUEST | NLM_F_DUMP, what)?
        {
            return Ok(answers);
        }
    }
    Err(KernelError::NetlinkAnswer {
        request: what.to_owned(),
        detail: format!("the tables changed during each of {DUMP_TRIES} reads"),
    })
}

/// Reads every answer; one that cannot be read fails the whole, because what
/// is missing may be the node's default route.
fn read_all<T>(
    what: &str,
    bodies: &[Vec<u8>],
    read: impl Fn(&[u8]) -> Result<T, DecodeError>,
) -> Result<Vec<T>, KernelError> {
    bodies
        .iter()
        .map(|body| read(body).map_err(|error| unreadable(what, &error)))
        .collect()
}

fn named(interface: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(interface.to_owned()));
    message
}

/// `RTM_GETLINK` of one interface, with its VFs.
fn get_link(interface: &str) -> Result<Vec<u8>, KernelError> {
    let what = format!("read interface {interface}");
    let mut message = named(interface);
    message
        .attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
    let answer = exchange(Request::GetLink(message), NLM_F_REQUEST | NLM_F_ACK, &what)?;
    let first = match answer {
        Answer::Complete(bodies) => bodies.into_iter().next(),
        Answer::Interrupted => None,
    };
    first.ok_or(KernelError::NetlinkAnswer {
        request: what,
        detail: "no answer".to_owned(),
    })
}

fn link_of(interface: &str) -> Result<Link, KernelError> {
    let body = get_link(interface)?;
    parse::link(&body).map_err(|error| KernelError::NetlinkAnswer {
        request: format!("read interface {interface}"),
        detail: error.to_string(),
    })
}

impl Netlink for RtNetlink {
    fn net_use(&self) -> Result<NetUse, KernelError> {
        let what = "list interfaces";
        let links = dump(&Request::GetLink(LinkMessage::default()), what)?;
        let links = read_all(what, &links, parse::link)?;
        let what = "list addresses";
        let addresses = dump(&Request::GetAddress(AddressMessage::default()), what)?;
        let addresses = read_all(what, &addresses, parse::global_address)?;
        let what = "list routes";
        let routes = dump(&Request::GetRoute(RouteMessage::default()), what)?;
        let routes = read_all(what, &routes, parse::default_route)?;
        Ok(NetUse {
            links,
            addresses: addresses.into_iter().flatten().collect(),
            default_routes: routes.into_iter().flatten().collect(),
        })
    }

    fn vf(&self, interface: &str, index: u16) -> Result<VfConfig, KernelError> {
        let body = get_link(interface)?;
        parse::vf(&body, index)
            .map_err(|error| KernelError::NetlinkAnswer {
                request: format!("read VF {index} of {interface}"),
                detail: error.to_string(),
            })?
            .ok_or_else(|| KernelError::NoSuchVf {
                interface: interface.to_owned(),
                index,
            })
    }

    fn set_vf(&self, interface: &str, index: u16, setting: VfSetting) -> Result<(), KernelError> {
        let mut message = named(interface);
        message
            .attributes
            .push(LinkAttribute::VfInfoList(vec![vf_info(index, setting)]));
        let (name, value) = (setting.name(), setting.value());
        let what = format!("set {name} of VF {index} of {interface} to {value}");
        order(Request::SetLink(message), &what).map_err(|error| match error {
            KernelError::Netlink { source, .. } => {
                KernelError::setting(interface, index, setting, source)
            }
            other => other,
        })
    }

    fn is_up(&self, interface: &str) -> Result<bool, KernelError> {
        Ok(link_of(interface)?.up)
    }

    fn eswitch(&self, pf: PciAddress) -> Result<Option<Eswitch>, KernelError> {
        let what = format!("read the eswitch mode of {pf}");
        let Some(family) = ask_generic(&devlink::get_family(), &what)? else {
            return Ok(None);
        };
        let family = devlink::family(&family).map_err(|error| unreadable(&what, &error))?;
        let Some(mode) = ask_generic(&devlink::get_eswitch(family, pf), &what)? else {
            return Ok(None);
        };
        devlink::eswitch(&mode).map_err(|error| unreadable(&what, &error))
    }

    fn set_up(&self, interface: &str) -> Result<(), KernelError> {
        let mut message = named(interface);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        order(
            Request::SetLink(message),
            &format!("take interface {interface} up"),
        )
    }
}

fn vf_info(index: u16, setting: VfSetting) -> LinkVfInfo {
    let vf = u32::from(index);
    LinkVfInfo(vec![match setting {
        VfSetting::Mac(mac) => VfInfo::Mac(VfInfoMac::new(vf, &mac.0)),
        VfSetting::Vlan(tag) => vlan_info(vf, tag),
        VfSetting::SpoofCheck(on) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, on)),
        VfSetting::LinkState(state) => VfInfo::LinkState(VfInfoLinkState::new(
            vf,
            match state {
                LinkState::Auto => VfLinkState::Auto,
                LinkState::Enable => VfLinkState::Enable,
                LinkState::Disable => VfLinkState::Disable,
            },
        )),
        VfSetting::Trust(on) => VfInfo::Trust(VfInfoTrust::new(vf, on)),
        VfSetting::Rate(rate) => VfInfo::Rate(VfInfoRate::new(vf, rate.min, rate.max)),
    }])
}

/// `IFLA_VF_VLAN` says no protocol, which is 802.1Q, and every driver's kernel has it; the list
/// is for the other one.
fn vlan_info(vf: u32, tag: Option<VlanTag>) -> VfInfo {
    let tag = tag.unwrap_or_default();
    let (id, qos) = (u32::from(tag.id), u32::from(tag.qos));
    match tag.protocol {
        Ours::Ieee8021Q => VfInfo::Vlan(VfInfoVlan::new(vf, id, qos)),
        Ours::Ieee8021Ad => {
            let info = VfVlanInfo::new(vf, id, qos, VlanProtocol::Ieee8021Ad);
            VfInfo::VlanList(vec![VfVlan::Info(info)])
        }
    }
}
