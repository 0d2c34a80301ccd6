//! Ethernet frames as the switch sees them: what a frame is, and what a peer that
//! answers ARP and ICMP echo for some addresses would say to it, in the frame's own
//! VLAN. Pure: bytes in, bytes out.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const VLAN: u16 = 0x8100;
const ICMP: u8 = 1;

/// What the switch notes of each frame.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kind {
    /// Lower case with colons.
    pub source: String,
    pub destination: String,
    /// VLAN id of an 802.1Q tag, none if untagged.
    pub vlan: Option<u16>,
    /// 802.1p priority of that tag.
    pub priority: Option<u8>,
    /// After the tag.
    pub ether_type: u16,
}

/// A frame taken apart; borrows the bytes.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    pub(super) kind: Kind,
    source: [u8; 6],
    /// The four tag bytes, or nothing.
    tag: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// None for what is shorter than its headers.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let destination: [u8; 6] = bytes.get(0..6)?.try_into().ok()?;
        let source: [u8; 6] = bytes.get(6..12)?.try_into().ok()?;
        let (tag, at) = if be16(bytes, 12)? == VLAN {
            (bytes.get(12..16)?, 16)
        } else {
            (bytes.get(12..12)?, 12)
        };
        let control = be16(tag, 2);
        Some(Self {
            kind: Kind {
                source: mac(source),
                destination: mac(destination),
                vlan: control.map(|c| c & 0x0fff),
                priority: control.and_then(|c| u8::try_from(c >> 13).ok()),
                ether_type: be16(bytes, at)?,
            },
            source,
            tag,
            payload: bytes.get(at + 2..)?,
        })
    }

    /// The answer of a host with hardware address `me` that owns `addresses`, if it
    /// would give one.
    pub(super) fn answer(&self, me: [u8; 6], addresses: &[Ipv4Addr]) -> Option<Vec<u8>> {
        let body = match self.kind.ether_type {
            ARP => self.arp(me, addresses)?,
            IPV4 => self.echo(addresses)?,
            _ => return None,
        };
        let mut out = Vec::with_capacity(18 + body.len());
        out.extend_from_slice(&self.source);
        out.extend_from_slice(&me);
        out.extend_from_slice(self.tag);
        out.extend_from_slice(&self.kind.ether_type.to_be_bytes());
        out.extend_from_slice(&body);
        Some(out)
    }

    /// RFC 826: a request for one of our addresses is answered.
    fn arp(&self, me: [u8; 6], addresses: &[Ipv4Addr]) -> Option<Vec<u8>> {
        let p = self.payload;
        let wanted = ipv4(p, 24)?;
        if be16(p, 6)? != 1 || !addresses.contains(&wanted) {
            return None;
        }
        let mut out = p.get(0..6)?.to_vec();
        out.extend_from_slice(&2u16.to_be_bytes());
        out.extend_from_slice(&me);
        out.extend_from_slice(&wanted.octets());
        out.extend_from_slice(p.get(8..18)?);
        Some(out)
    }

    /// RFC 792: an echo request to one of our addresses is answered.
    fn echo(&self, addresses: &[Ipv4Addr]) -> Option<Vec<u8>> {
        let p = self.payload;
        let header = usize::from(p.first()? & 0x0f) * 4;
        let total = usize::from(be16(p, 2)?);
        let to = ipv4(p, 16)?;
        if *p.get(9)? != ICMP || *p.get(header)? != 8 || !addresses.contains(&to) {
            return None;
        }
        let mut out = p.get(0..header)?.to_vec();
        // Swapping the addresses leaves the header's checksum as it is.
        out.get_mut(12..16)?.copy_from_slice(&to.octets());
        out.get_mut(16..20)?.copy_from_slice(p.get(12..16)?);
        let mut icmp = p.get(header..total)?.to_vec();
        *icmp.first_mut()? = 0;
        icmp.get_mut(2..4)?.fill(0);
        let sum = checksum(&icmp);
        icmp.get_mut(2..4)?.copy_from_slice(&sum.to_be_bytes());
        out.extend_from_slice(&icmp);
        Some(out)
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ipv4(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets))
}

pub(super) fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|b| format!("{b:02x}")).join(":")
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        let high = pair.first().copied().unwrap_or(0);
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([high, low]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];

    fn frame(tag: Option<u16>, ether_type: u16, body: &[u8]) -> Vec<u8> {
        let mut f = vec![0xff; 6];
        f.extend(GUEST);
        if let Some(t) = tag {
            f.extend(VLAN.to_be_bytes());
            f.extend(t.to_be_bytes());
        }
        f.extend(ether_type.to_be_bytes());
        f.extend(body);
        f
    }

    fn arp_request(target: [u8; 4]) -> Vec<u8> {
        let mut p = vec![0, 1, 8, 0, 6, 4, 0, 1];
        p.extend(GUEST);
        p.extend([10, 9, 0, 50]);
        p.extend([0; 6]);
        p.extend(target);
        p
    }

    #[test]
    fn arp_is_answered_in_its_vlan_only_for_our_address() {
        let ours = [Ipv4Addr::new(10, 9, 0, 1)];
        let bytes = frame(Some(0x6064), ARP, &arp_request([10, 9, 0, 1]));
        let f = Frame::parse(&bytes).unwrap();
        assert_eq!(f.kind.source, "02:00:00:00:00:aa");
        assert_eq!((f.kind.vlan, f.kind.priority), (Some(100), Some(3)));
        assert_eq!(f.kind.ether_type, ARP);
        let answer = f.answer(ME, &ours).unwrap();
        let a = Frame::parse(&answer).unwrap();
        assert_eq!(a.kind.destination, "02:00:00:00:00:aa");
        assert_eq!(a.kind.vlan, Some(100));
        assert_eq!(a.payload[6..8], [0, 2]);
        assert_eq!(a.payload[8..14], ME);
        assert_eq!(a.payload[24..28], [10, 9, 0, 50]);
        let other = frame(None, ARP, &arp_request([10, 9, 0, 2]));
        assert!(Frame::parse(&other).unwrap().answer(ME, &ours).is_none());
    }

    #[test]
    fn echo_is_answered_with_a_right_checksum() {
        let mut p = vec![0x45, 0, 0, 31, 0, 1, 0, 0, 64, 1, 0, 0];
        p.extend([10, 9, 0, 50]);
        p.extend([10, 9, 0, 1]);
        p.extend([8, 0, 0, 0, 0, 7, 0, 9, b'a', b'b', b'c']);
        p.extend([0; 10]);
        let bytes = frame(None, IPV4, &p);
        let answer = Frame::parse(&bytes)
            .unwrap()
            .answer(ME, &[Ipv4Addr::new(10, 9, 0, 1)])
            .unwrap();
        let a = Frame::parse(&answer).unwrap();
        assert_eq!(a.payload[12..20], [10, 9, 0, 1, 10, 9, 0, 50]);
        let icmp = &a.payload[20..];
        assert_eq!(icmp.len(), 11, "padding is not echoed");
        assert_eq!(icmp[0], 0);
        assert_eq!(checksum(icmp), 0);
        assert_eq!(&icmp[8..], b"abc");
    }

    #[test]
    fn short_frames_are_nothing() {
        for n in 0..14 {
            assert!(Frame::parse(&vec![0; n]).is_none());
        }
        let bytes = frame(None, IPV4, &[0x45, 0]);
        assert!(Frame::parse(&bytes).unwrap().answer(ME, &[]).is_none());
    }
}
