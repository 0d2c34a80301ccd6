//! PCI addresses and ids as range-checked values. No I/O.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Why a text is no PCI name or number.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PciError {
    #[error(
        "{0:?} is not a PCI address; it has the form dddd:bb:ss.f, hexadecimal, slot at most 1f, function at most 7"
    )]
    Address(String),
    #[error("{0:?} is not a PCI id; it has four hexadecimal digits, with or without 0x")]
    Id(String),
}

/// Where a function sits: domain, bus, slot, function, as in `0000:03:10.1`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u16,
    bus: u8,
    slot: u8,
    function: u8,
}

impl PciAddress {
    /// An address from its parts; `None` when the slot or the function is out of range.
    #[must_use]
    pub const fn new(domain: u16, bus: u8, slot: u8, function: u8) -> Option<Self> {
        if slot > 0x1f || function > 7 {
            return None;
        }
        Some(Self {
            domain,
            bus,
            slot,
            function,
        })
    }

    #[must_use]
    pub const fn domain(self) -> u16 {
        self.domain
    }
    #[must_use]
    pub const fn bus(self) -> u8 {
        self.bus
    }
    #[must_use]
    pub const fn slot(self) -> u8 {
        self.slot
    }
    #[must_use]
    pub const fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.slot, self.function
        )
    }
}

impl fmt::Debug for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn hex(text: &str, digits: usize) -> Option<u16> {
    (text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u16::from_str_radix(text, 16).ok())
        .flatten()
}

impl FromStr for PciAddress {
    type Err = PciError;

    fn from_str(text: &str) -> Result<Self, PciError> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (slot, function) = rest.split_once('.')?;
            Self::new(
                hex(domain, 4)?,
                u8::try_from(hex(bus, 2)?).ok()?,
                u8::try_from(hex(slot, 2)?).ok()?,
                u8::try_from(hex(function, 1)?).ok()?,
            )
        };
        parse().ok_or_else(|| PciError::Address(text.to_owned()))
    }
}

/// A vendor or device id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciId(pub u16);

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

impl fmt::Debug for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PciId {
    type Err = PciError;

    fn from_str(text: &str) -> Result<Self, PciError> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        hex(digits, 4)
            .map(Self)
            .ok_or_else(|| PciError::Id(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_it_was_written() {
        for text in ["0000:03:00.0", "0001:ff:1f.7", "0000:00:10.1"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "03:00.0",
            "0000:03:20.0",
            "0000:03:00.8",
            "0000:3:00.0",
            "0000:03:00.0\n",
            "00000:03:00.0",
            "0000:+3:00.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_id_is_four_hex_digits() {
        assert_eq!("0x8086".parse::<PciId>(), Ok(PciId(0x8086)));
        assert_eq!(
            "10ca".parse::<PciId>().map(|id| id.to_string()),
            Ok("10ca".to_owned())
        );
        assert!("0x808".parse::<PciId>().is_err());
    }
}
