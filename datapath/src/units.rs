//! The newtypes that keep bytes, sequence numbers and epochs apart.
//!
//! Every number that crosses a module boundary in the datapath wears one of these. They are plain `u64`/`u32`
//! inside, cost nothing, and convert explicitly.

use std::fmt;

macro_rules! number {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The value before any was given out.
            pub const ZERO: Self = Self(0);

            /// The number after this one.
            ///
            /// # Panics
            /// On overflow, which 2^64 steps cannot reach in practice.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect(concat!(stringify!($name), " overflows")))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number!(
    /// Place of a change in its volume's write order, counted from 1 within one session of a link. 0 is "none yet".
    Seq
);
number!(
    /// Fencing number of a volume: raised by each promotion, carried by every frame.
    Epoch
);
number!(
    /// Identifier of a data lineage (random, never 0 once a disk has one); see `docs/PROTOCOL.md`.
    Generation
);
number!(
    /// Names one request of a front end between admission and completion. Opaque to everything but its giver.
    Token
);

/// A byte range of a disk: `start..start + len`. Never empty when it comes from a checked request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl ByteRange {
    /// The range `start..start + len`.
    #[must_use]
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// One past the last byte. Saturates, so a hostile range never wraps; check it with [`ByteRange::fits`].
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether the range lies wholly inside a disk of `size` bytes.
    #[must_use]
    pub const fn fits(self, size: u64) -> bool {
        match self.start.checked_add(self.len) {
            Some(end) => end <= size,
            None => false,
        }
    }

    /// Whether the two ranges share a byte.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len)
    }
}

/// What an acknowledgement to the client promises (DRBD's protocols A, B and C).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AckLevel {
    /// Local disk only (protocol A).
    Async,
    /// In the local mapping, and checked and applied in the peer's memory (protocol B).
    #[default]
    Memory,
    /// On stable storage on both (protocol C).
    Durable,
}

/// How the reactor waits for work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PollMode {
    /// Never sleeps: lowest latency, one core a node.
    Busy,
    /// Spins a few microseconds while work keeps coming, then sleeps.
    #[default]
    Adaptive,
    /// Always sleeps when there is nothing to do.
    Event,
}

/// What a primary does when its standby is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnPeerLoss {
    /// Go on alone, once that is on durable record.
    #[default]
    Continue,
    /// Hold every write until the standby is back and in sync.
    Freeze,
}
