//! The fixed newstyle handshake: options until the client has chosen an export.
//!
//! Owns what is negotiated. Never knows which exports exist: it asks, and goes on with the answer.
//! TLS and extended headers are not supported and refused as the protocol says.

use ballast_block::BLOCK_SIZE;
use ballast_block::limits::{
    NBD_META_QUERIES_MAX, NBD_OPTION_BYTES_MAX, NBD_OPTION_SKIP_BYTES_MAX, NBD_OPTIONS_MAX,
    TRANSFER_BYTES_MAX,
};
use bytes::{BufMut, BytesMut};

use crate::error::SessionError;
use crate::export::{
    ExportInfo, ExportName, ListExportsError, OpenExport, OpenExportError, Purpose,
};
use crate::input::Input;
use crate::io_command::Negotiated;
use crate::reply::{ReplyQueue, clipped};
use crate::wire::{
    self, ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, Fields, OptionHeader, handshake_flag, info,
    option, option_reply, transmission_flag,
};

/// Smallest block announced, in bytes: what kernels address. Any offset and length is served.
const BLOCK_BYTES_MIN: u32 = 512;

/// The server's side of the handshake of one connection.
#[derive(Debug)]
pub(crate) struct Handshake {
    state: State,
    /// The client does without the padding after `NBD_OPT_EXPORT_NAME`.
    no_zeroes: bool,
    structured: bool,
    /// The export name for which `base:allocation` was selected.
    allocation_for: Option<Vec<u8>>,
    options: usize,
}

/// What comes next from the client, or whose answer is waited for.
#[derive(Debug)]
enum State {
    ClientFlags,
    Header,
    Data(OptionHeader),
    /// Data too big to look at; then the option is refused.
    Skip {
        option: u32,
        left: usize,
    },
    /// The caller lists exports.
    Listing,
    /// The caller opens or describes an export.
    Opening(Opening),
}

#[derive(Debug)]
struct Opening {
    option: u32,
    /// As the client sent it.
    name: Vec<u8>,
    wants_name: bool,
    wants_description: bool,
}

/// What a handshake needs from others to go on.
#[derive(Debug)]
pub(crate) enum Question {
    List,
    Open(OpenExport),
    /// The client gives up: it was told so, close.
    Abort,
}

impl Handshake {
    pub(crate) fn new(out: &mut ReplyQueue) -> Self {
        out.put(wire::put_greeting);
        Self {
            state: State::ClientFlags,
            no_zeroes: false,
            structured: false,
            allocation_for: None,
            options: 0,
        }
    }

    /// Whether more bytes from the client are of use now.
    pub(crate) fn wants_input(&self) -> bool {
        !matches!(self.state, State::Listing | State::Opening(_))
    }

    /// Whether the caller is asked to open an export, and has not answered.
    pub(crate) fn is_opening(&self) -> bool {
        matches!(self.state, State::Opening(_))
    }

    /// Takes one message of the client; `Ok(None)` and nothing taken: more bytes or an answer is
    /// needed.
    pub(crate) fn step(
        &mut self,
        input: &mut Input,
        out: &mut ReplyQueue,
        shutting_down: bool,
    ) -> Result<Step, SessionError> {
        match self.state {
            State::ClientFlags => {
                let Some(bytes) = input.take::<{ wire::CLIENT_FLAGS_BYTES }>() else {
                    return Ok(Step::Starved);
                };
                self.client_flags(u32::from_be_bytes(bytes))?;
            }
            State::Header => {
                let Some(bytes) = input.take::<{ wire::OPTION_HEADER_BYTES }>() else {
                    return Ok(Step::Starved);
                };
                self.header(&bytes)?;
            }
            State::Data(header) => {
                let Some(data) = input.take_slice(header.length as usize) else {
                    return Ok(Step::Starved);
                };
                self.state = State::Header;
                if shutting_down && header.option != option::ABORT {
                    return self.refuse_for_shutdown(header.option, out);
                }
                return self.option(header.option, data, out);
            }
            State::Skip { option, ref mut left } => {
                *left -= input.skip(*left);
                if *left > 0 {
                    return Ok(Step::Starved);
                }
                self.state = State::Header;
                let message = format!("option data is over {NBD_OPTION_BYTES_MAX} bytes");
                refuse(out, option, option_reply::ERR_TOO_BIG, &message);
            }
            State::Listing | State::Opening(_) => return Ok(Step::Starved),
        }
        Ok(Step::Taken)
    }

    fn client_flags(&mut self, flags: u32) -> Result<(), SessionError> {
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return Err(SessionError::UnknownClientFlags { flags });
        }
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Header;
        Ok(())
    }

    fn header(&mut self, bytes: &[u8; wire::OPTION_HEADER_BYTES]) -> Result<(), SessionError> {
        let header =
            OptionHeader::decode(bytes).map_err(|found| SessionError::BadOptionMagic { found })?;
        self.options += 1;
        if self.options > NBD_OPTIONS_MAX {
            return Err(SessionError::TooManyOptions);
        }
        let OptionHeader { option, length } = header;
        let left = length as usize;
        let refusable = option != option::EXPORT_NAME && left <= NBD_OPTION_SKIP_BYTES_MAX;
        self.state = match left {
            _ if left <= NBD_OPTION_BYTES_MAX => State::Data(header),
            _ if refusable => State::Skip { option, left },
            _ => return Err(SessionError::OptionTooLarge { option, length }),
        };
        Ok(())
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut ReplyQueue,
    ) -> Result<Step, SessionError> {
        match option {
            option::EXPORT_NAME => {
                let name = ExportName::parse(data).map_err(SessionError::ExportNameInvalid)?;
                return Ok(self.open(option, name, data, &[]));
            }
            option::ABORT => {
                acknowledge(out, option);
                return Ok(Step::Ask(Question::Abort));
            }
            option::LIST if data.is_empty() => {
                self.state = State::Listing;
                return Ok(Step::Ask(Question::List));
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                acknowledge(out, option);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                refuse(out, option, option_reply::ERR_INVALID, "option takes no data");
            }
            option::INFO | option::GO => return Ok(self.info_or_go(option, data, out)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, out);
            }
            option::STARTTLS => {
                let message = "this server has no TLS for NBD; protect the network instead";
                refuse(out, option, option_reply::ERR_UNSUP, message);
            }
            option::EXTENDED_HEADERS => {
                let message = "extended headers are not supported; use structured replies";
                refuse(out, option, option_reply::ERR_UNSUP, message);
            }
            _ => refuse(out, option, option_reply::ERR_UNSUP, "option is not known"),
        }
        Ok(Step::Taken)
    }

    fn info_or_go(&mut self, option: u32, data: &[u8], out: &mut ReplyQueue) -> Step {
        let Some((name, infos)) = decode_info(data) else {
            let message = "option data is not a name and a list of information types";
            refuse(out, option, option_reply::ERR_INVALID, message);
            return Step::Taken;
        };
        match ExportName::parse(name) {
            Ok(parsed) => self.open(option, parsed, name, &infos),
            Err(error) => {
                refuse(out, option, option_reply::ERR_INVALID, &error.to_string());
                Step::Taken
            }
        }
    }

    fn open(&mut self, option: u32, name: ExportName, raw: &[u8], infos: &[u16]) -> Step {
        self.state = State::Opening(Opening {
            option,
            name: raw.to_vec(),
            wants_name: infos.contains(&info::NAME),
            wants_description: infos.contains(&info::DESCRIPTION),
        });
        let purpose = if option == option::INFO { Purpose::Describe } else { Purpose::Attach };
        Step::Ask(Question::Open(OpenExport { name, purpose }))
    }

    /// Every export has the one context, so the name is only remembered.
    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut ReplyQueue) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.allocation_for = None;
        }
        let queries = match MetaQueries::decode(data) {
            _ if !self.structured => Err((
                option_reply::ERR_INVALID,
                "metadata contexts need structured replies; negotiate them first",
            )),
            decoded => decoded,
        };
        match queries {
            Err((reply, message)) => return refuse(out, option, reply, message),
            Ok(queries) if queries.select_allocation(set) => {
                put_context(out, option, if set { ALLOCATION_CONTEXT_ID } else { 0 });
                if set {
                    self.allocation_for = Some(queries.name.to_vec());
                }
            }
            Ok(_) => {}
        }
        acknowledge(out, option);
    }

    fn refuse_for_shutdown(
        &mut self,
        option: u32,
        out: &mut ReplyQueue,
    ) -> Result<Step, SessionError> {
        if option == option::EXPORT_NAME {
            return Err(SessionError::ExportRefused(OpenExportError::ShuttingDown));
        }
        let message = OpenExportError::ShuttingDown.to_string();
        refuse(out, option, option_reply::ERR_SHUTDOWN, &message);
        Ok(Step::Taken)
    }

    /// The caller's answer to [`Question::List`].
    pub(crate) fn listed(
        &mut self,
        exports: Result<Vec<String>, ListExportsError>,
        out: &mut ReplyQueue,
    ) {
        assert!(matches!(self.state, State::Listing), "exports were listed unasked");
        self.state = State::Header;
        match exports {
            Ok(names) => {
                for name in names {
                    out.put(|out| {
                        let length = 4 + name.len();
                        wire::put_option_reply(out, option::LIST, option_reply::SERVER, length);
                        put_string(out, &name);
                    });
                }
                acknowledge(out, option::LIST);
            }
            Err(error) => {
                let reply = match error {
                    ListExportsError::Forbidden => option_reply::ERR_POLICY,
                    ListExportsError::ShuttingDown => option_reply::ERR_SHUTDOWN,
                };
                refuse(out, option::LIST, reply, &error.to_string());
            }
        }
    }

    /// The caller's answer to [`Question::Open`]; what was negotiated when that ends the handshake.
    pub(crate) fn opened(
        &mut self,
        export: Result<ExportInfo, OpenExportError>,
        out: &mut ReplyQueue,
    ) -> Result<Option<Negotiated>, SessionError> {
        let State::Opening(opening) = std::mem::replace(&mut self.state, State::Header) else {
            panic!("an export was opened unasked");
        };
        let export = match export {
            Ok(export) => export,
            Err(error) if opening.option == option::EXPORT_NAME => {
                return Err(SessionError::ExportRefused(error));
            }
            Err(error) => {
                refuse(out, opening.option, reply_of(&error), &error.to_string());
                return Ok(None);
            }
        };
        let flags = transmission_flags(&export, self.structured);
        if opening.option == option::EXPORT_NAME {
            out.put(|out| {
                out.put_u64(export.size);
                out.put_u16(flags);
                let padding = if self.no_zeroes { 0 } else { wire::EXPORT_NAME_PADDING_BYTES };
                out.put_bytes(0, padding);
            });
        } else {
            put_info(out, &opening, &export, flags);
            acknowledge(out, opening.option);
        }
        let allocation = self.allocation_for.as_ref() == Some(&opening.name);
        Ok((opening.option != option::INFO).then_some(Negotiated {
            size: export.size,
            read_only: export.read_only,
            structured: self.structured,
            allocation,
        }))
    }
}

/// What became of the input.
#[derive(Debug)]
pub(crate) enum Step {
    /// More bytes or an answer is needed.
    Starved,
    /// A message was taken.
    Taken,
    /// The caller must answer.
    Ask(Question),
}

fn transmission_flags(export: &ExportInfo, structured: bool) -> u16 {
    use transmission_flag::*;
    let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_CACHE;
    flags |=
        if export.read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO };
    if structured {
        flags |= SEND_DF;
    }
    if export.multi_connection {
        flags |= CAN_MULTI_CONN;
    }
    flags
}

fn reply_of(error: &OpenExportError) -> u32 {
    match error {
        OpenExportError::Unknown | OpenExportError::NotTheOnlyVolume { .. } => {
            option_reply::ERR_UNKNOWN
        }
        OpenExportError::AlreadyAttached { .. }
        | OpenExportError::LeasedElsewhere { .. }
        | OpenExportError::LeaseNotInForce(_)
        | OpenExportError::LeaseNeeded
        | OpenExportError::NoQuorum { .. }
        | OpenExportError::NotServedHere { .. }
        | OpenExportError::TooManyConnections { .. } => option_reply::ERR_POLICY,
        OpenExportError::ShuttingDown => option_reply::ERR_SHUTDOWN,
    }
}

/// Export and block sizes always, so that clients that know to ask but don't get them too.
fn put_info(out: &mut ReplyQueue, opening: &Opening, export: &ExportInfo, flags: u16) {
    let head = |out: &mut BytesMut, kind: u16, length: usize| {
        wire::put_option_reply(out, opening.option, option_reply::INFO, 2 + length);
        out.put_u16(kind);
    };
    out.put(|out| {
        head(out, info::EXPORT, 10);
        out.put_u64(export.size);
        out.put_u16(flags);
        head(out, info::BLOCK_SIZE, 12);
        out.put_u32(BLOCK_BYTES_MIN);
        out.put_u32(BLOCK_SIZE as u32);
        out.put_u32(TRANSFER_BYTES_MAX as u32);
        if opening.wants_name {
            head(out, info::NAME, export.name.len());
            out.put_slice(export.name.as_bytes());
        }
        if opening.wants_description {
            let description = clipped(&export.description);
            head(out, info::DESCRIPTION, description.len());
            out.put_slice(description.as_bytes());
        }
    });
}

fn put_context(out: &mut ReplyQueue, option: u32, id: u32) {
    out.put(|out| {
        let length = 4 + ALLOCATION_CONTEXT.len();
        wire::put_option_reply(out, option, option_reply::META_CONTEXT, length);
        out.put_u32(id);
        out.put_slice(ALLOCATION_CONTEXT.as_bytes());
    });
}

fn put_string(out: &mut impl BufMut, text: &str) {
    out.put_u32(u32::try_from(text.len()).expect("volume names are short"));
    out.put_slice(text.as_bytes());
}

fn acknowledge(out: &mut ReplyQueue, option: u32) {
    out.put(|out| wire::put_option_reply(out, option, option_reply::ACK, 0));
}

fn refuse(out: &mut ReplyQueue, option: u32, reply: u32, message: &str) {
    let message = clipped(message);
    out.put(|out| {
        wire::put_option_reply(out, option, reply, message.len());
        out.put_slice(message.as_bytes());
    });
}

/// Name and wanted kinds of information of `NBD_OPT_INFO` and `NBD_OPT_GO`.
fn decode_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let infos = (0..count).map(|_| fields.u16()).collect::<Option<Vec<u16>>>()?;
    fields.is_empty().then_some((name, infos))
}

/// Data of the two options about metadata contexts.
struct MetaQueries<'a> {
    name: &'a [u8],
    queries: Vec<&'a str>,
}

impl<'a> MetaQueries<'a> {
    fn decode(data: &'a [u8]) -> Result<Self, (u32, &'static str)> {
        const SHAPE: (u32, &str) =
            (option_reply::ERR_INVALID, "option data is not a name and a list of queries");
        const QUERY: (u32, &str) = (
            option_reply::ERR_INVALID,
            "metadata query is not \"namespace:\" or \"namespace:leaf\"",
        );
        let mut fields = Fields(data);
        let name = fields.string().ok_or(SHAPE)?;
        let count = fields.u32().ok_or(SHAPE)? as usize;
        if count > NBD_META_QUERIES_MAX {
            return Err((
                option_reply::ERR_TOO_BIG,
                "too many metadata queries; send one at a time",
            ));
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            let bytes = fields.string().ok_or(SHAPE)?;
            let query = std::str::from_utf8(bytes).map_err(|_| QUERY)?;
            queries.push(query.contains(':').then_some(query).ok_or(QUERY)?);
        }
        if fields.is_empty() { Ok(Self { name, queries }) } else { Err(SHAPE) }
    }

    /// A list without queries means all; `base:` stands for all of its namespace in lists only.
    fn select_allocation(&self, set: bool) -> bool {
        let listed = !set && self.queries.is_empty();
        let matches = |query: &str| query == ALLOCATION_CONTEXT || (!set && query == "base:");
        listed || self.queries.iter().any(|query| matches(query))
    }
}
