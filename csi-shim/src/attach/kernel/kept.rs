//! What is kept of a device's connections for a later life of the process: a file per volume.

use std::path::Path;

use crate::context::{Address, parse_addresses};
use crate::host::{HostError, files};

/// Four lines of text; what an earlier version of the driver wrote has two or three.
///
/// Written before the kernel is told, so that whatever it has was kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Where the volume is served.
    pub(super) addresses: Vec<Address>,
    /// The near ends of its connections, and of those that it may have.
    pub(super) locals: Vec<String>,
    /// The server that they lead to, if that is known.
    pub(super) server: Option<Address>,
    /// The device, if it was given up (`pins`).
    pub(super) given_up: Option<u32>,
}

impl Kept {
    /// Nothing, where nothing is kept.
    pub(super) fn read(folder: &Path, volume_id: &str) -> Kept {
        Kept::parse(&std::fs::read_to_string(folder.join(volume_id)).unwrap_or_default())
    }

    /// # Errors
    /// When the file can't be written.
    pub(super) fn write(&self, folder: &Path, volume_id: &str) -> Result<(), HostError> {
        files::write_atomically(&folder.join(volume_id), self.text().as_bytes())
    }

    fn text(&self) -> String {
        let addresses: Vec<&str> = self.addresses.iter().map(Address::as_str).collect();
        let server = self.server.as_ref().map_or("", Address::as_str);
        let given_up = self.given_up.map(|index| index.to_string()).unwrap_or_default();
        format!("{}\n{}\n{server}\n{given_up}\n", addresses.join(","), self.locals.join(","))
    }

    fn parse(text: &str) -> Kept {
        let mut lines = text.lines();
        let mut line = || lines.next().unwrap_or_default();
        let addresses = parse_addresses(line()).unwrap_or_default();
        let locals = line().split(',').filter(|local| !local.is_empty());
        let locals = locals.map(str::to_owned).collect();
        let server = parse_addresses(line()).ok().and_then(|mut server| server.pop());
        let given_up = line().parse().ok();
        Kept { addresses, locals, server, given_up }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_back_also_from_an_earlier_version() {
        let addresses = parse_addresses("10.0.0.1:10809,10.0.0.2:10809").unwrap();
        let locals = vec!["10.0.0.9:4000".to_owned(), "10.0.0.9:4001".to_owned()];
        let server = addresses.last().cloned();
        let kept = Kept { addresses, locals, server, given_up: Some(7) };
        assert_eq!(Kept::parse(&kept.text()), kept);
        let none = Kept { given_up: None, ..kept.clone() };
        assert_eq!(Kept::parse(&none.text()), none);
        let earlier = |lines| kept.text().lines().take(lines).collect::<Vec<&str>>().join("\n");
        assert_eq!(Kept::parse(&earlier(3)), none);
        assert_eq!(Kept::parse(&earlier(2)), Kept { server: None, ..none });
        assert_eq!(Kept::parse(""), Kept::default());
    }
}
