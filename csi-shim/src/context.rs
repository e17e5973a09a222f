//! What ControllerPublishVolume tells the node that stages.
//!
//! Kept by the orchestrator as strings for as long as the volume is published, and read by other
//! versions of this driver: keys are added, never changed.

use std::collections::BTreeMap;
use std::fmt;

use ballast_api::v1::LeaseMode;

use crate::error::Refusal;

const VOLUME: &str = "volume";
const EPOCH: &str = "epoch";
const MODE: &str = "mode";
const READ_ONLY: &str = "readOnly";
const ADDRESSES: &str = "nbdAddresses";

/// Everything that a node needs to attach a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishContext {
    /// The volume's name.
    pub volume: String,
    /// The lease's fencing number.
    pub epoch: u64,
    /// The lease's mode.
    pub mode: LeaseMode,
    /// Whether the lease lets its holder write.
    pub read_only: bool,
    /// Where it is served, the best first. May be empty: then the node must know.
    pub addresses: Vec<Address>,
}

impl PublishContext {
    /// As the wire has it.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let addresses: Vec<String> = self.addresses.iter().map(Address::to_string).collect();
        let pairs = [
            (VOLUME, self.volume.clone()),
            (EPOCH, self.epoch.to_string()),
            (MODE, mode_name(self.mode).to_owned()),
            (READ_ONLY, self.read_only.to_string()),
            (ADDRESSES, addresses.join(",")),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// From what the orchestrator gives back.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for what is missing or can't be read.
    pub fn parse(map: &BTreeMap<String, String>) -> Result<PublishContext, Refusal> {
        let text = |key: &'static str| {
            map.get(key).map(String::as_str).ok_or_else(|| {
                Refusal::ContextInvalid(format!("{key} is missing: publish the volume first"))
            })
        };
        let wrong =
            |key: &str, value: &str| Refusal::ContextInvalid(format!("{key} can't be {value:?}"));
        let (epoch, mode, read_only) = (text(EPOCH)?, text(MODE)?, text(READ_ONLY)?);
        let addresses = map.get(ADDRESSES).map(String::as_str).unwrap_or_default();
        let volume = text(VOLUME)?;
        if !crate::names::is_label(volume) {
            return Err(wrong(VOLUME, volume));
        }
        Ok(PublishContext {
            volume: volume.to_owned(),
            epoch: epoch.parse().map_err(|_| wrong(EPOCH, epoch))?,
            mode: mode_named(mode).ok_or_else(|| wrong(MODE, mode))?,
            read_only: read_only.parse().map_err(|_| wrong(READ_ONLY, read_only))?,
            addresses: parse_addresses(addresses).map_err(|address| wrong(ADDRESSES, &address))?,
        })
    }

    /// The name of the NBD export: only under this lease does it open.
    pub fn export(&self) -> String {
        let read_only = if self.read_only { "ro," } else { "" };
        format!("{}@{read_only}lease={}", self.volume, self.epoch)
    }
}

/// Reads a list of addresses, separated by commas.
///
/// # Errors
/// The first that is none.
pub fn parse_addresses(text: &str) -> Result<Vec<Address>, String> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(|word| Address::parse(word).map_err(|()| word.to_owned())).collect()
}

/// A host and a port, as TCP is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(String);

impl Address {
    /// `HOST:PORT`.
    ///
    /// # Errors
    /// For anything else.
    #[allow(clippy::result_unit_err, reason = "the caller has the words for it")]
    pub fn parse(text: &str) -> Result<Address, ()> {
        let (host, port) = text.rsplit_once(':').ok_or(())?;
        let port: u16 = port.parse().map_err(|_| ())?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "[]:.-_%".contains(c);
        let valid = port != 0 && !host.is_empty() && host.chars().all(plain);
        if valid { Ok(Address(text.to_owned())) } else { Err(()) }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const MODES: [(LeaseMode, &str); 5] = [
    (LeaseMode::SingleNodeWriter, "single-node-writer"),
    (LeaseMode::SingleNodeMultiWriter, "single-node-multi-writer"),
    (LeaseMode::SingleNodePublisher, "single-node-publisher"),
    (LeaseMode::Readers, "readers"),
    (LeaseMode::Writers, "writers"),
];

fn mode_name(mode: LeaseMode) -> &'static str {
    MODES.iter().find(|(it, _)| *it == mode).map_or("unspecified", |(_, name)| name)
}

fn mode_named(text: &str) -> Option<LeaseMode> {
    MODES.iter().find(|(_, name)| *name == text).map(|(mode, _)| *mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_survives_the_orchestrator() {
        for (mode, _) in MODES {
            let context = PublishContext {
                volume: "db-0".to_owned(),
                epoch: 7,
                mode,
                read_only: mode == LeaseMode::Readers,
                addresses: parse_addresses("127.0.0.1:10809,[::1]:10810").unwrap(),
            };
            assert_eq!(PublishContext::parse(&context.to_map()).unwrap(), context);
        }
    }

    #[test]
    fn the_export_names_the_lease() {
        let mut context = PublishContext {
            volume: "db-0".to_owned(),
            epoch: 7,
            mode: LeaseMode::SingleNodeWriter,
            read_only: false,
            addresses: Vec::new(),
        };
        assert_eq!(context.export(), "db-0@lease=7");
        context.read_only = true;
        assert_eq!(context.export(), "db-0@ro,lease=7");
    }

    #[test]
    fn a_damaged_context_is_refused() {
        let good = PublishContext {
            volume: "db-0".to_owned(),
            epoch: 7,
            mode: LeaseMode::Readers,
            read_only: true,
            addresses: Vec::new(),
        }
        .to_map();
        for (key, value) in [
            (VOLUME, "../x"),
            (EPOCH, "x"),
            (MODE, "all"),
            (READ_ONLY, "yes"),
            (ADDRESSES, "nowhere"),
            (ADDRESSES, "a b:1"),
        ] {
            let mut map = good.clone();
            map.insert(key.to_owned(), value.to_owned());
            assert!(PublishContext::parse(&map).is_err(), "{key}={value}");
        }
        assert!(PublishContext::parse(&BTreeMap::new()).is_err());
    }
}
