//! The part of the two-guest run that happens inside beta's guest: the client whose primary dies, and the operator who
//! promotes the survivor.
//!
//! It writes to alpha over the network and keeps the ledger of what alpha acknowledged. That ledger is here because here
//! it outlives alpha's guest, and because an acknowledgement that has come this far is one that a client has seen. What
//! happens is told in lines that begin with `#`, by which [`super::failover`] knows when to pull the cable or the
//! plug and when to boot alpha again.
//!
//! Invariants: nothing is promoted before the link is down, for there is no arbiter; whatever was acknowledged, by
//! alpha and later by beta, is read back whole. Any doubt ends in an error, in words.

use super::failover::{NBD_PORT, PAIR, SIZE_MIB, VOLUME};
use crate::ledger::{Ledger, Writing};
use crate::patience::Limits;
use crate::{scaled, wait_while_moving};
use costandby_control::admin::{Command, VolumeStatus};
use costandby_control::admin_client::{AdminClient, ClientError};
use costandby_control::nbd_client::{Endpoint, NbdClient, NbdUri, Options};
use std::path::Path;
use std::time::Duration;

/// Writes acknowledged before the plug may be pulled: enough that all writers are at it.
const ACKED_MIN: u64 = 300;

/// Writes acknowledged by the survivor before the dead node returns.
const ALONE_MIN: u64 = 100;

/// How long writers wait for an answer of alpha's before they take it for dead: a machine that dies closes no connection.
/// Stretched by how slow the guest is.
const PATIENCE: Duration = Duration::from_secs(10);

/// What two guests do at once, and what takes a boot or a full copy with writers beside it. Any change in how beta sees
/// the volume is progress, and is told to the host, for which it is progress too.
const LIMITS: Limits = Limits { still: Duration::from_secs(150), whole: Duration::from_secs(600) };

const LOOK_INTERVAL: Duration = Duration::from_millis(20);

struct Survivor {
    admin: AdminClient,
    runtime: tokio::runtime::Runtime,
    link: String,
}

/// Writes, survives, promotes, verifies, and waits until alpha has caught up. `link` is what must carry the copies.
///
/// # Errors
/// What does not hold, in a sentence.
pub fn run(admin: &Path, nbd: &Path, link: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let survivor = Survivor {
        admin: AdminClient::new(admin, "beta"),
        runtime: runtime.map_err(|error| error.to_string())?,
        link: link.to_owned(),
    };
    let alpha = Endpoint::Tcp { host: PAIR[0].1.to_owned(), port: NBD_PORT };
    let alpha = NbdUri { endpoint: alpha, export: VOLUME.to_owned() };
    let beta = NbdUri { endpoint: Endpoint::Unix(nbd.to_owned()), export: VOLUME.to_owned() };

    survivor.wait("both nodes are in sync", in_sync)?;
    let writing = Ledger::new(SIZE_MIB << 20).write_within(&alpha, 1, PATIENCE);
    wait_acked(&writing, ACKED_MIN)?;
    println!("#writing");
    survivor.be_cut_off(&writing)?;
    let mut ledger = survivor.outlive(writing)?;
    check(&mut ledger, &beta)?;
    println!("#verified");

    let writing = ledger.write(&beta, 2);
    wait_acked(&writing, ALONE_MIN)?;
    println!("#alone {}", writing.acked());
    survivor.wait("alpha is back and in sync", in_sync)?;
    println!("#in-sync");
    let acked = writing.acked();
    wait_acked(&writing, acked + ALONE_MIN)?;
    let acked = writing.acked();
    let (mut ledger, error) = writing.finish();
    if let Some(error) = error {
        return Err(format!("a writer of the survivor met an error: {error}"));
    }
    check(&mut ledger, &beta)?;
    connect(&beta)?.flush().map_err(|error| format!("flushing: {error}"))?;
    survivor.wait("nothing is under way", |status| {
        in_sync(status) && status.in_flight == 0 && status.dirty_bytes == 0
    })?;
    println!("#settled {acked}");
    Ok(())
}

/// Says how the connection of a node's volume changes, until the node's daemon or this program is ended.
///
/// # Errors
/// In a sentence, where there is no runtime to be had.
pub fn watch(admin: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let watched = Survivor {
        admin: AdminClient::new(admin, "alpha"),
        runtime: runtime.map_err(|error| error.to_string())?,
        link: String::new(),
    };
    let mut last = String::new();
    while let Ok(status) = watched.status() {
        if status.connection != last {
            last = status.connection;
            println!("#connection {last}");
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

impl Survivor {
    /// Goes through a cable that is pulled and plugged in again: nobody is promoted, and the writers go on.
    fn be_cut_off(&self, writing: &Writing) -> Result<(), String> {
        self.wait("the cable is pulled", |status| status.connection != "connected")?;
        println!("#cut");
        self.wait("both nodes are in sync again", in_sync)?;
        println!("#healed");
        let acked = writing.acked();
        wait_acked(writing, acked + ALONE_MIN)?;
        println!("#writing-again {}", writing.acked());
        Ok(())
    }

    /// Has the writers write until alpha is gone, and takes its place.
    fn outlive(&self, writing: Writing) -> Result<Ledger, String> {
        self.wait("alpha is gone", |status| status.connection != "connected")?;
        let promoted = wait_while_moving(LIMITS, || {
            let told = self.runtime.block_on(self.admin.command(VOLUME, Command::Promote { force: false }));
            told.map_err(|error| error.to_string())
        });
        promoted.map_err(|(over, error)| format!("beta is not promoted ({over}): {error}"))?;
        println!("#promoted {}", writing.acked());
        let (ledger, error) = writing.finish();
        match error {
            Some(_) => Ok(ledger),
            None => Err("no writer noticed that alpha died".to_owned()),
        }
    }

    fn status(&self) -> Result<VolumeStatus, ClientError> {
        let status = self.runtime.block_on(self.admin.status())?;
        Ok(status.volumes.into_iter().find(|volume| volume.name == VOLUME).expect("the only volume"))
    }

    /// Waits until beta's view of the volume is as wanted, and the copies go by the link that they should.
    fn wait(&self, what: &str, wanted: impl Fn(&VolumeStatus) -> bool) -> Result<(), String> {
        let mut told = None;
        let status = wait_while_moving(LIMITS, || {
            let seen = self.status();
            match seen {
                Ok(status) if wanted(&status) => Ok(status),
                seen => {
                    let seen = format!("{seen:?}");
                    if told.as_ref() != Some(&seen) {
                        println!("#waiting until {what}");
                        told = Some(seen.clone());
                    }
                    Err(seen)
                }
            }
        });
        let status = status
            .map_err(|(over, seen)| format!("waited in vain until {what}: {over}; beta says {seen}"))?;
        if in_sync(&status) && status.link != self.link {
            return Err(format!("the copies go by {}, not by {}", status.link, self.link));
        }
        Ok(())
    }
}

fn in_sync(status: &VolumeStatus) -> bool {
    status.in_sync()
}

fn wait_acked(writing: &Writing, least: u64) -> Result<(), String> {
    let done = wait_while_moving(LIMITS, || match writing.acked() {
        acked if acked >= least => Ok(()),
        acked => Err(acked),
    });
    done.map_err(|(over, acked)| format!("only {acked} of {least} writes were acknowledged: {over}"))
}

fn connect(uri: &NbdUri) -> Result<NbdClient, String> {
    let options = Options { timeout: scaled(LIMITS.still), ..Options::default() };
    NbdClient::connect(uri, &options).map_err(|error| format!("connecting to {uri}: {error}"))
}

fn check(ledger: &mut Ledger, uri: &NbdUri) -> Result<(), String> {
    ledger.check(&mut connect(uri)?)
}
