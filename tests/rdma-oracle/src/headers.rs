//! Asks the C compiler: writes a C program of assertions, one for each thing that is declared, and has it compiled with
//! the libraries' headers. Nothing is run.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use crate::{Constant, Declarations, Field, Function, Structure};

/// Has the C compiler (`CC`, or else `cc`) judge the declarations. The error is what it says: a line for each that is
/// wrong.
///
/// # Errors
/// The compiler does not run, the headers are not there, or a declaration is wrong.
pub fn judge(declarations: &Declarations) -> io::Result<()> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let mut child = Command::new(compiler)
        .args(["-std=gnu11", "-fsyntax-only", "-x", "c", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().expect("it is piped").write_all(program(declarations).as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said.lines().filter(|line| line.contains("error:")).collect();
    Err(io::Error::other(lines.join("\n")))
}

/// The program of assertions.
#[must_use]
pub fn program(declarations: &Declarations) -> String {
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdint.h>\n#include <sys/socket.h>\n#include <sys/types.h>\n\
         #include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\n",
    );
    let mut assert = |condition: &str, about: &str| {
        let about = about.replace('"', "'");
        writeln!(text, "_Static_assert({condition}, \"{about}\");").expect("a String takes all");
    };
    for structure in &declarations.structures {
        about_structure(structure, &mut assert);
    }
    for Constant { name, value, .. } in &declarations.constants {
        assert(&format!("{name} == {value}"), &format!("{name} is declared as {value}"));
    }
    for Function { name, arguments, result, .. } in &declarations.functions {
        let arguments: Vec<_> = arguments.iter().map(|argument| c_argument(name, argument)).collect();
        let arguments = if arguments.is_empty() { "void".to_owned() } else { arguments.join(", ") };
        let prototype = format!("{} ({arguments})", c_type(result));
        assert(
            &format!("__builtin_types_compatible_p(__typeof__({name}), {prototype})"),
            &format!("{name} is declared as {prototype}"),
        );
    }
    text
}

fn about_structure(structure: &Structure, assert: &mut impl FnMut(&str, &str)) {
    let Structure { name, size, align, .. } = structure;
    let kind = c_type(name);
    if structure.whole {
        assert(&format!("sizeof({kind}) == {size}"), &format!("{name} is declared with {size} bytes"));
        assert(
            &format!("_Alignof({kind}) == {align}"),
            &format!("{name} is declared with an alignment of {align}"),
        );
    } else {
        assert(
            &format!("sizeof({kind}) >= {size}"),
            &format!("{name} is declared with at least {size} bytes"),
        );
    }
    for field in structure.fields.iter().filter(|field| !field.name.starts_with('_')) {
        let Field { offset, size, .. } = *field;
        // The compiler breaks a long type into lines.
        let field_kind = field.kind.split_whitespace().collect::<Vec<_>>().join(" ");
        let path = c_path(name, field.name);
        let place = format!("(({kind} *)0)->{path}");
        let about = format!("{name}.{path} is declared as {field_kind} at byte {offset}");
        assert(&format!("offsetof({kind}, {path}) == {offset} && sizeof({place}) == {size}"), &about);
        // The headers have integers of one size under several names, of which C takes some for different types.
        let same = match field_kind.as_str() {
            "u8" | "u16" | "u32" | "u64" | "c_uint" => format!("(__typeof__({place}))-1 > 0"),
            "c_int" => format!("(__typeof__({place}))-1 < 0"),
            _ => format!("__builtin_types_compatible_p(__typeof__({place}), {})", c_type(&field_kind)),
        };
        assert(&same, &format!("the type: {about}"));
    }
}

/// Where C has a field that is declared without the unions and structures around it.
fn c_path<'a>(structure: &str, field: &'a str) -> &'a str {
    match (structure, field) {
        ("ibv_send_wr", "remote_addr") => "wr.rdma.remote_addr",
        ("ibv_send_wr", "rkey") => "wr.rdma.rkey",
        ("ibv_async_event", "port_num") => "element.port_num",
        ("rdma_cm_id", "src_storage") => "route.addr.src_storage",
        ("rdma_cm_id", "dst_storage") => "route.addr.dst_storage",
        ("rdma_cm_event", "conn") => "param.conn",
        _ => field,
    }
}

/// The C type of a function's argument.
fn c_argument(function: &str, argument: &str) -> String {
    match (function, argument) {
        // The same structure by the name that only this function uses, cut off behind `flags`.
        ("ibv_query_port", "*mut ibv_port_attr") => "struct _compat_ibv_port_attr *".to_owned(),
        _ => c_type(argument),
    }
}

/// A Rust type as C writes it.
fn c_type(rust: &str) -> String {
    if let Some(target) = rust.strip_prefix("*mut ") {
        return format!("{} *", c_type(target));
    }
    if let Some(target) = rust.strip_prefix("*const ") {
        return format!("const {} *", c_type(target));
    }
    if let Some((element, len)) =
        rust.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')?.split_once("; "))
    {
        return format!("{}[{len}]", c_type(element));
    }
    if let Some((arguments, result)) =
        rust.strip_prefix("unsafe extern \"C\" fn(").and_then(|rest| rest.split_once(") -> "))
    {
        let arguments: Vec<_> = arguments.split(',').map(|argument| c_type(argument.trim())).collect();
        return format!("{} (*)({})", c_type(result), arguments.join(", "));
    }
    match rust {
        "" | "c_void" => "void",
        "c_char" => "char",
        "c_int" => "int",
        "c_uint" => "unsigned int",
        "u8" => "uint8_t",
        "u16" => "uint16_t",
        "u32" => "uint32_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        "isize" => "ssize_t",
        "ibv_gid" => "union ibv_gid",
        structure => return format!("struct {structure}"),
    }
    .to_owned()
}
