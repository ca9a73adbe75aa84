//! The rules of the house that no compiler checks: who may import whom, where `unsafe` may stand, how a file begins and how
//! long it gets, that no test ends early without saying so, that nothing in a daemon prints, that files which call themselves
//! sans-IO do no I/O, that no file stands in a circle of imports, that no test double ships, that the specification names tests
//! which exist, and that documents name files which exist.
//!
//! Reads the sources of the workspace this test was built from, and nothing else. Each rule is a function from text to
//! complaints, so that the rule itself is tested on text that breaks it.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "house/circles.rs"]
mod circles;

/// Lines after which a file needs splitting.
const FILE_LINES_MAX: usize = 800;

/// Macros that panic, and so end a daemon, where stdout or stderr cannot be written.
const PRINTING: [&str; 4] = ["print", "println", "eprint", "eprintln"];

/// Files of a daemon's crates that may have stdout or stderr in hand, beside the command line's: whoever writes to these waits for
/// their readers.
const STANDARD_OUTPUT: [&str; 1] = ["control/src/logging.rs"];

/// Promises the specification makes.
const PROMISES: usize = 12;

/// Which crates of this workspace each may depend on, tests and benches included.
const IMPORTS: [(&str, &[&str]); 5] = [
    ("costandby-ffi", &[]),
    ("costandby-datapath", &["costandby-ffi"]),
    ("costandby-control", &["costandby-ffi", "costandby-datapath"]),
    ("costandby-bench", &["costandby-ffi", "costandby-datapath", "costandby-control"]),
    ("costandby-tests", &["costandby-ffi", "costandby-datapath", "costandby-control"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above").to_path_buf()
}

/// Every Rust file of the workspace, by its path from the root.
fn sources() -> BTreeMap<String, String> {
    fn visit(dir: &Path, root: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.expect("directory entry").path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    visit(&path, root, found);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
                let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
                found.insert(name, text);
            }
        }
    }
    let root = root();
    let mut found = BTreeMap::new();
    for room in ["ffi", "datapath", "control", "bench", "tests"] {
        visit(&root.join(room), &root, &mut found);
    }
    assert!(found.len() > 10, "found only {} sources below {}", found.len(), root.display());
    found
}

/// `text` with comments, strings and character literals blanked, so that what is left is code. Lines stay lines.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after_word = code.ends_with(|last: char| last.is_alphanumeric() || last == '_');
        let skipped = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment_len(rest),
            '"' => string_len(rest),
            'r' if !after_word => raw_string_len(rest, 1),
            'b' if !after_word && rest.starts_with("br") => raw_string_len(rest, 2),
            '\'' => char_literal_len(rest),
            _ => 0,
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[skipped..];
        }
    }
    code
}

fn block_comment_len(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        let (step, change): (usize, isize) = match &text.as_bytes()[at..] {
            [b'/', b'*', ..] => (2, 1),
            [b'*', b'/', ..] => (2, -1),
            _ => (1, 0),
        };
        at += step;
        depth = depth.saturating_add_signed(change);
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Length of the raw string at the start of `text`, after a prefix (`r`, `br`) of `prefix` bytes; 0 if there is none.
fn raw_string_len(text: &str, prefix: usize) -> usize {
    let hashes = text[prefix..].bytes().take_while(|&byte| byte == b'#').count();
    let body = prefix + hashes + 1;
    if text.as_bytes().get(body - 1) != Some(&b'"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    text[body..].find(&end).map_or(text.len(), |at| body + at + end.len())
}

/// Length of the character literal at the start of `text`; 0 for a lifetime.
fn char_literal_len(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            chars.next();
            chars.find(|&(_, c)| c == '\'').map_or(0, |(at, _)| at + 1)
        }
        Some(_) => chars.next().filter(|&(_, c)| c == '\'').map_or(0, |(at, _)| at + 1),
        None => 0,
    }
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

/// What is wrong with one file.
fn complaints(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !text.starts_with("//!") {
        found.push(format!("{name}: does not begin with //! and what it is for"));
    }
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        found.push(format!("{name}: {lines} lines, the limit is {FILE_LINES_MAX}"));
    }
    let code = code_of(text);
    for (number, line) in (1..).zip(code.lines()) {
        for unfinished in ["todo!", "unimplemented!"] {
            if line.contains(unfinished) {
                found.push(format!("{name}:{number}: {unfinished}"));
            }
        }
        if line.contains("println!")
            && text.lines().nth(number - 1).is_some_and(|line| line.contains("(\"SKIPPED"))
            && name != "ffi/src/testing.rs"
        {
            found.push(format!("{name}:{number}: says SKIPPED by itself, where ffi's testing.rs has skip()"));
        }
        if !name.starts_with("ffi/") && has_word(line, "unsafe") {
            found.push(format!("{name}:{number}: unsafe outside ffi"));
        }
    }
    let suggests = name.starts_with("control/src/") && !name.starts_with("control/src/cli/");
    if suggests && runs_in_a_daemon(name) && name != "control/src/command_line.rs" {
        found.extend(suggestion_complaints(name, text));
    }
    if runs_in_a_daemon(name) {
        found.extend(printing_complaints(name, &code));
        if circles::shipped(&code).contains("testing::") {
            found.push(format!("{name}: names a test double outside of tests"));
        }
    }
    found.extend(sans_io_complaints(name, text, &code));
    let is_root = ["/src/lib.rs", "/src/main.rs"].iter().any(|root| name.ends_with(root));
    if is_root && !name.starts_with("ffi/") && !code.contains("#![forbid(unsafe_code)]") {
        found.push(format!("{name}: the crate does not forbid unsafe_code"));
    }
    found
}

/// Subcommands about a volume: a text of a daemon that suggests one has it from `command_line.rs`, with the configuration and
/// the node.
const ABOUT_A_VOLUME: [&str; 9] = [
    "promote",
    "demote",
    "connect",
    "disconnect",
    "invalidate",
    "verify",
    "wait-sync",
    "create",
    "dump-metadata",
];

/// Commands that a file writes out by hand, also where the string goes on in the next line.
fn suggestion_complaints(name: &str, text: &str) -> Vec<String> {
    const BEGIN: &str = "`costandby ";
    let is_comment = |line: &str| line.trim_start().starts_with("//");
    let lines: Vec<_> = text.lines().map(|line| if is_comment(line) { "" } else { line }).collect();
    let code = lines.join("\n");
    let by_hand = |at: &usize| {
        let rest = code[at + BEGIN.len()..].trim_start_matches(['\\', '\n', ' ']);
        ABOUT_A_VOLUME.iter().any(|subcommand| rest.starts_with(subcommand))
    };
    let found = code.match_indices(BEGIN).map(|(at, _)| at).filter(by_hand);
    let number = |at: usize| code[..at].matches('\n').count() + 1;
    found.map(|at| format!("{name}:{}: a command by hand, where `Commands` makes it", number(at))).collect()
}

/// What a file whose header says Sans-IO does not do: read clocks, start threads, touch files and sockets, draw random numbers.
const IO: [&str; 10] = [
    "Instant::now",
    "SystemTime",
    ".elapsed()",
    "std::thread",
    "thread::spawn",
    "std::net",
    "std::fs",
    "rustix::",
    "tokio::",
    "getrandom",
];

/// I/O in a file that says it has none. Tests at the file's end may do as they like.
fn sans_io_complaints(name: &str, text: &str, code: &str) -> Vec<String> {
    let header = text.lines().take_while(|line| line.starts_with("//!"));
    if !header.into_iter().any(|line| line.contains("Sans-IO")) {
        return Vec::new();
    }
    let shipped = code.lines().take_while(|line| !line.contains("#[cfg(test)]"));
    let found = (1..).zip(shipped).flat_map(|(number, line)| {
        let found = IO.iter().filter(|io| line.contains(*io) && !line.contains("std::net::IpAddr"));
        found.map(move |io| format!("{name}:{number}: {io} in a file that says it is Sans-IO"))
    });
    found.collect()
}

/// Words of a comment that says why a test may end early although it is not left out.
const NOT_LEFT_OUT: &str = "not left out";

/// Lines above a `return` in which its reason may stand.
const REASON_LINES: usize = 3;

/// The functions of a file as rustfmt writes it: name, lines from its head to its last brace, whether it is a test.
fn functions(text: &str) -> Vec<(String, std::ops::Range<usize>, bool)> {
    let code = code_of(text);
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let head = line.trim_start();
        let Some((before, name)) = head.split_once("fn ") else { continue };
        let qualifiers =
            ["", "pub ", "pub(crate) ", "pub(super) ", "const ", "pub const ", "async ", "pub async "];
        if !qualifiers.contains(&before) {
            continue;
        }
        let name: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let end = format!("{}}}", &line[..line.len() - head.len()]);
        let len = lines[at..].iter().position(|line| line.trim_end() == end).unwrap_or(0);
        let above = lines[..at].iter().rev().map(|line| line.trim());
        let is_test = above
            .take_while(|line| line.is_empty() || line.starts_with('#'))
            .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
        found.push((name, at..at + len + 1, is_test));
    }
    found
}

/// Whether `code` calls one of the functions `names`, rather than a method called so.
fn calls(code: &str, names: &BTreeSet<String>) -> bool {
    names.iter().any(|name| {
        code.match_indices(name.as_str()).any(|(at, _)| {
            let before = code[..at].chars().next_back().unwrap_or(' ');
            code[at + name.len()..].starts_with('(') && !before.is_alphanumeric() && !"_.".contains(before)
        })
    })
}

/// Functions that leave the test out which calls them: those of `ffi::testing`, and those of the file that call one.
fn leaving_out(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::from(["skip", "skip_outside_rig"].map(str::to_owned));
    let code = code_of(text);
    let lines: Vec<&str> = code.lines().collect();
    let functions = functions(text);
    loop {
        let known = found.len();
        for (name, range, _) in functions.iter().filter(|(_, _, is_test)| !is_test) {
            if calls(&lines[range.clone()].iter().skip(1).copied().collect::<Vec<_>>().join("\n"), &found) {
                found.insert(name.clone());
            }
        }
        if found.len() == known {
            return found;
        }
    }
}

/// Tests that end early and do not say that they are left out.
fn early_ends(name: &str, text: &str) -> Vec<String> {
    let leaving_out = leaving_out(text);
    let code = code_of(text);
    let code: Vec<&str> = code.lines().collect();
    let written: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (test, range, _) in functions(text).into_iter().filter(|(_, _, is_test)| *is_test) {
        let first = range.start + 1;
        for at in first..range.end {
            if !["return;", "return }"].iter().any(|end| code[at].contains(end)) {
                continue;
            }
            let reason = first.max(at.saturating_sub(REASON_LINES))..=at;
            let said = written[reason.clone()].iter().any(|line| line.to_lowercase().contains(NOT_LEFT_OUT));
            if !said && !calls(&code[reason].join("\n"), &leaving_out) {
                let line = at + 1;
                found.push(format!(
                    "{name}:{line}: {test} ends early: call skip() of costandby-ffi's testing.rs, or say why it is \
                     \"{NOT_LEFT_OUT}\""
                ));
            }
        }
    }
    found
}

/// Whether the file's code is part of a daemon or of the command line: no tests, no build scripts.
fn runs_in_a_daemon(name: &str) -> bool {
    let room = ["ffi/src/", "datapath/src/", "control/src/"].iter().any(|room| name.starts_with(room));
    let double = name == "ffi/src/testing.rs" || name.starts_with("datapath/src/testing/");
    room && !double && !name.ends_with("/tests.rs") && !name.contains("/tests/")
}

/// Macros that print, anywhere; stdout and stderr outside of the command line.
fn printing_complaints(name: &str, code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let may_write = name.starts_with("control/src/cli/") || STANDARD_OUTPUT.contains(&name);
    for (number, line) in (1..).zip(code.lines()) {
        for word in PRINTING {
            if has_word(line, word) && line.contains(&format!("{word}!")) {
                found.push(format!(
                    "{name}:{number}: {word}! panics where nobody reads it: log, or use cli::print"
                ));
            }
        }
        for stream in ["stdout()", "stderr()"] {
            if !may_write && line.contains(stream) {
                found.push(format!(
                    "{name}:{number}: {stream} outside of cli/ and logging.rs waits for its reader"
                ));
            }
        }
    }
    found
}

/// What is wrong with who depends on whom, by the output of `cargo metadata`.
fn import_complaints(metadata: &serde_json::Value) -> Vec<String> {
    let allowed: BTreeMap<_, _> = IMPORTS.into_iter().collect();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().expect("a list of packages") {
        let name = package["name"].as_str().expect("a package has a name");
        let Some(allowed) = allowed.get(name) else {
            found.push(format!("{name}: say in tests/tests/house.rs what this new crate may import"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("a list of dependencies") {
            let for_tests = dependency["kind"] == "dev" || name == "costandby-tests";
            let features = dependency["features"].as_array().into_iter().flatten();
            let doubles = features.into_iter().any(|feature| feature == "testing");
            let dependency = dependency["name"].as_str().expect("a dependency has a name");
            if doubles && !for_tests {
                found
                    .push(format!("{name} ships the test doubles of {dependency}: its feature is for tests"));
            }
            let own = dependency == name && for_tests;
            if dependency.starts_with("costandby") && !allowed.contains(&dependency) && !own {
                found.push(format!(
                    "{name} imports {dependency}, against ffi <- datapath <- control <- bench, tests"
                ));
            }
        }
    }
    found
}

/// Files where `room::module::…` may be written.
fn files_of(room: &str, modules: &[&str]) -> Vec<String> {
    if modules.is_empty() {
        return ["lib.rs", "main.rs", "tests.rs"].iter().map(|file| format!("{room}/src/{file}")).collect();
    }
    let path = modules.join("/");
    let dir = format!("{room}/src/{path}");
    vec![
        format!("{dir}.rs"),
        format!("{dir}/mod.rs"),
        format!("{dir}/tests.rs"),
        format!("{room}/tests/{path}.rs"),
    ]
}

/// Whether `test` (`room::module::name`, the room being the crate's directory) is a test function in `sources`, or
/// (`fuzz::name`) a fuzz target.
fn test_exists(sources: &BTreeMap<String, String>, test: &str) -> bool {
    let parts: Vec<&str> = test.split("::").collect();
    if let ["fuzz", target] = parts.as_slice() {
        return sources.contains_key(&format!("tests/fuzz/src/bin/{target}.rs"));
    }
    let [room, modules @ .., function] = parts.as_slice() else { return false };
    let modules = modules.strip_suffix(&["tests"]).unwrap_or(modules);
    let declaration = format!("fn {function}(");
    files_of(room, modules).iter().filter_map(|file| sources.get(file)).any(|text| {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.iter().enumerate().filter(|(_, line)| line.contains(&declaration)).any(|(at, _)| {
            let attributes = lines[..at].iter().rev().take_while(|above| above.starts_with(['#', '/']));
            attributes
                .into_iter()
                .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
        })
    })
}

/// What is wrong with the specification: promises that are missing, promises without a row in the table of tests, and tests
/// named there that do not exist.
fn specification_complaints(text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    let titles = text.split("\n## ").skip(1).filter(|part| part.starts_with(char::is_numeric));
    let numbers: Vec<&str> = titles.filter_map(|part| Some(part.split_once('.')?.0)).collect();
    let expected: Vec<String> = (1..=PROMISES).map(|number| number.to_string()).collect();
    if numbers != expected {
        found.push(format!("the promises are numbered {numbers:?}, not 1 to {PROMISES}"));
    }
    let mut without_test: BTreeSet<&str> = numbers.into_iter().collect();
    let rows = text
        .lines()
        .filter(|line| line.strip_prefix("| ").is_some_and(|row| row.starts_with(char::is_numeric)));
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [number, _, test] = cells.as_slice() else {
            found.push(format!("\"{row}\" has not three cells: promise, what, test"));
            continue;
        };
        let named = test.strip_prefix('`').and_then(|test| test.strip_suffix('`'));
        if !expected.iter().any(|promise| promise == number) {
            found.push(format!("\"{row}\" names no promise"));
        } else if *test == "pending" || named.is_some_and(&exists) {
            without_test.remove(number);
        } else {
            found.push(format!("promise {number} names {test}, which is no test"));
        }
    }
    found.extend(
        without_test.iter().map(|number| format!("promise {number} has no row with a test or \"pending\"")),
    );
    found
}

/// Folders at the root. A word in backquotes that begins with one of them and a slash is taken for a path.
const FOLDERS: [&str; 6] = ["ffi", "datapath", "control", "bench", "tests", "docs"];

/// Every document whose paths must be true today, by its path from the root. The changelog and superseded decisions
/// tell of files that are gone.
fn documents() -> BTreeMap<String, String> {
    let root = root();
    let mut found = BTreeMap::new();
    for folder in ["", "docs", "docs/decisions", "tests"] {
        let entries = fs::read_dir(root.join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
        for entry in entries {
            let path = entry.expect("directory entry").path();
            let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
            if path.extension().is_none_or(|extension| extension != "md") || name == "CHANGELOG.md" {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            if !text.contains("**Superseded by") {
                found.insert(name, text);
            }
        }
    }
    found
}

/// Paths that a document names and that do not exist: in backquotes from the root, as targets of links from its folder.
fn path_complaints(name: &str, text: &str, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let in_backquotes = text.split('`').skip(1).step_by(2).filter(|word| {
        let folder = word.split_once('/').map(|(folder, _)| folder);
        folder.is_some_and(|folder| FOLDERS.contains(&folder)) && !word.contains([' ', '*', '<', '{', '\n'])
    });
    let folder = Path::new(name).parent().unwrap_or(Path::new(""));
    let links = text.split("](").skip(1).filter_map(|rest| {
        let target = rest.split_once(')')?.0.split('#').next().unwrap_or_default();
        let elsewhere = target.is_empty() || target.contains("://") || target.contains(char::is_whitespace);
        (!elsewhere).then(|| folder.join(target))
    });
    in_backquotes
        .map(PathBuf::from)
        .chain(links)
        .filter(|path| !exists(path))
        .map(|path| format!("{name} names {}, which does not exist", path.display()))
        .collect()
}

fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn every_source_keeps_the_rules_of_the_house() {
    let all: Vec<String> = sources().iter().flat_map(|(name, text)| complaints(name, text)).collect();
    assert_none(&all);
}

#[test]
fn a_test_that_ends_early_says_so() {
    assert_none(&sources().iter().flat_map(|(name, text)| early_ends(name, text)).collect::<Vec<_>>());
}

#[test]
fn imports_go_one_way() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(root().join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata = serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON");
    assert_none(&import_complaints(&metadata));
}

/// A planted bug that the sources have moved away from shows nothing any more.
#[test]
fn every_planted_bug_still_fits_the_sources() {
    let entries = fs::read_dir(root().join("tests/src/sim/bugs")).expect("the simulator's bugs");
    let patches: Vec<PathBuf> = entries.map(|entry| entry.expect("directory entry").path()).collect();
    assert!(patches.len() >= 10, "{patches:?}");
    let misfits = patches.iter().filter_map(|patch| {
        let mut git = Command::new("git");
        git.current_dir(root()).args(["apply", "--check", "-C1"]).arg(patch);
        let output = git.output().expect("git runs");
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        (!output.status.success()).then(|| format!("{}: {why}", patch.display()))
    });
    assert_none(&misfits.collect::<Vec<_>>());
}

#[test]
fn the_specification_names_tests_that_exist() {
    let text = fs::read_to_string(root().join("docs/SPECIFICATION.md")).expect("docs/SPECIFICATION.md");
    let sources = sources();
    assert_none(&specification_complaints(&text, |test| test_exists(&sources, test)));
}

#[test]
fn no_file_stands_in_a_circle_of_imports() {
    let imports = circles::imports(&sources());
    assert_none(&circles::complaints(&imports, &circles::STANDING));
}

#[test]
fn the_documents_name_files_that_exist() {
    let root = root();
    let documents = documents();
    assert!(documents.len() > 10, "found only {:?}", documents.keys());
    let exists = |path: &Path| root.join(path).exists();
    assert_none(
        &documents.iter().flat_map(|(name, text)| path_complaints(name, text, exists)).collect::<Vec<_>>(),
    );
}

#[test]
fn a_document_that_names_a_missing_file_is_found() {
    let check = |text: &str| path_complaints("docs/A.md", text, |path| path == Path::new("docs/B.md")).len();
    assert_eq!(check("`docs/B.md` and [it](B.md#part)"), 0);
    assert_eq!(check("`docs/C.md`"), 1, "in backquotes");
    assert_eq!(check("[it](C.md)"), 1, "a link");
    assert_eq!(check("`tests/*.rs`, `a/b`, `tests/tests --x`, [page](https://host/C.md)"), 0, "no paths");
}

#[test]
fn code_is_told_from_comments_strings_and_characters() {
    let text = r##"a /* x /* y */ z */ b "q\"r" c r#"s"t"# d '\'' e 'f' <'g> // h"##;
    let code = code_of(text);
    let words: Vec<&str> = code.split_whitespace().collect();
    assert_eq!(words, ["a", "b", "c", "d", "e", "<'g>"]);
}

#[test]
fn each_broken_rule_is_found() {
    let broken = |name, text: &str| complaints(name, text).len();
    assert_eq!(broken("datapath/src/x.rs", "//! unsafe\nfn f() { \"todo!() unsafe\"; }\n"), 0);
    assert_eq!(broken("datapath/src/x.rs", "fn f() {}\n"), 1, "no //!");
    assert_eq!(broken("datapath/src/x.rs", "//! x\nfn f() { unsafe { g() } }\n"), 1, "unsafe");
    assert_eq!(broken("ffi/src/x.rs", "//! x\nfn f() { unsafe { g() } }\n"), 0, "ffi may");
    assert_eq!(broken("datapath/src/x.rs", "//! x\nfn f() { todo!() }\n"), 1, "unfinished");
    let by_itself = "//! x\nfn f() { println!(\"SKIPPED: f\") }\n";
    assert_eq!(broken("datapath/tests/x.rs", by_itself), 1, "a test left out by hand");
    assert_eq!(broken("ffi/src/testing.rs", by_itself), 0, "skip() itself");
    assert_eq!(broken("datapath/src/lib.rs", "//! x\n"), 1, "root without forbid");
    for printing in
        ["println!(\"x\")", "eprintln!()", "print!(\"x\")", "std::eprint!(\"x\")", "io::stderr().lock()"]
    {
        let text = format!("//! x\nfn f() {{ {printing}; }}\n");
        for daemon in ["datapath/src/x.rs", "ffi/src/x.rs", "control/src/x.rs", "control/src/node/x.rs"] {
            assert_eq!(broken(daemon, &text), 1, "{printing} in {daemon}");
        }
        for other in ["datapath/src/x/tests.rs", "control/build.rs", "bench/src/x.rs", "datapath/tests/x.rs"]
        {
            assert_eq!(broken(other, &text), 0, "{printing} in {other}");
        }
    }
    assert_eq!(
        broken("control/src/cli/x.rs", "//! x\nfn f() { io::stderr() }\n"),
        0,
        "the command line prints"
    );
    assert_eq!(broken("control/src/cli/x.rs", "//! x\nfn f() { println!() }\n"), 1, "but does not panic");
    assert_eq!(broken("datapath/src/x.rs", "//! println!\nfn f() { writeln!(a, \"print!\") }\n"), 0);
    let suggested = "//! x\nfn f() { \"say `costandby promote {volume}`\" }\n";
    assert_eq!(broken("control/src/role/x.rs", suggested), 1, "without --config and --node");
    assert_eq!(broken("control/src/role/x.rs", "//! x\nfn f() { \"`costandby \\\n verify\" }\n"), 1);
    assert_eq!(broken("control/src/cli/x.rs", suggested), 0, "a subcommand's help");
    assert_eq!(broken("control/src/role/x.rs", "//! x\nfn f() { \"`costandby keygen`\" }\n"), 0);
    let clock = "fn f() { Instant::now() }\n#[cfg(test)]\nmod tests { std::thread::sleep(); }\n";
    assert_eq!(
        broken("datapath/src/x.rs", &format!("//! x. Sans-IO.\n{clock}")),
        1,
        "a clock where none may be"
    );
    assert_eq!(broken("datapath/src/x.rs", &format!("//! x\n{clock}")), 0);
    let long = "//! x\n".repeat(FILE_LINES_MAX + 1);
    assert_eq!(broken("datapath/src/x.rs", &long), 1, "too long");
}

#[test]
fn an_early_end_without_a_word_is_found() {
    let helpers = "fn device() {\n    skip(\"none\");\n}\nfn by_it() {\n    device();\n}\nfn other() {\n    list.skip(1);\n}\n";
    let found = |attribute: &str, body: &str| {
        early_ends("a.rs", &format!("{helpers}{attribute}\nfn t() {{\n{body}\n}}\n")).len()
    };
    let silent = "    if missing() {\n        return;\n    }";
    assert_eq!(found("#[test]", silent), 1);
    assert_eq!(found("#[inline]", silent), 0, "no test");
    assert_eq!(found("#[test]", "    let Some(x) = other() else { return };"), 1);
    assert_eq!(found("#[test]", "    let Some(x) = device() else { return };"), 0);
    assert_eq!(found("#[test]", "    let Some(x) = by_it() else { return };"), 0);
    assert_eq!(found("#[test]", "    if missing() {\n        skip(\"x\");\n        return;\n    }"), 0);
    assert_eq!(
        found("#[test]", "    if child {\n        // Not left out: it ran.\n        return;\n    }"),
        0
    );
}

#[test]
fn an_import_against_the_stream_is_found() {
    let package = |name: &str, dependency: &str| {
        let dependencies = [serde_json::json!({ "name": dependency })];
        serde_json::json!({ "packages": [{ "name": name, "dependencies": dependencies }] })
    };
    assert_eq!(import_complaints(&package("costandby-control", "costandby-datapath")).len(), 0);
    assert_eq!(import_complaints(&package("costandby-datapath", "costandby-control")).len(), 1);
    assert_eq!(import_complaints(&package("costandby-new", "libc")).len(), 1);
}

#[test]
fn a_test_double_in_what_ships_is_found() {
    let package = |name: &str, kind: Option<&str>| {
        let dependency = serde_json::json!({
            "name": "costandby-ffi", "kind": kind, "features": ["rdma", "testing"],
        });
        serde_json::json!({ "packages": [{ "name": name, "dependencies": [dependency] }] })
    };
    assert_eq!(import_complaints(&package("costandby-control", None)).len(), 1);
    assert_eq!(import_complaints(&package("costandby-control", Some("dev"))).len(), 0);
    assert_eq!(import_complaints(&package("costandby-tests", None)).len(), 0);
    let names = |name, text: &str| complaints(name, text).len();
    assert_eq!(names("datapath/src/x.rs", "//! x\nuse crate::testing::fault::Plan;\n"), 1);
    assert_eq!(names("control/src/x.rs", "//! x\nuse costandby_datapath::{testing::fault, wire};\n"), 1);
    assert_eq!(
        names("datapath/src/x.rs", "//! x\n#[cfg(test)]\nmod tests { use crate::testing::fault; }\n"),
        0
    );
    assert_eq!(names("datapath/src/testing/x.rs", "//! x\nuse crate::testing::fault;\n"), 0);
}

#[test]
fn a_promise_that_names_no_real_test_is_found() {
    let titles: String = (1..=PROMISES).map(|n| format!("\n## {n}. Kept\nText.\n")).collect();
    let kept: String = (1..PROMISES).map(|n| format!("| {n} | all of it | pending |\n")).collect();
    let table = |last: &str| {
        format!("{titles}\n## Tests\n| promise | what | test |\n| --- | --- | --- |\n{kept}{last}\n")
    };
    let check = |text: &str| specification_complaints(text, |test| test == "a::b").len();
    assert_eq!(check(&table("| 12 | x | `a::b` |")), 0);
    assert_eq!(check(&table("| 12 | x | `a::c` |")), 2, "no such test, and so none");
    assert_eq!(check(&table("| 12 | x | hope |")), 2, "neither test nor pending");
    assert_eq!(check(&table("| 12 | `a::b` |")), 2, "a cell is missing");
    assert_eq!(check(&table("")), 1, "no row");
    assert_eq!(check(&table("| 12 | x | `a::b` |\n| 13 | x | `a::b` |")), 1, "no such promise");
    assert_eq!(check("\n## 1. Alone\n| 1 | x | pending |\n"), 1, "promises missing");
}

#[test]
fn a_test_is_told_from_another_function() {
    let text = "#[test]\nfn real() {}\nfn helper() {}\n".to_owned();
    let sources = BTreeMap::from([("datapath/src/a.rs".to_owned(), text)]);
    assert!(test_exists(&sources, "datapath::a::tests::real"));
    assert!(!test_exists(&sources, "datapath::a::tests::helper"), "a function, but no test");
    assert!(!test_exists(&sources, "datapath::b::real"), "no such file");
    assert!(!test_exists(&sources, "fuzz::a"), "no such fuzz target");
}
