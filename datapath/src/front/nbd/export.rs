//! What a client can open: the directory of exports, and what it says to a name.

use super::proto::Negotiated;

/// One export as [`ExportDirectory::list`] names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedExport {
    /// Its name, at most 4096 bytes.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// An export that a client may open here and now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// A text for people; may be empty.
    pub description: String,
}

/// What the directory says to a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// It may be opened.
    Found(Export),
    /// It exists, but this node does not serve it now.
    Refused {
        /// Why, and who does: sent to the client as it is.
        message: String,
    },
    /// There is no such export.
    Unknown,
}

/// Who knows the exports. Asked anew by every option, so that a role change shows at once.
pub trait ExportDirectory {
    /// Whether `name` may be opened. Never called with the empty name.
    fn lookup(&self, name: &str) -> Lookup;

    /// What to tell a client that asks for names. If it is exactly one, it is also the default export, which a client
    /// opens by the empty name.
    fn list(&self) -> Vec<ListedExport>;
}

/// An export opened by a client: the transmission phase begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened {
    /// The export's own name, also where the client asked for the default one.
    pub name: String,
    /// What the connection's requests are judged by.
    pub negotiated: Negotiated,
}
