//! What is kept of a device's connections for a later life of the process: a file per volume.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;

use super::locked;
use crate::context::{Address, parse_addresses};
use crate::host::{HostError, files};
use crate::names::is_volume_id;

/// Four lines of text; what an earlier version of the driver wrote has two or three.
///
/// Written before the kernel is told, so that whatever it has was kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Where the volume is served.
    pub(super) addresses: Vec<Address>,
    /// The ends of its connections, and of those that it may have.
    pub(super) ends: Vec<Ends>,
    /// The server that they lead to, if that is known.
    pub(super) server: Option<Address>,
    /// The device, if it was given up (`given_up`), and since which boot of the host it has this number.
    pub(super) given_up: Option<(u32, String)>,
}

/// The near end of a connection and, but for what an earlier version of the driver wrote, its far end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) near: String,
    pub(super) far: Option<String>,
}

impl Ends {
    fn text(&self) -> String {
        let far = self.far.iter().map(|far| format!(">{far}"));
        far.fold(self.near.clone(), |text, far| text + &far)
    }

    fn parse(text: &str) -> Ends {
        match text.split_once('>') {
            Some((near, far)) => Ends { near: near.to_owned(), far: Some(far.to_owned()) },
            None => Ends { near: text.to_owned(), far: None },
        }
    }
}

/// Where it is kept.
pub(super) struct Keeper {
    folder: PathBuf,
    /// Volumes whose devices are being taken away: what is still done for them keeps nothing more.
    ended: Mutex<BTreeSet<String>>,
}

impl Keeper {
    /// Below this folder, which is there.
    pub(super) fn new(folder: PathBuf) -> Keeper {
        Keeper { folder, ended: Mutex::default() }
    }

    /// The ids of the volumes of which something is kept.
    pub(super) fn volumes(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| is_volume_id(name)).collect()
    }

    /// Nothing, where nothing is kept.
    pub(super) fn read(&self, volume_id: &str) -> Kept {
        let path = self.folder.join(volume_id);
        Kept::parse(&std::fs::read_to_string(path).unwrap_or_default())
    }

    /// Of a device that is about to be made.
    ///
    /// # Errors
    /// When the file can't be written.
    pub(super) fn begin(&self, volume_id: &str, kept: &Kept) -> Result<(), HostError> {
        locked(&self.ended).remove(volume_id);
        self.write(volume_id, kept)
    }

    /// Of a device that is there.
    ///
    /// # Errors
    /// When it is being taken away, or the file can't be written.
    pub(super) fn write(&self, volume_id: &str, kept: &Kept) -> Result<(), HostError> {
        let ended = locked(&self.ended);
        if ended.contains(volume_id) {
            let what = format!("the device of volume {volume_id} is being taken away");
            return Err(HostError::Unexpected(what));
        }
        files::write_atomically(&self.folder.join(volume_id), kept.text().as_bytes())
    }

    /// From now on nothing is kept of this volume's device.
    pub(super) fn end(&self, volume_id: &str) {
        locked(&self.ended).insert(volume_id.to_owned());
    }

    /// Whether that is so.
    pub(super) fn has_ended(&self, volume_id: &str) -> bool {
        locked(&self.ended).contains(volume_id)
    }

    /// Forgets a device that is gone.
    ///
    /// # Errors
    /// When the file can't be removed.
    pub(super) fn remove(&self, volume_id: &str) -> Result<(), HostError> {
        files::remove(&self.folder.join(volume_id))?;
        locked(&self.ended).remove(volume_id);
        Ok(())
    }
}

impl Kept {
    fn text(&self) -> String {
        let addresses: Vec<&str> = self.addresses.iter().map(Address::as_str).collect();
        let server = self.server.as_ref().map_or("", Address::as_str);
        let ends: Vec<String> = self.ends.iter().map(Ends::text).collect();
        let given_up = self.given_up.as_ref().map(|(index, boot)| format!("{index} {boot}"));
        let given_up = given_up.unwrap_or_default();
        format!("{}\n{}\n{server}\n{given_up}\n", addresses.join(","), ends.join(","))
    }

    fn parse(text: &str) -> Kept {
        let mut lines = text.lines();
        let mut line = || lines.next().unwrap_or_default();
        let addresses = parse_addresses(line()).unwrap_or_default();
        let ends = line().split(',').filter(|ends| !ends.is_empty()).map(Ends::parse).collect();
        let server = parse_addresses(line()).ok().and_then(|mut server| server.pop());
        let given_up = line().split_once(' ');
        let given_up = given_up.and_then(|(index, boot)| Some((index.parse().ok()?, boot.into())));
        Kept { addresses, ends, server, given_up }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_back_also_from_an_earlier_version() {
        let addresses = parse_addresses("10.0.0.1:10809,10.0.0.2:10809").unwrap();
        let ends = vec![Ends::parse("10.0.0.9:4000>10.0.0.2:10809"), Ends::parse("[fd00::9]:4001")];
        assert_eq!(ends[0].far.as_deref(), Some("10.0.0.2:10809"));
        let server = addresses.last().cloned();
        let given_up = Some((7, "a boot".to_owned()));
        let kept = Kept { addresses, ends, server, given_up };
        assert_eq!(Kept::parse(&kept.text()), kept);
        let none = Kept { given_up: None, ..kept.clone() };
        assert_eq!(Kept::parse(&none.text()), none);
        let earlier = |lines| kept.text().lines().take(lines).collect::<Vec<&str>>().join("\n");
        assert_eq!(Kept::parse(&earlier(3)), none);
        assert_eq!(Kept::parse(&earlier(2)), Kept { server: None, ..none });
        assert_eq!(Kept::parse(""), Kept::default());
    }
}
