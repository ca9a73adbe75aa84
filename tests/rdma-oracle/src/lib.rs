//! Compares what `ffi/src/verbs/sys` declares of libibverbs and librdmacm with their real headers.
//!
//! Run by `make test`; no part of the program, which is built without headers. Two judges:
//! - The C compiler ([`headers`]). A program of assertions is written from the declarations, and compiled with the headers.
//!   It says whether each structure has the size, each field the place and the type, each constant the value and each
//!   function the prototype that is declared.
//! - The crate `rdma-sys` (`bindings`, feature `rdma-sys`), whose bindings bindgen makes from the same headers with libclang.
//!   Structures with unions are written by hand there; of those only the C compiler is a judge.
//!
//! The declarations' own files are compiled here, with the macros of [`declare`] in place of the program's: what is declared
//! is compared, and nothing can be left out.

#[macro_use]
mod bindings;
#[macro_use]
mod declare;

#[allow(dead_code, reason = "the program uses them")]
#[path = "../../../ffi/src/verbs/sys/constants.rs"]
mod constants;
#[allow(dead_code, unused_imports, reason = "the program uses them")]
#[path = "../../../ffi/src/verbs/sys/functions.rs"]
mod functions;
#[allow(non_camel_case_types, dead_code, reason = "the program uses them, by their C names")]
#[path = "../../../ffi/src/verbs/sys/structures.rs"]
mod structures;

pub mod headers;

/// A structure, as declared.
#[derive(Clone, Debug)]
pub struct Structure {
    /// Its name.
    pub name: &'static str,
    /// Its bytes.
    pub size: usize,
    /// What its address is a multiple of.
    pub align: usize,
    /// False for the beginning of a larger one.
    pub whole: bool,
    /// All its fields.
    pub fields: Vec<Field>,
    /// Its bytes in the bindings.
    pub bound_size: Option<usize>,
}

/// A field of a structure, as declared.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its name; one that starts with `_` is only room.
    pub name: &'static str,
    /// Its type as it is written.
    pub kind: &'static str,
    /// Its first byte in the structure.
    pub offset: usize,
    /// Its bytes.
    pub size: usize,
    /// Where it is in the bindings.
    pub bound_offset: Option<usize>,
}

/// A constant, as declared.
#[derive(Clone, Debug)]
pub struct Constant {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: i64,
    /// Its value in the bindings.
    pub bound_value: Option<i64>,
}

/// A function, as declared.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// The types of its arguments as they are written.
    pub arguments: Vec<&'static str>,
    /// The type of its result; empty for none.
    pub result: &'static str,
    /// Its type as the compiler names it.
    pub prototype: &'static str,
    /// The same in the bindings.
    pub bound_prototype: Option<&'static str>,
}

/// All that is declared.
#[derive(Clone, Debug)]
pub struct Declarations {
    /// Structures, in the order of the file.
    pub structures: Vec<Structure>,
    /// Constants.
    pub constants: Vec<Constant>,
    /// Functions of both libraries.
    pub functions: Vec<Function>,
}

/// What the program declares.
#[must_use]
pub fn declarations() -> Declarations {
    let mut functions = functions::Verbs::described();
    functions.extend(functions::Manager::described());
    Declarations { structures: structures::described(), constants: constants::described(), functions }
}

#[cfg(test)]
mod tests;
