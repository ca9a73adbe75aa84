//! Blocking calls of the volumes' tasks, on few threads: disks being opened, metadata being stored.
//!
//! A thousand volumes that are opened, or lose their peer, at the same moment would otherwise have a thousand threads at
//! work for calls that take a millisecond each. A call that takes long gives its place to the next one and goes on, so that
//! a disk that hangs holds up nobody but its own volume.

use std::time::Duration;
use tokio::sync::Semaphore;

/// Calls under way at a time, beside those that take long: enough for a disk array to order and merge what they flush.
const PLACES: usize = 32;

/// How long a call has its place: many times what opening a disk or a durable store takes on a disk that is well, and a
/// hundred disks that hang hold the others up for a second.
const PLACE_MAX: Duration = Duration::from_millis(300);

static FREE: Semaphore = Semaphore::const_new(PLACES);

/// Makes a call on a thread that may block, as soon as there is a place. Where this is dropped, a call that has begun goes
/// on to its end.
pub(super) async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let place = FREE.acquire().await.expect("never closed");
    let mut called = tokio::task::spawn_blocking(call);
    let ended = tokio::time::timeout(PLACE_MAX, &mut called).await;
    drop(place);
    let ended = match ended {
        Ok(ended) => ended,
        Err(_) => called.await,
    };
    ended.expect("a panic has ended the process")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier};

    #[tokio::test]
    async fn calls_share_few_threads_and_calls_that_hang_hold_up_no_others() {
        let (under_way, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let calls: Vec<_> = (0..10 * PLACES)
            .map(|_| {
                let (under_way, most) = (Arc::clone(&under_way), Arc::clone(&most));
                tokio::spawn(blocking(move || {
                    most.fetch_max(under_way.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(1));
                    under_way.fetch_sub(1, Ordering::SeqCst);
                }))
            })
            .collect();
        for call in calls {
            call.await.expect("it ends");
        }
        assert!(most.load(Ordering::SeqCst) <= PLACES, "{most:?}");

        let end = Arc::new(Barrier::new(2 * PLACES + 1));
        let hang = |_| {
            let end = Arc::clone(&end);
            tokio::spawn(blocking(move || {
                end.wait();
            }))
        };
        let hanging: Vec<_> = (0..2 * PLACES).map(hang).collect();
        assert_eq!(blocking(|| 7).await, 7, "it is made beside those that hang");
        blocking(move || {
            end.wait();
        })
        .await;
        for call in hanging {
            call.await.expect("it ends");
        }
    }
}
