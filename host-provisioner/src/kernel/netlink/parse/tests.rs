//! What the kernel would say, read again.

use netlink_packet_core::Emitable as _;
use netlink_packet_route::link::{
    InfoKind, LinkFlags, LinkInfo, LinkMessage, LinkVfInfo, VfInfoLinkState, VfInfoMac, VfInfoRate,
    VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfVlanInfo,
};

use super::*;

fn bytes(message: &LinkMessage) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn message(attributes: Vec<LinkAttribute>) -> Vec<u8> {
    let mut message = LinkMessage::default();
    message.header.index = 7;
    message.header.flags = LinkFlags::Up;
    message.attributes = attributes;
    bytes(&message)
}

fn vf_infos(index: u32, vlan: (u32, u32), on: bool) -> LinkVfInfo {
    LinkVfInfo(vec![
        VfInfo::Mac(VfInfoMac::new(index, &[2, 0, 0, 0, 0, index as u8])),
        VfInfo::Vlan(VfInfoVlan::new(index, vlan.0, vlan.1)),
        VfInfo::SpoofCheck(VfInfoSpoofCheck::new(index, on)),
        VfInfo::LinkState(VfInfoLinkState::new(index, VfLinkState::Auto)),
        VfInfo::Trust(VfInfoTrust::new(index, !on)),
    ])
}

#[test]
fn a_vf_is_found_among_others() {
    let body = message(vec![
        LinkAttribute::IfName("enp1s0".to_owned()),
        LinkAttribute::VfInfoList(vec![
            vf_infos(0, (0, 0), true),
            vf_infos(1, (100, 3), false),
            vf_infos(2, (0, 5), true),
        ]),
    ]);
    let config = |index, vlan, on: bool| VfConfig {
        mac: MacAddr([2, 0, 0, 0, 0, index]),
        vlan,
        spoof_check: on,
        trust: !on,
        ..VfConfig::CLEAN
    };
    assert_eq!(vf(&body, 0).unwrap(), Some(config(0, None, true)));
    let tag = VlanTag::new(100, 3);
    assert_eq!(vf(&body, 1).unwrap(), Some(config(1, Some(tag), false)));
    let priority = VlanTag::new(0, 5);
    assert_eq!(vf(&body, 2).unwrap(), Some(config(2, Some(priority), true)));
    assert_eq!(vf(&body, 3).unwrap(), None);
    assert_eq!(vf(&message(Vec::new()), 0).unwrap(), None);
}

/// One VF as the kernel tells of it: the list of VLANs behind the VLAN, which says no
/// protocol.
fn vf_with(infos: Vec<VfInfo>) -> Option<VfConfig> {
    let mut all = vec![VfInfo::Mac(VfInfoMac::new(0, &[0; 6]))];
    all.extend(infos);
    let list = LinkAttribute::VfInfoList(vec![LinkVfInfo(all)]);
    vf(&message(vec![list]), 0).unwrap()
}

#[test]
fn link_state_rates_and_the_vlans_protocol_are_read() {
    let list = |id, protocol| {
        let info = VfVlanInfo::new(0, id, 3, protocol);
        VfInfo::VlanList(vec![VfVlan::Info(info)])
    };
    let read = vf_with(vec![
        VfInfo::Vlan(VfInfoVlan::new(0, 100, 3)),
        VfInfo::Rate(VfInfoRate::new(0, 10, 500)),
        VfInfo::SpoofCheck(VfInfoSpoofCheck::new(0, true)),
        VfInfo::LinkState(VfInfoLinkState::new(0, VfLinkState::Disable)),
        list(100, VlanProtocol::Ieee8021Ad),
    ]);
    let expected = VfConfig {
        vlan: Some(VlanTag {
            protocol: Ours::Ieee8021Ad,
            ..VlanTag::new(100, 3)
        }),
        link_state: LinkState::Disable,
        rate: TxRate { min: 10, max: 500 },
        ..VfConfig::CLEAN
    };
    assert_eq!(read, Some(expected));
    let customer = vf_with(vec![
        VfInfo::Vlan(VfInfoVlan::new(0, 100, 3)),
        list(100, VlanProtocol::Ieee8021Q),
    ]);
    let protocol = customer.unwrap().vlan.unwrap().protocol;
    assert_eq!(protocol, Ours::Ieee8021Q);
    // A driver that has none of them says nothing, and that is what a VF of nobody has.
    let none = vf_with(Vec::new()).unwrap();
    assert_eq!(
        (none.link_state, none.rate, none.vlan),
        (LinkState::Auto, TxRate::default(), None)
    );
}

#[test]
fn what_no_kernel_says_today_is_not_taken_for_something_else() {
    let state = VfInfoLinkState::new(0, VfLinkState::Other(9));
    assert_eq!(vf_with(vec![VfInfo::LinkState(state)]), None);
}

#[test]
fn a_vlan_link_is_read() {
    let body = message(vec![
        LinkAttribute::IfName("eth0.5".to_owned()),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, 9]),
        LinkAttribute::PermAddress(vec![0; 6]),
        LinkAttribute::Link(2),
        LinkAttribute::Controller(4),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vlan)]),
    ]);
    let expected = Link {
        index: 7,
        name: "eth0.5".to_owned(),
        up: true,
        mac: Some(MacAddr([2, 0, 0, 0, 0, 9])),
        permanent_mac: None,
        master: Some(4),
        lower: Some(2),
        kind: Some("vlan".to_owned()),
    };
    assert_eq!(link(&body).unwrap(), expected);
}

#[test]
fn a_lower_link_of_another_namespace_means_nothing() {
    let body = message(vec![LinkAttribute::Link(2), LinkAttribute::LinkNetNsId(0)]);
    assert_eq!(link(&body).unwrap().lower, None);
    let veth = LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]);
    let body = message(vec![LinkAttribute::Link(2), veth]);
    assert_eq!(link(&body).unwrap().lower, None);
}

/// Header and payload of one message.
fn answer(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + payload.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend([0; 10]);
    bytes.extend(payload);
    bytes
}

#[test]
fn any_refusal_is_an_errno() {
    // include/uapi/linux/netlink.h
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    for (code, errno) in [(-19, 19), (i32::MIN, i32::MAX)] {
        for kind in [ERROR, DONE] {
            let payload = [&code.to_ne_bytes()[..], &[0; 16]].concat();
            let fault = Answers::default().take(&answer(kind, &payload));
            assert!(
                matches!(fault, Err(Fault::Errno(e)) if e == errno),
                "{kind} {code}"
            );
        }
    }
    let mut answers = Answers::default();
    let all = [answer(RTM_NEWLINK, b"body"), answer(DONE, &[0; 4])].concat();
    assert_eq!(answers.take(&all).unwrap(), Some(End::Complete));
    assert_eq!(answers.bodies, [b"body"]);
}

#[test]
fn a_cut_off_answer_is_an_error() {
    let whole = message(vec![LinkAttribute::IfName("enp1s0".to_owned())]);
    for length in [0, 7, LINK_HEADER - 1, LINK_HEADER + 6] {
        assert!(link(&whole[..length]).is_err(), "{length}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_end_in_an_answer(body in proptest::collection::vec(0_u8.., 0..256)) {
        let _ = (link(&body), vf(&body, 1), global_address(&body), default_route(&body));
    }
}
