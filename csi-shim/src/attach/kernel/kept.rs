//! What is kept of a device's connections for a later life of the process: a file per volume.

use std::path::Path;

use crate::context::{Address, parse_addresses};
use crate::host::{HostError, files};

/// Three lines of text; what an earlier version of the driver wrote has no third.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Where the volume is served.
    pub(super) addresses: Vec<Address>,
    /// The near ends of its connections.
    pub(super) locals: Vec<String>,
    /// The server that they lead to, if that is known.
    pub(super) server: Option<Address>,
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
        format!("{}\n{}\n{server}\n", addresses.join(","), self.locals.join(","))
    }

    fn parse(text: &str) -> Kept {
        let mut lines = text.lines();
        let mut line = || lines.next().unwrap_or_default();
        let addresses = parse_addresses(line()).unwrap_or_default();
        let locals = line().split(',').filter(|local| !local.is_empty());
        let locals = locals.map(str::to_owned).collect();
        let server = parse_addresses(line()).ok().and_then(|mut server| server.pop());
        Kept { addresses, locals, server }
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
        let kept = Kept { addresses, locals, server };
        assert_eq!(Kept::parse(&kept.text()), kept);
        let (earlier, _) =
            kept.text().trim_end().rsplit_once('\n').map(|(a, b)| (a.to_owned(), b.len())).unwrap();
        assert_eq!(Kept::parse(&earlier), Kept { server: None, ..kept });
        assert_eq!(Kept::parse(""), Kept::default());
    }
}
