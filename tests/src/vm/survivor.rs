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
use costandby_control::admin::{Command, VolumeStatus};
use costandby_control::admin_client::{AdminClient, ClientError};
use costandby_control::nbd_client::{Endpoint, NbdClient, NbdUri, Options};
use std::path::Path;
use std::time::{Duration, Instant};

/// Writes acknowledged before the plug may be pulled: enough that all writers are at it.
const ACKED_MIN: u64 = 300;

/// Writes acknowledged by the survivor before the dead node returns.
const ALONE_MIN: u64 = 100;

/// How long writers wait for an answer of alpha's before they take it for dead: a machine that dies closes no connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long anything may take that two idle guests do at once.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a booted guest and a full copy may take, with writers beside it.
const RETURN_LIMIT: Duration = Duration::from_secs(150);

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

    survivor.wait("both nodes are in sync", LIMIT, in_sync)?;
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
    survivor.wait("alpha is back and in sync", RETURN_LIMIT, in_sync)?;
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
    survivor.wait("nothing is under way", LIMIT, |status| {
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
        self.wait("the cable is pulled", LIMIT, |status| status.connection != "connected")?;
        println!("#cut");
        self.wait("both nodes are in sync again", RETURN_LIMIT, in_sync)?;
        println!("#healed");
        let acked = writing.acked();
        wait_acked(writing, acked + ALONE_MIN)?;
        println!("#writing-again {}", writing.acked());
        Ok(())
    }

    /// Has the writers write until alpha is gone, and takes its place.
    fn outlive(&self, writing: Writing) -> Result<Ledger, String> {
        self.wait("alpha is gone", LIMIT, |status| status.connection != "connected")?;
        let started = Instant::now();
        loop {
            match self.runtime.block_on(self.admin.command(VOLUME, Command::Promote { force: false })) {
                Ok(_) => break,
                Err(error) if started.elapsed() > LIMIT => {
                    return Err(format!("beta is not promoted: {error}"));
                }
                Err(_) => std::thread::sleep(LOOK_INTERVAL),
            }
        }
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
    fn wait(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&VolumeStatus) -> bool,
    ) -> Result<(), String> {
        let started = Instant::now();
        loop {
            let seen = self.status();
            match &seen {
                Ok(status) if wanted(status) && in_sync(status) && status.link != self.link => {
                    return Err(format!("the copies go by {}, not by {}", status.link, self.link));
                }
                Ok(status) if wanted(status) => return Ok(()),
                _ if started.elapsed() > limit => {
                    return Err(format!(
                        "waited {} s in vain until {what}; beta says {seen:?}",
                        limit.as_secs()
                    ));
                }
                _ => std::thread::sleep(LOOK_INTERVAL),
            }
        }
    }
}

fn in_sync(status: &VolumeStatus) -> bool {
    status.in_sync()
}

fn wait_acked(writing: &Writing, least: u64) -> Result<(), String> {
    let started = Instant::now();
    while writing.acked() < least {
        if started.elapsed() > LIMIT {
            return Err(format!(
                "only {} writes were acknowledged in {} s",
                writing.acked(),
                LIMIT.as_secs()
            ));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

fn connect(uri: &NbdUri) -> Result<NbdClient, String> {
    let options = Options { timeout: LIMIT, ..Options::default() };
    NbdClient::connect(uri, &options).map_err(|error| format!("connecting to {uri}: {error}"))
}

fn check(ledger: &mut Ledger, uri: &NbdUri) -> Result<(), String> {
    ledger.check(&mut connect(uri)?)
}
