//! SIGKILL under fio, which verifies what it was told is written.
//!
//! fio saves how far it came when its server is gone (`--trigger-file`); a second fio then reads back every write
//! that the first one saw acknowledged, from whichever node serves. The header of each block carries the round's seed, so
//! that a block which fell back to an earlier round is found too. What fio sees is what any NBD client would see: none
//! of the code that checks is ours.

use costandby_control::admin::Command as Operator;
use costandby_tests::pair::{ALPHA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Guarded, PROGRAM_LIMIT, run};
use costandby_tests::{Rng, seed, wait_for};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: u64 = 10;
const SIZE_MIB: u64 = 24;

/// Writers, each with a part of the volume and one write at a time: of several, fio's state tells only roughly which were
/// acknowledged.
const JOBS: u64 = 4;

/// Writes a second of each, so that once over the volume takes longer than the latest kill.
const RATE: u64 = 1000;

/// How long fio's state has not grown when it is whole: fio writes it in a few calls, between which a busy machine may leave it.
const STATE_WRITTEN: Duration = Duration::from_millis(300);

/// How long a survivor may need until it may be promoted.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(5);

struct Rounds {
    pair: Pair,
    rng: Rng,
    primary: usize,
    seed: u64,
}

impl Rounds {
    fn pause(&mut self, from_ms: u64, to_ms: u64) {
        std::thread::sleep(Duration::from_millis(from_ms + self.rng.below(to_ms - from_ms)));
    }

    fn fio(&self, args: &[&str]) -> Command {
        let mut fio = Command::new("fio");
        fio.current_dir(self.directory());
        fio.args(["--name=round", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=1", "--thread"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1"]).args(args);
        let part = SIZE_MIB / JOBS;
        fio.arg(format!("--numjobs={JOBS}")).arg(format!("--offset_increment={part}M"));
        fio.arg(format!("--size={part}M")).arg(format!("--randseed={}", self.seed));
        fio.arg(format!("--uri={}", self.pair.uri(self.primary, "db")));
        fio
    }

    /// Where fio keeps its state of this round.
    fn directory(&self) -> PathBuf {
        self.pair.path("fio")
    }

    /// fio at work, which writes every block of the volume once.
    fn writing(&mut self) -> Guarded {
        self.seed = self.rng.below(1 << 31);
        let _ = std::fs::remove_dir_all(self.directory());
        std::fs::create_dir(self.directory()).expect("a directory");
        let rate = format!("--rate_iops={RATE}");
        let mut fio = self.fio(&["--do_verify=0", "--verify_state_save=1", "--trigger-file=gone", &rate]);
        // With a server that is gone, fio's nbd engine says the same line for ever.
        let fio = Guarded::spawn(fio.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()));
        wait_for("fio writes", LIMIT, || {
            let status = self.pair.status(self.primary, "db")?;
            (status.in_flight > 0).then_some(())
        });
        fio
    }

    /// Has fio save its state, now that its server is gone. It may go on trying that server and is killed then.
    fn save_state(&self, mut fio: Guarded) {
        File::create(self.directory().join("gone")).expect("a file");
        for job in 0..JOBS {
            let state = self.directory().join(format!("local-round-{job}-verify.state"));
            let (mut before, mut since) = (0, Instant::now());
            wait_for("fio has saved its state", LIMIT, || {
                let len = state.metadata().ok()?.len();
                if std::mem::replace(&mut before, len) != len {
                    since = Instant::now();
                }
                // It has not grown for a while: that is all of it.
                (len > 0 && since.elapsed() >= STATE_WRITTEN).then_some(())
            });
        }
        let ended = fio.ended();
        assert!(!ended.is_some_and(|status| status.success()), "fio was done before its server died");
    }

    /// Reads back what fio saw acknowledged; how many blocks those were.
    fn verify(&self) -> u64 {
        let args = ["--verify_only", "--verify_state_load=1", "--verify_state_save=0"];
        run(self.fio(&args).args(["--output-format=json", "--output=report"])).ok();
        let text = std::fs::read_to_string(self.directory().join("report")).expect("fio's report");
        // Its engine says a word of its own before the report.
        let report = text.find('{').map(|start| &text[start..]).expect("a report");
        let report: serde_json::Value = serde_json::from_str(report).expect("JSON");
        let jobs = report["jobs"].as_array().expect("fio's jobs");
        jobs.iter().map(|job| job["read"]["total_ios"].as_u64().expect("fio counts what it reads")).sum()
    }

    fn kill_primary(&mut self) -> u64 {
        let fio = self.writing();
        self.pause(0, 900);
        let (dead, survivor) = (self.primary, 1 - self.primary);
        self.pair.kill(dead);
        wait_for("the survivor may be promoted", TAKEOVER_LIMIT, || {
            self.pair.tell(survivor, "db", Operator::Promote { force: false }).ok()
        });
        self.save_state(fio);
        self.primary = survivor;
        let verified = self.verify();
        self.pair.up(dead);
        verified
    }

    fn kill_standby(&mut self) -> u64 {
        let mut fio = self.writing();
        self.pause(0, 600);
        self.pair.kill(1 - self.primary);
        self.pause(0, 400);
        self.pair.up(1 - self.primary);
        let ended = fio.wait(PROGRAM_LIMIT);
        assert!(ended.is_some_and(|status| status.success()), "fio met an error: {ended:?}");
        self.verify()
    }

    fn kill_both(&mut self) -> u64 {
        let fio = self.writing();
        self.pause(0, 900);
        let first = usize::try_from(self.rng.below(2)).expect("0 or 1");
        self.pair.kill(first);
        self.pair.kill(1 - first);
        self.save_state(fio);
        self.pair.up(first);
        self.pair.up(1 - first);
        self.pair.wait_in_sync("db");
        self.primary = self.pair.primary("db");
        self.verify()
    }
}

#[test]
fn fio_finds_every_acknowledged_write_after_each_of_10_kills() {
    let mut rng = Rng::new(seed());
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.peer_timeout = "2s";
    let pair = Pair::start(settings);
    let seed = rng.next_u64();
    let mut rounds = Rounds { pair, rng, primary: ALPHA, seed };
    let mut total = 0;
    for round in 0..ROUNDS {
        let kind = [0, 1, 2, 0, 1][usize::try_from(round % 5).expect("small")];
        let was = NODES[rounds.primary];
        let verified = match kind {
            0 => rounds.kill_primary(),
            1 => rounds.kill_standby(),
            _ => rounds.kill_both(),
        };
        let what = ["primary", "standby", "both"][kind];
        println!("round {round}: killed {what} ({was} was primary), fio found all of {verified} blocks");
        total += verified;
        rounds.pair.wait_in_sync("db");
        // Once more, now that one of the disks has caught up.
        assert_eq!(rounds.verify(), verified, "fio reads back the same again");
        rounds.pair.settle_and_compare("db");
    }
    assert!(total > 1000, "fio wrote: {total} blocks in all");
}
