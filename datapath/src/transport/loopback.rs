//! Loopback transport.
