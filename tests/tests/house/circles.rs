//! The rule that no file of a crate stands in a circle of imports.
//!
//! A file imports another when its code names something below `crate::`, `super::` or `self::` that the other file contains.
//! A module is made of the modules below it, so that what it takes from those is no import; and neither are `mod` lines. Tests do
//! not count: the code behind `#[cfg(test)]` and the files of tests are left out.

use super::code_of;
use std::collections::{BTreeMap, BTreeSet};

/// Circles that are not broken yet. A file that has left its circle must leave this list, too.
pub(super) const STANDING: [&[&str]; 2] = [
    &[
        "control/src/node/negotiate.rs",
        "control/src/node/peers.rs",
        "control/src/node/registry.rs",
        "control/src/node/volume.rs",
        "control/src/node/volume/relink.rs",
        "control/src/node/watch.rs",
    ],
    &[
        "tests/src/sim/checker.rs",
        "tests/src/sim/client.rs",
        "tests/src/sim/datapath.rs",
        "tests/src/sim/driver.rs",
        "tests/src/sim/metadata_calls.rs",
        "tests/src/sim/new_disks.rs",
        "tests/src/sim/operator.rs",
        "tests/src/sim/rot.rs",
        "tests/src/sim/streams.rs",
        "tests/src/sim/world.rs",
    ],
];

/// The files that each file imports, by their paths.
pub(super) type Imports = BTreeMap<String, BTreeSet<String>>;

/// The crate's directory, and the path of the module that the file is: empty for the root of a library or a program.
fn module_of(name: &str) -> Option<(&str, Vec<&str>)> {
    let (room, path) = name.split_once("/src/")?;
    let mut modules: Vec<&str> = path.strip_suffix(".rs")?.split('/').collect();
    if modules.contains(&"tests") || modules[0] == "bin" {
        return None;
    }
    if matches!(modules.as_slice(), ["lib" | "main"] | [.., "mod"]) {
        modules.pop();
    }
    Some((room, modules))
}

/// `code` without its inline tests, which stand last in a file.
pub(super) fn shipped(code: &str) -> &str {
    let tests = code.match_indices("#[cfg(test)]").find(|(at, mark)| {
        let behind = code[at + mark.len()..].trim_start().trim_start_matches("pub(crate) ");
        behind.strip_prefix("mod ").is_some_and(|name| {
            name.split_once(['{', ';']).is_some_and(|(_, rest)| {
                !rest.is_empty() && name.as_bytes()[name.len() - rest.len() - 1] == b'{'
            })
        })
    });
    tests.map_or(code, |(at, _)| &code[..at])
}

/// The paths that a `use` tree names, each as its segments: `a::{b, c::d}` names `a::b` and `a::c::d`.
fn leaves(tree: &str, before: &[String], found: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    if let Some((path, group)) = tree.split_once('{') {
        let mut path_before = before.to_vec();
        path_before
            .extend(path.split("::").map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned));
        let group = group.strip_suffix('}').unwrap_or(group);
        let (mut depth, mut from) = (0_usize, 0);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    leaves(&group[from..at], &path_before, found);
                    from = at + 1;
                }
                _ => {}
            }
        }
        leaves(&group[from..], &path_before, found);
    } else if !tree.is_empty() {
        let mut path = before.to_vec();
        path.extend(tree.split("::").map(|part| part.split_whitespace().next().unwrap_or("").to_owned()));
        found.push(path);
    }
}

/// The paths below the crate that `code` names.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate", "super", "self"] {
        for (at, _) in code.match_indices(&format!("{start}::")) {
            let before = code[..at].chars().next_back().unwrap_or(' ');
            let visibility = before == '(' && code[..at].ends_with("pub(");
            if before.is_alphanumeric() || "_:$".contains(before) || visibility {
                continue;
            }
            let used = code[..at].trim_end().ends_with("use");
            let len = if used {
                code[at..].find(';').unwrap_or(0)
            } else {
                code[at..].find(|c: char| !c.is_alphanumeric() && !"_:".contains(c)).unwrap_or(0)
            };
            leaves(code[at..at + len].trim_end_matches(':'), &[], &mut found);
        }
    }
    found
}

/// What each file of `sources` imports from its own crate.
pub(super) fn imports(sources: &BTreeMap<String, String>) -> Imports {
    let files: BTreeMap<(&str, Vec<&str>), &String> = sources
        .keys()
        .filter_map(|name| Some((module_of(name)?, name)))
        // A library's root stands for the crate where a program has one beside it.
        .filter(|(_, name)| {
            !name.ends_with("/src/main.rs") || !sources.contains_key(&name.replace("main.rs", "lib.rs"))
        })
        .collect();
    let mut found = Imports::new();
    for ((room, modules), name) in &files {
        let code = code_of(&sources[*name]);
        let imported = found.entry((*name).clone()).or_default();
        for path in paths(shipped(&code)) {
            let mut base = modules.clone();
            let mut rest = path.as_slice();
            match rest[0].as_str() {
                "crate" => base.clear(),
                "super" => drop(base.pop()),
                _ => {}
            }
            rest = &rest[1..];
            while let [first, more @ ..] = rest
                && first == "super"
            {
                base.pop();
                rest = more;
            }
            for segment in rest {
                base.push(segment);
            }
            let len = (0..=base.len()).rev().find(|&len| files.contains_key(&(*room, base[..len].to_vec())));
            if let Some(file) = len.and_then(|len| files.get(&(*room, base[..len].to_vec())))
                && !module_of(file).is_some_and(|(_, path)| path.starts_with(modules))
            {
                imported.insert((*file).clone());
            }
        }
    }
    found
}

/// Files that can be reached from `from`.
fn reached(imports: &Imports, from: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next = vec![from.to_owned()];
    while let Some(file) = next.pop() {
        for imported in imports.get(&file).into_iter().flatten() {
            if found.insert(imported.clone()) {
                next.push(imported.clone());
            }
        }
    }
    found
}

/// The largest sets of files of which each imports each other, over others or at once.
pub(super) fn circles(imports: &Imports) -> BTreeSet<BTreeSet<String>> {
    let reached: BTreeMap<&String, BTreeSet<String>> =
        imports.keys().map(|file| (file, reached(imports, file))).collect();
    let circle = |file: &String| {
        let back = reached[file].iter().filter(|other| reached.get(other).is_some_and(|r| r.contains(file)));
        back.cloned().collect::<BTreeSet<String>>()
    };
    imports.keys().map(circle).filter(|circle| !circle.is_empty()).collect()
}

/// What is wrong with the circles that there are, where those of `standing` are known.
pub(super) fn complaints(imports: &Imports, standing: &[&[&str]]) -> Vec<String> {
    let circles = circles(imports);
    let mut found = Vec::new();
    for circle in &circles {
        let known = standing.iter().any(|files| circle.iter().all(|file| files.contains(&file.as_str())));
        if !known {
            let arrows = circle.iter().flat_map(|file| {
                let imported = imports[file].iter().filter(|other| circle.contains(*other));
                imported.map(move |other| format!("  {file} imports {other}"))
            });
            found.push(format!("a circle of imports:\n{}", arrows.collect::<Vec<_>>().join("\n")));
        }
    }
    for file in standing.iter().flat_map(|files| files.iter()) {
        if !circles.iter().any(|circle| circle.contains(*file)) {
            found.push(format!(
                "{file} stands in no circle any more: take it off STANDING in tests/tests/house/circles.rs"
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Imports {
        imports(&files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect())
    }

    #[test]
    fn a_circle_is_found_and_named() {
        let files = [
            ("x/src/lib.rs", "mod a; mod b;"),
            ("x/src/a.rs", "use crate::b::{self, c::D};"),
            ("x/src/b/mod.rs", "mod c;"),
            ("x/src/b/c.rs", "fn f() { super::super::a::g() }"),
        ];
        let imports = of(&files);
        assert_eq!(complaints(&imports, &[]).len(), 1);
        let text = &complaints(&imports, &[])[0];
        assert!(text.contains("x/src/b/c.rs imports x/src/a.rs"), "{text}");
        let known: &[&str] = &["x/src/a.rs", "x/src/b/c.rs"];
        assert_eq!(complaints(&imports, &[known]), [""; 0]);
        let more: &[&str] = &["x/src/a.rs", "x/src/b/c.rs", "x/src/b/mod.rs"];
        assert_eq!(complaints(&imports, &[more]).len(), 1, "a file that has left");
        assert_eq!(complaints(&imports, &[known, &["x/src/lib.rs"]]).len(), 1, "a circle that is gone");
        assert_eq!(complaints(&imports, &[&["x/src/a.rs"]]).len(), 1, "a file that has come");
    }

    #[test]
    fn what_is_no_import_makes_no_circle() {
        let files = [
            ("x/src/a.rs", "pub(crate) fn f() {} // crate::b\n#[cfg(test)]\nmod tests { use crate::b::g; }"),
            ("x/src/b.rs", "use crate::a::f; use other::c::h;"),
            ("x/src/a/tests.rs", "use crate::b::g;"),
            ("x/src/d.rs", "mod e; use e::F; use self::e::G; use crate::d::e::H;"),
            ("x/src/d/e.rs", "use super::I;"),
            ("x/src/c.rs", "use super::b::g; fn f() { self::g() }"),
            ("y/src/b.rs", "use crate::a::f;"),
        ];
        assert_eq!(circles(&of(&files)).len(), 0);
    }
}
