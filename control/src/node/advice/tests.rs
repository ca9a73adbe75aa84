//! Advice for each way in which a disk cannot be opened.

use super::*;
use costandby_datapath::disk::superblock::DiskState;
use costandby_datapath::units::Generation;
use std::path::PathBuf;

fn superblock(change: impl FnOnce(&mut Superblock)) -> Superblock {
    let mut superblock = Superblock::fresh("db", "alpha", 1 << 20, false);
    superblock.generations.current = Generation(7);
    superblock.peer_has_current = true;
    change(&mut superblock);
    superblock
}

fn case<'a>(disk: &'a Disk, error: &'a OpenError, found: Option<&'a Superblock>) -> Case<'a> {
    let commands = Commands { config: "/etc/pair.toml", volume: "db", node: "alpha", peer: "beta" };
    Case { commands, size: 1 << 20, disk, error, found }
}

fn text(error: &OpenError, found: Option<&Superblock>) -> String {
    let disk = Disk::Path(PathBuf::from("/nonexistent/db.img"));
    case(&disk, error, found).text()
}

fn metadata(error: SuperblockError) -> OpenError {
    OpenError::Metadata(error.into())
}

fn missing() -> OpenError {
    metadata(SuperblockError::Missing { path: "/nonexistent/db.img.meta".into() })
}

#[test]
fn a_disk_to_be_made_is_made_by_the_very_command_that_is_named() {
    let source = io::Error::from(Errno::NOENT);
    let error = OpenError::Disk(DiskError::Open { path: "/nonexistent/db.img".into(), source });
    let said = text(&error, None);
    assert!(said.contains("`costandby --config /etc/pair.toml --node alpha create db`"), "{said}");
    let said = text(&missing(), None);
    assert!(said.contains("`costandby --config /etc/pair.toml --node alpha create db --force`"), "{said}");
}

/// Every way in which a disk can be found.
fn errors() -> Vec<OpenError> {
    let path = || PathBuf::from("/nonexistent/db.img");
    let io = |errno: Errno| io::Error::from(errno);
    let errnos = [
        Errno::NOENT,
        Errno::ACCESS,
        Errno::PERM,
        Errno::ISDIR,
        Errno::LOOP,
        Errno::NXIO,
        Errno::IO,
        Errno::ROFS,
        Errno::MFILE,
        Errno::BUSY,
    ];
    let mut all: Vec<_> = errnos
        .into_iter()
        .flat_map(|errno| {
            let doing = "opening";
            [
                OpenError::Disk(DiskError::Open { path: path(), source: io(errno) }),
                metadata(SuperblockError::Io { doing, path: path(), source: io(errno) }),
            ]
        })
        .collect();
    all.extend([
        OpenError::Disk(DiskError::WrongType { path: path() }),
        OpenError::Disk(DiskError::TooSmall { path: path(), found: 1, needed: 2 }),
        OpenError::Disk(DiskError::Map { path: path(), len: 1, source: io(Errno::NOMEM) }),
        missing(),
        metadata(SuperblockError::Truncated { path: path(), found: 1 }),
        metadata(SuperblockError::Format { path: path(), found: 9, known: 2 }),
        metadata(SuperblockError::Locked { path: path() }),
        metadata(SuperblockError::Foreign {
            path: path(),
            what: "node",
            found: "beta".into(),
            expected: "alpha".into(),
        }),
        metadata(SuperblockError::Io { doing: "reading", path: path(), source: io(Errno::IO) }),
        OpenError::Metadata(MetadataError::Truncated { path: path(), found: 1, needed: 2 }),
        OpenError::Metadata(MetadataError::Moved { path: path() }),
    ]);
    all.extend([true, false].map(|on_record| {
        let source = DiskError::Call { path: path(), call: "fdatasync", source: io(Errno::IO) };
        OpenError::Unflushed { source, on_record }
    }));
    all
}

#[test]
fn every_text_names_the_thing_and_a_next_step() {
    for error in errors() {
        let text = text(&error, None);
        assert!(text.contains("/nonexistent/db.img") || text.contains("/dev/urandom"), "{text}");
        let step = [
            "`costandby --config /etc/pair.toml --node alpha connect db`",
            "restart the daemon",
            "start the daemon of that release",
        ];
        assert!(step.iter().any(|step| text.contains(step)), "no next step: {text}");
        assert!(
            !text.contains("restore"),
            "an old record over a newer disk can make two disks look equal: {text}"
        );
        // Whoever reads on has read what is given up before.
        for (at, _) in text.match_indices("--force") {
            assert!(text[at..].starts_with("--force` gives up what this disk holds"), "{text}");
        }
    }
}

#[test]
fn a_disk_that_may_hold_the_newest_data_is_not_given_up_lightly() {
    let alone = superblock(|superblock| {
        superblock.primary = true;
        superblock.peer_has_current = false;
    });
    for error in errors() {
        let text = text(&error, Some(&alone));
        if text.contains("--force") {
            assert!(text.contains("THEY ARE LOST WITH IT"), "{text}");
        }
        assert!(text.contains("this node was primary without beta"), "{text}");
    }
    let both = superblock(|superblock| superblock.primary = true);
    let said = text(&missing(), Some(&both));
    assert!(said.contains("by this disk's metadata beta has the data") && !said.contains("LOST"), "{said}");
    assert!(said.contains("`costandby --config /etc/pair.toml --node beta promote db`"), "{said}");
    let standby = superblock(|_| {});
    assert!(!text(&missing(), Some(&standby)).contains("promote"), "a standby's disk holds nobody up");
    let half = superblock(|superblock| superblock.disk_state = DiskState::Inconsistent);
    assert!(text(&missing(), Some(&half)).contains("part of a copy"));
    assert!(text(&missing(), None).contains("only if beta has all of the data"));
}

#[test]
fn another_disks_metadata_is_not_to_be_made_anew() {
    let error = metadata(SuperblockError::Foreign {
        path: "/nonexistent/db.img.meta".into(),
        what: "volume",
        found: "web".into(),
        expected: "db".into(),
    });
    let text = text(&error, None);
    assert!(text.contains("belongs to volume web") && !text.contains("--force"), "{text}");
}

#[test]
fn memory_that_is_refused_is_said_to_be_memory() {
    let source = io::Error::from(Errno::NOMEM);
    let error = OpenError::Disk(DiskError::Map { path: "memory:db".into(), len: 1 << 40, source });
    let text = Case { size: 1 << 40, ..case(&Disk::Memory, &error, None) }.text();
    assert!(text.contains("no 1 TiB of memory") && text.contains(" connect db`"), "{text}");
}

#[test]
fn a_path_that_is_no_disks_is_named_and_no_disk_is_called_lost() {
    let dir = tempfile::tempdir().expect("a directory");
    let [round, socket] = ["round", "socket"].map(|name| dir.path().join(name));
    std::os::unix::fs::symlink(&round, &round).expect("a link to itself");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let directory = dir.path().to_owned();
    for (path, what) in [(round, "a symbolic link"), (socket, "a socket"), (directory, "a directory")] {
        let error = costandby_datapath::disk::image::DiskImage::open(&path, 4096).expect_err("no disk");
        let said = text(&OpenError::Disk(error), None);
        assert!(said.contains(what) && said.contains(&path.display().to_string()), "{said}");
        assert!(said.contains("correct its path") && said.contains("connect db"), "{said}");
        assert!(!said.contains("lost") && !said.contains("kernel's log"), "{said}");
    }
}

#[test]
fn a_file_that_may_not_be_changed_is_not_put_down_to_its_owner_or_mode() {
    let source = io::Error::from(Errno::PERM);
    let error = OpenError::Disk(DiskError::Open { path: "/nonexistent/db.img".into(), source });
    let said = text(&error, None);
    assert!(said.contains("immutable") && !said.contains("owner"), "{said}");
}
