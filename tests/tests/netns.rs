//! Two nodes on two machines, as far as the kernel's network is concerned: name spaces joined by a cable that is pulled
//! and plugged in again under load. Skipped, aloud, where the test may not make name spaces.

use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::process::{run, system_command};
use costandby_tests::{skip, wait_for};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

const SIZE_MIB: u64 = 12;

/// Where the nodes listen for each other.
const PORT: u16 = 7790;

/// Two name spaces and a cable. Dropping it removes them.
struct Cable {
    spaces: [String; 2],
    addresses: [SocketAddr; 2],
}

impl Cable {
    /// `None`, said aloud, where this is not allowed.
    fn lay() -> Option<Self> {
        let id = std::process::id();
        let spaces = ["a", "b"].map(|end| format!("costandby-{id}-{end}"));
        let octet = id.to_le_bytes()[0];
        let ips = [1, 2].map(|host| Ipv4Addr::new(10, 231, octet, host));
        let made = system_command("ip").args(["netns", "add", &spaces[0]]).output();
        if !made.as_ref().is_ok_and(|made| made.status.success()) {
            skip(format_args!("network name spaces cannot be made: {made:?}"));
            return None;
        }
        let cable = Self { spaces, addresses: ips.map(|ip| SocketAddr::from((ip, PORT))) };
        let [a, b] = &cable.spaces;
        ip(&["netns", "add", b]);
        ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b]);
        for (space, address) in cable.spaces.iter().zip(ips) {
            ip(&["-n", space, "address", "add", &format!("{address}/24"), "dev", "cable"]);
            ip(&["-n", space, "link", "set", "lo", "up"]);
            ip(&["-n", space, "link", "set", "cable", "up"]);
        }
        Some(cable)
    }

    fn set(&self, state: &str) {
        ip(&["-n", &self.spaces[1], "link", "set", "cable", state]);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for space in &self.spaces {
            run(system_command("ip").args(["netns", "delete", space]));
        }
    }
}

fn ip(args: &[&str]) {
    run(system_command("ip").args(args)).ok();
}

#[test]
fn a_cable_pulled_under_load_costs_nothing_but_a_copy() {
    let Some(cable) = Cable::lay() else { return };
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    let [a, b] = cable.spaces.clone();
    settings.namespaces = Some([(a, cable.addresses[0]), (b, cable.addresses[1])]);
    // A network of the two nodes' own: they run without a key, and say so.
    settings.keyed = false;
    let mut pair = Pair::start(settings);
    pair.wait_log(ALPHA, &["insecure"]);
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    for round in 0..3 {
        let writing = ledger.write(&pair.uri(ALPHA, "db"), round);
        wait_for("a start", LIMIT, || (writing.acked() > 100).then_some(()));
        cable.set("down");
        for node in [ALPHA, BETA] {
            pair.wait_status(node, "db", "apart", |status| status.peer_state == "Unknown");
        }
        let before = writing.acked();
        wait_for("the primary goes on alone", LIMIT, || (writing.acked() > before + 100).then_some(()));
        std::thread::sleep(Duration::from_millis(200 * round));
        cable.set("up");
        pair.wait_in_sync("db");
        ledger = writing.finish_ok();
        ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("round {round}: {lost}"));
        pair.settle_and_compare("db");
        pair.assert_alive(ALPHA);
        pair.assert_alive(BETA);
    }
}
