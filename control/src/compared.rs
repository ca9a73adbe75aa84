//! Compares the settings that must agree in the two nodes' configuration files; each node's hello carries them.
//!
//! One file is meant for both nodes, and nothing keeps two copies of it alike. Each volume's hello carries the settings that
//! both must have; each node compares them with its own and shows what differs in `status`, until a hello that agrees. A
//! difference stops nothing by itself: what cannot work (another size, no common link, no common `primary` of two new disks)
//! is refused where that is decided.
//!
//! Invariants: symmetric, so both nodes name the same settings; a setting that only one of the two says (another release)
//! is no difference; at most [`SETTINGS_MAX`] settings of [`SETTING_LEN_MAX`] bytes are read from a peer.

use crate::config::Volume;
use costandby_datapath::units::OnPeerLoss;
use std::collections::BTreeMap;
use std::time::Duration;

/// Settings in a hello: some times what there are.
pub const SETTINGS_MAX: usize = 32;

/// Bytes of a setting's name or value: the longest is a node's name.
pub const SETTING_LEN_MAX: usize = 255;

/// Settings by name, as the configuration writes them.
pub type Settings = BTreeMap<String, String>;

/// What a node says of `volume`.
#[must_use]
pub fn settings(volume: &Volume, peer_timeout: Duration) -> Settings {
    let on_peer_loss = match volume.on_peer_loss {
        OnPeerLoss::Continue => "continue",
        OnPeerLoss::Freeze => "freeze",
    };
    let all = [
        ("peer_timeout", format!("{}ms", peer_timeout.as_millis())),
        ("size", volume.size.to_string()),
        ("primary", volume.primary.as_str().to_owned()),
        ("link", volume.link.as_str().to_owned()),
        ("ack", volume.ack_str().to_owned()),
        ("on_peer_loss", on_peer_loss.to_owned()),
        ("checksum_first", volume.checksum_first.to_string()),
    ];
    all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Whether a peer's settings keep the bounds.
#[must_use]
pub fn is_bounded(settings: &Settings) -> bool {
    let short = |text: &String| text.len() <= SETTING_LEN_MAX;
    settings.len() <= SETTINGS_MAX && settings.iter().all(|(name, value)| short(name) && short(value))
}

/// Each setting in which the two differ, as a sentence for an operator of either.
#[must_use]
pub fn differences(mine: (&str, &Settings), theirs: (&str, &Settings)) -> Vec<String> {
    let ((node, mine), (peer, theirs)) = (mine, theirs);
    let differing = mine.iter().filter_map(|(name, value)| {
        let other = theirs.get(name).filter(|other| *other != value)?;
        // A peer's words, on one line.
        let other: String = other.chars().filter(|letter| !letter.is_control()).collect();
        Some(format!(
            "`{name}` is {value} in the configuration of {node} and {other} in that of {peer}: make the two files alike, and restart \
             the daemon whose file was wrong"
        ))
    });
    differing.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Settings {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn both_nodes_name_what_differs_and_nothing_else() {
        let alpha = of(&[("ack", "memory"), ("peer_timeout", "500ms"), ("old", "1")]);
        let beta = of(&[("ack", "memory"), ("peer_timeout", "2000ms"), ("new", "1")]);
        let (here, there) = (("alpha", &alpha), ("beta", &beta));
        let said = differences(here, there);
        assert_eq!(said.len(), 1);
        assert!(
            said[0].starts_with(
                "`peer_timeout` is 500ms in the configuration of alpha and 2000ms in that of beta"
            )
        );
        assert!(
            differences(there, here)[0].starts_with("`peer_timeout` is 2000ms in the configuration of beta")
        );
        assert!(differences(here, here).is_empty());
        assert!(differences(here, ("beta", &Settings::new())).is_empty(), "an older release says nothing");
    }

    #[test]
    fn a_peers_settings_are_bounded() {
        assert!(is_bounded(&of(&[("ack", "memory")])));
        assert!(!is_bounded(&of(&[("ack", &"x".repeat(SETTING_LEN_MAX + 1))])));
        let many: Settings = (0..=SETTINGS_MAX).map(|index| (index.to_string(), String::new())).collect();
        assert!(!is_bounded(&many));
    }
}
