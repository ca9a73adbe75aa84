//! The part of the power rounds that runs inside each guest: tells the host how its daemon sees the volume, and carries
//! out what the host orders.
//!
//! States go out as lines `#state JSON`, each when it has changed; orders come in by lines of /share/orders, one word
//! each, and are answered by `#order NUMBER ok` or `#order NUMBER ` and the refusal. Nothing is decided here: that is
//! [`super::power`]'s.
//!
//! Invariants: an order is carried out once, in its turn; the last state told is not older than [`LOOK_INTERVAL`] and
//! one answer of the daemon.

use super::failover::VOLUME;
use costandby_control::admin::{Command, VolumeStatus};
use costandby_control::admin_client::{AdminClient, ClientError};
use std::path::Path;
use std::time::Duration;

/// Lines of the guest's output that tell a state begin so,
pub const STATE: &str = "#state ";
/// and those that answer an order so.
pub const ORDER: &str = "#order ";
/// The order to end.
pub const STOP: &str = "stop";
/// The order to promote the volume here.
pub const PROMOTE: &str = "promote";

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Answers that may fail to come, one after the other, before the daemon counts as dead.
const SILENCE_MAX: u32 = 100;

/// Runs until ordered to stop.
///
/// # Errors
/// A daemon that does not answer any more, and an order that is none.
pub fn run(node: &str, admin: &Path, orders: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let admin = AdminClient::new(admin, node);
    let (mut told, mut done, mut silence) = (None, 0, 0);
    loop {
        match runtime.block_on(state(&admin)) {
            Ok(status) => {
                silence = 0;
                if told.as_ref() != Some(&status) {
                    let text = serde_json::to_string(&status).map_err(|error| error.to_string())?;
                    println!("{STATE}{text}");
                    told = Some(status);
                }
            }
            Err(error) if silence == SILENCE_MAX => return Err(format!("the daemon is silent: {error}")),
            Err(_) => silence += 1,
        }
        let text = std::fs::read_to_string(orders).unwrap_or_default();
        // A line without its end is still being written.
        for order in text.split_inclusive('\n').filter(|line| line.ends_with('\n')).skip(done) {
            done += 1;
            match order.trim() {
                STOP => return Ok(()),
                PROMOTE => {
                    let told = runtime.block_on(admin.command(VOLUME, Command::Promote { force: false }));
                    println!(
                        "{ORDER}{done} {}",
                        told.map_or_else(|error| error.to_string(), |_| "ok".to_owned())
                    );
                }
                other => return Err(format!("{other:?} is no order")),
            }
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

async fn state(admin: &AdminClient) -> Result<VolumeStatus, ClientError> {
    let status = admin.status().await?;
    Ok(status.volumes.into_iter().find(|volume| volume.name == VOLUME).expect("the only volume"))
}
