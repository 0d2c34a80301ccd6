//! devlink, as far as the mode of a card's eswitch: generic netlink, which the packet library
//! does not have. Writes requests and reads answers; no I/O.

use common::pci::PciAddress;
use netlink_packet_core::{DecodeError, NLM_F_ACK, NLM_F_REQUEST};

use super::parse::attributes;
use crate::kernel::Eswitch;

// include/uapi/linux/genetlink.h
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// `struct genlmsghdr`: command, version, two bytes of nothing.
const GENERIC_HEADER: usize = 4;
// include/uapi/linux/devlink.h
const FAMILY: &str = "devlink";
const DEVLINK_CMD_ESWITCH_GET: u8 = 29;
const DEVLINK_ATTR_BUS_NAME: u16 = 1;
const DEVLINK_ATTR_DEV_NAME: u16 = 2;
const DEVLINK_ATTR_ESWITCH_MODE: u16 = 25;
const DEVLINK_ESWITCH_MODE_LEGACY: u16 = 0;

/// Asks for the number of the family devlink.
pub(super) fn get_family() -> Vec<u8> {
    let name = [(CTRL_ATTR_FAMILY_NAME, FAMILY)];
    request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name)
}

/// Asks for the eswitch of a function. Needs CAP_NET_ADMIN.
pub(super) fn get_eswitch(family: u16, pf: PciAddress) -> Vec<u8> {
    let address = pf.to_string();
    let device = [
        (DEVLINK_ATTR_BUS_NAME, "pci"),
        (DEVLINK_ATTR_DEV_NAME, &address),
    ];
    request(family, DEVLINK_CMD_ESWITCH_GET, &device)
}

/// The number in the answer to [`get_family`].
pub(super) fn family(body: &[u8]) -> Result<u16, DecodeError> {
    let number = short(body, CTRL_ATTR_FAMILY_ID)?;
    number.ok_or_else(|| DecodeError::from("no number of the family".to_owned()))
}

/// The mode in the answer to [`get_eswitch`]. Every mode but legacy forwards by rules.
pub(super) fn eswitch(body: &[u8]) -> Result<Option<Eswitch>, DecodeError> {
    let mode = short(body, DEVLINK_ATTR_ESWITCH_MODE)?;
    Ok(mode.map(|mode| match mode {
        DEVLINK_ESWITCH_MODE_LEGACY => Eswitch::Legacy,
        _ => Eswitch::Switchdev,
    }))
}

fn short(body: &[u8], kind: u16) -> Result<Option<u16>, DecodeError> {
    for attribute in attributes(body, GENERIC_HEADER)? {
        if attribute.kind() == kind {
            let value = attribute.value();
            let two = <[u8; 2]>::try_from(value)
                .map_err(|_| DecodeError::buffer_too_small(value.len(), 2))?;
            return Ok(Some(u16::from_ne_bytes(two)));
        }
    }
    Ok(None)
}

/// `struct nlmsghdr`, `struct genlmsghdr`, then strings as attributes.
fn request(family: u16, command: u8, strings: &[(u16, &str)]) -> Vec<u8> {
    let mut attributes = Vec::new();
    for (kind, text) in strings {
        let value = [text.as_bytes(), b"\0"].concat();
        // Names of buses and devices: a few bytes.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        attributes.extend(length.to_ne_bytes());
        attributes.extend(kind.to_ne_bytes());
        attributes.extend(value);
        attributes.resize(attributes.len().next_multiple_of(4), 0);
    }
    let length = 16 + GENERIC_HEADER + attributes.len();
    let mut bytes = u32::try_from(length)
        .unwrap_or(u32::MAX)
        .to_ne_bytes()
        .to_vec();
    bytes.extend(family.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    // Sequence number 1, to the kernel.
    bytes.extend(1_u32.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_the_function() {
        let asked = get_eswitch(21, "0000:03:00.1".parse().unwrap());
        let length = u32::from_ne_bytes(asked[..4].try_into().unwrap());
        assert_eq!(length as usize, asked.len());
        assert_eq!(asked[4..6], 21_u16.to_ne_bytes());
        assert_eq!(asked[16..20], [29, 1, 0, 0]);
        let found = attributes(&asked[16..], GENERIC_HEADER).unwrap();
        let texts: Vec<(u16, &[u8])> = found.iter().map(|a| (a.kind(), a.value())).collect();
        assert_eq!(texts, [(1, &b"pci\0"[..]), (2, b"0000:03:00.1\0")]);
    }

    fn answer(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut body = vec![29, 1, 0, 0];
        body.extend(u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
        body
    }

    #[test]
    fn every_mode_but_legacy_is_switchdev() {
        for (mode, expected) in [
            (0_u16, Eswitch::Legacy),
            (1, Eswitch::Switchdev),
            (2, Eswitch::Switchdev),
        ] {
            let body = answer(DEVLINK_ATTR_ESWITCH_MODE, &mode.to_ne_bytes());
            assert_eq!(eswitch(&body).unwrap(), Some(expected));
        }
        assert_eq!(eswitch(&answer(26, &[0])).unwrap(), None);
        let body = answer(CTRL_ATTR_FAMILY_ID, &21_u16.to_ne_bytes());
        assert_eq!(family(&body).unwrap(), 21);
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        assert!(eswitch(&[29, 1]).is_err());
        assert!(eswitch(&answer(DEVLINK_ATTR_ESWITCH_MODE, &[1])).is_err());
        assert!(family(&answer(26, &[0])).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(body in proptest::collection::vec(0_u8.., 0..64)) {
            let _ = (family(&body), eswitch(&body));
        }
    }
}
