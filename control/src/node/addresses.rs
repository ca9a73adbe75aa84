//! The daemon's listening addresses: an address that cannot be bound is tried again until it can be, and delays
//! nothing else.
//!
//! What is refused is logged once, and again when the reason changes and when it is over; `status` lists it.
//!
//! Survives: addresses that come later or are taken by others, directories that are missing, not ours or full, files in the
//! way of a socket.

use crate::admin::NotListening;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

/// First pause before an address is tried again: one that appears while the machine starts is bound at once.
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// Longest pause: nobody waits longer than this for an address that has come.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long an attempt may take before `status` shows that it is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// The addresses that are not bound.
#[derive(Default)]
pub(super) struct Addresses {
    /// Each with the reason.
    refused: Mutex<BTreeMap<String, String>>,
}

impl Addresses {
    /// What `status` shows.
    pub(super) fn not_listening(&self) -> Vec<NotListening> {
        let refused = self.refused.lock().expect("nobody panics with it");
        let entry = |(address, reason): (&String, &String)| NotListening {
            address: address.clone(),
            reason: reason.clone(),
        };
        refused.iter().map(entry).collect()
    }

    /// One attempt on `address`, on a thread that may block.
    pub(super) async fn attempt<T: Send + 'static>(
        &self,
        address: &str,
        bind: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Option<T> {
        let mut bound = tokio::task::spawn_blocking(bind);
        let ended = match tokio::time::timeout(PATIENCE, &mut bound).await {
            Ok(ended) => ended,
            Err(_) => {
                // A directory may be on a file system that hangs.
                let reason = format!(
                    "the system has not answered within {} s: check that the socket's directory (`ls`) and its file system respond",
                    PATIENCE.as_secs()
                );
                self.note::<T>(address, Err(reason));
                bound.await
            }
        };
        self.note(address, ended.expect("a panic has ended the process"))
    }

    /// Tries until it succeeds, the first time after a pause.
    pub(super) async fn insist<T: Send + 'static>(
        &self,
        address: &str,
        bind: impl Fn() -> Result<T, String> + Clone + Send + 'static,
    ) -> T {
        let mut pause = PAUSE_MIN;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            if let Some(bound) = self.attempt(address, bind.clone()).await {
                return bound;
            }
        }
    }

    /// How an attempt on `address` ended.
    pub(super) fn note<T>(&self, address: &str, bound: Result<T, String>) -> Option<T> {
        let mut refused = self.refused.lock().expect("nobody panics with it");
        match bound {
            Ok(bound) => {
                if refused.remove(address).is_some() {
                    tracing::info!(address, "listening now");
                }
                Some(bound)
            }
            Err(reason) => {
                if refused.get(address) != Some(&reason) {
                    tracing::error!(address, "cannot listen, will try again: {reason}");
                }
                refused.insert(address.to_owned(), reason);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn an_address_is_tried_until_it_is_bound_and_shown_until_then() {
        let addresses = Addresses::default();
        assert_eq!(addresses.attempt("unix:/a", || Ok(1)).await, Some(1));
        assert_eq!(addresses.attempt("tcp:b", || Err::<u8, _>("taken".to_owned())).await, None);
        let shown = addresses.not_listening();
        assert_eq!(shown, [NotListening { address: "tcp:b".into(), reason: "taken".into() }]);
        let tries = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&tries);
        let began = tokio::time::Instant::now();
        let bound = addresses.insist("tcp:b", move || match counted.fetch_add(1, Ordering::Relaxed) {
            0..2 => Err("not there".to_owned()),
            _ => Ok("bound"),
        });
        assert_eq!(bound.await, "bound");
        assert!(addresses.not_listening().is_empty());
        assert!(began.elapsed() >= Duration::from_millis(200 + 400 + 800), "{:?}", began.elapsed());
    }
}
