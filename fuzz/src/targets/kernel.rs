//! What the kernel says: rtnetlink's datagrams and bodies, uevents, configuration spaces (which
//! are the card's words), and sysfs's choices.

use common::api::{LinkState, VlanProtocol};
use host_provisioner::kernel::fuzzing::{
    Answers, Fault, NetUse, changed_links, chosen, default_route, function_of, global_address,
    host_use, link, links_of, num_vfs, serial_number, vf,
};
use host_provisioner::kernel::{Change, MacAddr, TxRate, VfConfig, VlanTag};

use super::Bytes;

const IFLA_IFNAME: u16 = 3;
const IFLA_VFINFO_LIST: u16 = 22;

pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let kind = bytes.byte();
    let rest = bytes.0;
    match kind % 6 {
        0 => datagram(rest),
        1 => body(rest),
        2 => uevent(rest),
        3 => configuration(rest),
        4 => vfs(Bytes(rest)),
        _ => {
            if let Some(word) = chosen(&String::from_utf8_lossy(rest)) {
                assert!(!word.contains(']'), "{word}");
            }
        }
    }
}

fn datagram(data: &[u8]) {
    match changed_links(data) {
        Ok(names) => assert_eq!(links_of(data).len(), names.len()),
        Err(_) => assert_eq!(links_of(data), [Change::Anything]),
    }
    let mut answers = Answers::default();
    // A second datagram goes on where the first ended.
    let (first, second) = data.split_at(data.len() / 2 / 4 * 4);
    for part in [first, second, data] {
        match answers.take(part) {
            Ok(None) => {}
            Ok(Some(_)) | Err(Fault::Malformed(_)) => break,
            Err(Fault::Errno(errno)) => {
                assert!(errno != 0, "a refusal without an errno");
                break;
            }
        }
    }
}

fn body(data: &[u8]) {
    let mut usage = NetUse::default();
    if let Ok(link) = link(data) {
        assert!(!link.name.contains('\0'));
        usage.links.push(link);
    }
    if let Ok(Some(address)) = global_address(data) {
        usage.addresses.push(address);
    }
    usage.default_routes = default_route(data).unwrap_or_default();
    for link in &usage.links {
        let own = usage.default_routes.contains(&link.index) || link.master.is_some();
        let why = host_use(&usage, &link.name);
        assert!(!own || why.is_some(), "{link:?} is the host's");
    }
    for index in 0..2 {
        drop(vf(data, index));
    }
}

fn uevent(data: &[u8]) {
    if let Some(change) = function_of(data) {
        let Change::Function(address) = change else {
            panic!("a uevent is about a function, not {change:?}");
        };
        let text = String::from_utf8_lossy(data).to_ascii_lowercase();
        assert!(text.contains(&address.to_string()), "{address}");
    }
}

fn configuration(data: &[u8]) {
    // The first 256 bytes are the conventional space, which nobody reads here.
    let space: Vec<u8> = std::iter::repeat_n(0, 256)
        .chain(data.iter().copied())
        .collect();
    for config in [data, &space] {
        if let Some(serial) = serial_number(config) {
            assert_eq!(serial.len(), 16);
            assert!(serial.bytes().any(|b| b != b'0') && serial.bytes().any(|b| b != b'f'));
        }
        assert!(num_vfs(config).is_none() || config.len() > 256);
    }
}

/// A link's body as the kernel writes it, with VFs as the input says: each is read back.
fn vfs(mut bytes: Bytes<'_>) {
    let [count, strange] = bytes.take();
    let mut list = Vec::new();
    let mut expected = Vec::new();
    for index in 0..u32::from(count % 9) {
        let mac: [u8; 6] = bytes.take();
        let id = u16::from_le_bytes(bytes.take()) % 4096;
        let [qos, on, known] = bytes.take();
        let mut padded = [0; 32];
        padded.iter_mut().zip(mac).for_each(|(to, from)| *to = from);
        let mut info = Vec::new();
        attribute(&mut info, 1, &[&index.to_ne_bytes()[..], &padded].concat());
        let words = |values: &[u32]| {
            values
                .iter()
                .flat_map(|v| v.to_ne_bytes())
                .collect::<Vec<_>>()
        };
        let (qos, on) = (qos % 8, on & 1 == 1);
        attribute(&mut info, 2, &words(&[index, id.into(), qos.into()]));
        attribute(&mut info, 4, &words(&[index, on.into()]));
        if known & 1 == 1 {
            // An attribute of a kernel that is newer than the packet library.
            attribute(&mut info, 900, &padded);
        }
        attribute(&mut info, 9, &words(&[index, (!on).into()]));
        // Link state, rates and the VLAN once more with its protocol, big endian.
        let state = u32::from(known >> 1) % 3;
        attribute(&mut info, 5, &words(&[index, state]));
        let rate = TxRate {
            min: qos.into(),
            max: id.into(),
        };
        attribute(&mut info, 6, &words(&[index, rate.min, rate.max]));
        let (kind, protocol) = match strange & 2 {
            0 => (0x8100_u16, VlanProtocol::Ieee8021Q),
            _ => (0x88a8, VlanProtocol::Ieee8021Ad),
        };
        let mut tag = words(&[index, id.into(), qos.into()]);
        tag.extend(kind.to_be_bytes());
        tag.extend([0; 2]);
        let mut tags = Vec::new();
        attribute(&mut tags, 1, &tag);
        attribute(&mut info, 12, &tags);
        attribute(&mut list, 1, &info);
        expected.push(VfConfig {
            mac: MacAddr(mac),
            vlan: Some(VlanTag { id, qos, protocol }).filter(|tag| tag.id != 0 || tag.qos != 0),
            spoof_check: on,
            trust: !on,
            link_state: match state {
                0 => LinkState::Auto,
                1 => LinkState::Enable,
                _ => LinkState::Disable,
            },
            rate,
            ..VfConfig::CLEAN
        });
    }
    let mut body = vec![0; 16];
    if strange & 1 == 1 {
        attribute(&mut body, 0x1234, bytes.0);
    }
    attribute(&mut body, IFLA_IFNAME, b"enp1s0\0");
    attribute(&mut body, IFLA_VFINFO_LIST, &list);
    assert_eq!(link(&body).expect("a link").name, "enp1s0");
    for (index, expected) in expected.iter().enumerate() {
        let index = u16::try_from(index).expect("few VFs");
        assert_eq!(vf(&body, index).expect("a list of VFs"), Some(*expected));
    }
    assert_eq!(vf(&body, 9).expect("a list of VFs"), None);
}

/// `struct nlattr`: length and type, the value, zeros up to 4 bytes.
fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let value = value.get(..60_000).unwrap_or(value);
    let length = u16::try_from(value.len() + 4).expect("short");
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}
