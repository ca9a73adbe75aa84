//! One option of the handshake: parsing its data and writing its replies.
//!
//! [`super::handshake`] frames the options; here each gets its answer. Invariants: each option but
//! `NBD_OPT_EXPORT_NAME` gets exactly one final reply, an acknowledgement or an error with a text; data must be used up
//! to the last byte or the option is malformed; no text exceeds the protocol's 4096 bytes. Survives any data.

use super::export::{Export, ExportDirectory, Lookup, Opened};
use super::proto::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_DF, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME,
    NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, NBD_OPT_EXTENDED_HEADERS, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK, NBD_REP_ERR_INVALID, NBD_REP_ERR_POLICY, NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP, NBD_REP_INFO, NBD_REP_MAGIC, NBD_REP_META_CONTEXT, NBD_REP_SERVER, Negotiated,
    STRING_LEN_MAX,
};
use super::reply::truncate;
use crate::limits::{BLOCK_LEN_MIN, BLOCK_LEN_PREFERRED, NBD_OPTION_LEN_MAX, PAYLOAD_LEN_MAX};

/// Zero bytes that end the reply to `NBD_OPT_EXPORT_NAME` for clients that did not waive them.
const EXPORT_NAME_ZEROES_LEN: usize = 124;

/// Bytes of an unknown name that an error message repeats: enough to see the typing error.
const NAME_ECHO_LEN_MAX: usize = 64;

/// Bytes of export names that an error message lists.
const NAMES_ECHO_LEN_MAX: usize = 512;

/// What an option led to.
pub(super) enum Answer {
    /// The reply stands in `out`; the next option follows.
    Replied,
    /// The export is open.
    Opened(Opened),
    /// The client ends the session.
    Leave,
    /// The option has no error reply: close.
    Unanswerable {
        /// What there would have been to say.
        message: String,
    },
}

/// The contexts last chosen, and for which export: they count only if that one is opened.
#[derive(Default, Debug)]
pub(super) struct MetaContexts {
    base_allocation_of: Option<String>,
}

/// Why an option is answered by an error.
struct Refusal {
    code: u32,
    message: String,
}

fn refuse<T>(code: u32, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { code, message: message.into() })
}

/// Answers an option whose data was too long to be kept.
pub(super) fn answer_oversized(option: u32, out: &mut Vec<u8>) -> Answer {
    match option {
        NBD_OPT_ABORT => {
            put_reply(out, option, NBD_REP_ACK, &[]);
            Answer::Leave
        }
        NBD_OPT_LIST..=NBD_OPT_SET_META_CONTEXT => {
            let message = format!("an option may have {NBD_OPTION_LEN_MAX} bytes of data");
            put_reply(out, option, NBD_REP_ERR_TOO_BIG, &[message.as_bytes()]);
            Answer::Replied
        }
        _ => {
            put_reply(out, option, NBD_REP_ERR_UNSUP, &[unsupported(option).as_bytes()]);
            Answer::Replied
        }
    }
}

/// What an option may look at and change.
pub(super) struct Session<'a> {
    pub(super) no_zeroes: bool,
    pub(super) structured: &'a mut bool,
    pub(super) contexts: &'a mut MetaContexts,
    pub(super) directory: &'a dyn ExportDirectory,
}

impl Session<'_> {
    /// Answers one option into `out`.
    pub(super) fn answer(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Answer {
        let result = match option {
            NBD_OPT_EXPORT_NAME => return self.export_name(data, out),
            NBD_OPT_ABORT => {
                put_reply(out, option, NBD_REP_ACK, &[]);
                return Answer::Leave;
            }
            NBD_OPT_LIST => self.list(data, out),
            NBD_OPT_INFO => self.info(option, data, out).map(|_| ()),
            NBD_OPT_GO => match self.info(option, data, out) {
                Ok(opened) => {
                    put_reply(out, option, NBD_REP_ACK, &[]);
                    return Answer::Opened(opened);
                }
                Err(refusal) => Err(refusal),
            },
            NBD_OPT_STRUCTURED_REPLY => empty(data).map(|()| *self.structured = true),
            NBD_OPT_LIST_META_CONTEXT => self.list_meta_context(data, out),
            NBD_OPT_SET_META_CONTEXT => self.set_meta_context(data, out),
            NBD_OPT_STARTTLS => empty(data).and_then(|()| refuse(NBD_REP_ERR_UNSUP, unsupported(option))),
            _ => refuse(NBD_REP_ERR_UNSUP, unsupported(option)),
        };
        match result {
            Ok(()) => put_reply(out, option, NBD_REP_ACK, &[]),
            Err(Refusal { code, message }) => {
                put_reply(out, option, code, &[truncate(&message, STRING_LEN_MAX).as_bytes()]);
            }
        }
        Answer::Replied
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Answer {
        let found = text(data).and_then(|name| self.find(name));
        let (name, export) = match found {
            Ok(found) => found,
            Err(Refusal { message, .. }) => return Answer::Unanswerable { message },
        };
        let opened = self.open(name, &export);
        out.extend_from_slice(&export.size.to_be_bytes());
        out.extend_from_slice(&transmission_flags(&opened.negotiated).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; EXPORT_NAME_ZEROES_LEN]);
        }
        Answer::Opened(opened)
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        empty(data)?;
        for export in self.directory.list() {
            let name = truncate(&export.name, STRING_LEN_MAX);
            let description = truncate(&export.description, STRING_LEN_MAX);
            let parts = [&wire_len(name.len()).to_be_bytes(), name.as_bytes(), description.as_bytes()];
            put_reply(out, NBD_OPT_LIST, NBD_REP_SERVER, &parts);
        }
        Ok(())
    }

    /// Replies with the facts about an export, all but the final acknowledgement.
    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Opened, Refusal> {
        let mut data = Data(data);
        let name = data.string()?;
        let count = data.u16()?;
        let mut wanted = [false; 4];
        for _ in 0..count {
            if let Some(flag) = wanted.get_mut(usize::from(data.u16()?)) {
                *flag = true;
            }
        }
        empty(data.0)?;
        let (name, export) = self.find(name)?;
        let opened = self.open(name, &export);

        let flags = transmission_flags(&opened.negotiated);
        let mut put = |kind: u16, parts: [&[u8]; 3]| {
            put_reply(out, option, NBD_REP_INFO, &[&kind.to_be_bytes(), parts[0], parts[1], parts[2]]);
        };
        put(NBD_INFO_EXPORT, [&export.size.to_be_bytes(), &flags.to_be_bytes(), &[]]);
        if wanted[usize::from(NBD_INFO_NAME)] {
            put(NBD_INFO_NAME, [opened.name.as_bytes(), &[], &[]]);
        }
        if wanted[usize::from(NBD_INFO_DESCRIPTION)] && !export.description.is_empty() {
            put(NBD_INFO_DESCRIPTION, [truncate(&export.description, STRING_LEN_MAX).as_bytes(), &[], &[]]);
        }
        if wanted[usize::from(NBD_INFO_BLOCK_SIZE)] {
            let sizes = [BLOCK_LEN_MIN, BLOCK_LEN_PREFERRED, PAYLOAD_LEN_MAX].map(u32::to_be_bytes);
            put(NBD_INFO_BLOCK_SIZE, [&sizes[0], &sizes[1], &sizes[2]]);
        }
        Ok(opened)
    }

    fn list_meta_context(&self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        let (_, queries) = self.meta_queries(data)?;
        let matches = |query: &&str| *query == BASE_ALLOCATION || *query == "base:";
        if queries.is_empty() || queries.iter().any(matches) {
            let parts: [&[u8]; 2] = [&0_u32.to_be_bytes(), BASE_ALLOCATION.as_bytes()];
            put_reply(out, NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &parts);
        }
        Ok(())
    }

    fn set_meta_context(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        // What was chosen before is gone even if this option fails.
        self.contexts.base_allocation_of = None;
        let (name, queries) = self.meta_queries(data)?;
        if queries.contains(&BASE_ALLOCATION) {
            let parts: [&[u8]; 2] = [&BASE_ALLOCATION_ID.to_be_bytes(), BASE_ALLOCATION.as_bytes()];
            put_reply(out, NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT, &parts);
            self.contexts.base_allocation_of = Some(name);
        }
        Ok(())
    }

    /// The export and the queries of both context options.
    fn meta_queries<'d>(&self, data: &'d [u8]) -> Result<(String, Vec<&'d str>), Refusal> {
        if !*self.structured {
            return refuse(
                NBD_REP_ERR_INVALID,
                "metadata contexts need structured replies: negotiate those first",
            );
        }
        let mut data = Data(data);
        let name = data.string()?;
        let count = data.u32()?;
        let mut queries = Vec::new();
        // The count is not believed: each query takes at least its length's four bytes of a bounded option.
        for _ in 0..count {
            let query = data.string()?;
            if !query.contains(':') {
                return refuse(
                    NBD_REP_ERR_INVALID,
                    "a metadata context query starts with a namespace and a colon",
                );
            }
            queries.push(query);
        }
        empty(data.0)?;
        let (name, _) = self.find(name)?;
        Ok((name, queries))
    }

    /// The export a client means by `name`, under its own name.
    fn find(&self, name: &str) -> Result<(String, Export), Refusal> {
        let name = if name.is_empty() { self.default_name()? } else { name.to_owned() };
        match self.directory.lookup(&name) {
            Lookup::Found(export) => Ok((name, export)),
            Lookup::Refused { message } => refuse(NBD_REP_ERR_POLICY, message),
            Lookup::Unknown => {
                let echo = truncate(&name, NAME_ECHO_LEN_MAX);
                refuse(NBD_REP_ERR_UNKNOWN, format!("no export {echo:?} here; {}", self.what_exists()))
            }
        }
    }

    fn default_name(&self) -> Result<String, Refusal> {
        let mut exports = self.directory.list();
        match (exports.pop(), exports.is_empty()) {
            (Some(only), true) => Ok(only.name),
            _ => refuse(NBD_REP_ERR_UNKNOWN, format!("no default export here; {}", self.what_exists())),
        }
    }

    fn what_exists(&self) -> String {
        let names: Vec<_> = self.directory.list().into_iter().map(|export| export.name).collect();
        if names.is_empty() {
            return "there are none".to_owned();
        }
        format!("there are: {}", truncate(&names.join(", "), NAMES_ECHO_LEN_MAX))
    }

    fn open(&self, name: String, export: &Export) -> Opened {
        let base_allocation =
            *self.structured && self.contexts.base_allocation_of.as_deref() == Some(name.as_str());
        let negotiated = Negotiated {
            size: export.size,
            read_only: export.read_only,
            structured: *self.structured,
            base_allocation,
        };
        Opened { name, negotiated }
    }
}

/// The flags under which an export is opened: everything [`super::proto::Request::check`] lets through. Fast-zero is
/// not among them, since nobody could promise that zeroing beats writing.
fn transmission_flags(negotiated: &Negotiated) -> u16 {
    let mut flags = NBD_FLAG_HAS_FLAGS
        | NBD_FLAG_SEND_FLUSH
        | NBD_FLAG_SEND_FUA
        | NBD_FLAG_SEND_TRIM
        | NBD_FLAG_SEND_WRITE_ZEROES
        | NBD_FLAG_SEND_CACHE
        | NBD_FLAG_CAN_MULTI_CONN;
    if negotiated.read_only {
        flags |= NBD_FLAG_READ_ONLY;
    }
    if negotiated.structured {
        flags |= NBD_FLAG_SEND_DF;
    }
    flags
}

fn unsupported(option: u32) -> String {
    match option {
        NBD_OPT_STARTTLS => "TLS is not built into this server yet".to_owned(),
        NBD_OPT_EXTENDED_HEADERS => "extended headers are not supported".to_owned(),
        _ => format!("option {option} is not supported"),
    }
}

fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len = wire_len(parts.iter().map(|part| part.len()).sum());
    out.extend_from_slice(&NBD_REP_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn wire_len(len: usize) -> u32 {
    u32::try_from(len).expect("a reply is made of strings of bounded length")
}

fn empty(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() {
        Ok(())
    } else {
        refuse(NBD_REP_ERR_INVALID, format!("{} bytes of data more than the option has", data.len()))
    }
}

fn text(bytes: &[u8]) -> Result<&str, Refusal> {
    if bytes.len() > STRING_LEN_MAX {
        return refuse(NBD_REP_ERR_TOO_BIG, format!("a string may have {STRING_LEN_MAX} bytes"));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => refuse(NBD_REP_ERR_INVALID, "a string must be UTF-8 without NUL"),
    }
}

/// An option's data, taken from the front.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Refusal> {
        match self.0.split_at_checked(len) {
            Some((taken, rest)) => {
                self.0 = rest;
                Ok(taken)
            }
            None => {
                let message = format!("the option ends where {len} more bytes were announced");
                refuse(NBD_REP_ERR_INVALID, message)
            }
        }
    }

    fn u16(&mut self) -> Result<u16, Refusal> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().expect("took 2")))
    }

    fn u32(&mut self) -> Result<u32, Refusal> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().expect("took 4")))
    }

    /// A string behind its length.
    fn string(&mut self) -> Result<&'a str, Refusal> {
        let len = self.u32()?;
        text(self.take(usize::try_from(len).unwrap_or(usize::MAX))?)
    }
}
