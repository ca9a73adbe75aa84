//! The law suite over endpoints in memory, and what peers and devices can do to a link.

use super::fake::{self, Manner};

mod at_once {
    use super::{Manner, fake};
    crate::link_laws!(|ring_len| {
        let (here, there) = fake::pair(ring_len, Manner::default()).expect("memory");
        (Box::new(here), Box::new(there))
    });
}

mod late_and_in_heaps {
    use super::{Manner, fake};
    crate::link_laws!(|ring_len| {
        let (here, there) =
            fake::pair(ring_len, Manner { seed: Some(7), ..Manner::default() }).expect("memory");
        (Box::new(here), Box::new(there))
    });
}

/// The narrowest device: frames go in many requests, and everything runs out all the time.
mod narrow {
    use super::{Manner, fake};
    crate::link_laws! {
        |ring_len| {
            let manner = Manner { seed: Some(3), send_len: 5, write_len_max: 1024, receives: 16, ..Manner::default() };
            let (here, there) = fake::pair(ring_len, manner).expect("memory");
            (Box::new(here), Box::new(there))
        } =>
            frames_and_messages_keep_one_order,
            an_ack_that_waits_gives_way_to_the_next,
            each_frame_wakes_who_sleeps,
            closing_here_fails_each_token_once,
            an_end_that_is_dropped_is_closed,
    }
}

/// Nothing of the disk may be registered: all goes through the stage.
mod staged {
    use super::{Manner, fake};
    crate::link_laws!(|ring_len| {
        let manner = Manner { seed: Some(5), windows_max: 0, ..Manner::default() };
        let (here, there) = fake::pair(ring_len, manner).expect("memory");
        (Box::new(here), Box::new(there))
    });
}
