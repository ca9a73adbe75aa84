//! Socket calls on mappings.
