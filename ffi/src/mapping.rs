//! Shared memory mappings (being built).
use std::sync::Arc;
/// A mapping.
#[derive(Debug)]
pub struct Mapping {}
/// A span of a mapping.
#[derive(Debug, Clone)]
pub struct Span {
    _mapping: Arc<Mapping>,
}
