//! Two nodes on two machines, as far as the kernel's network is concerned: name spaces joined by a cable that is pulled
//! and plugged in again under load, and a third machine, whose client finds the service at an address that moves. Skipped,
//! aloud, where the test may not make name spaces.

use costandby_control::admin::Command;
use costandby_tests::cable::{Cable, ip};
use costandby_tests::floating::{PATIENCE, connect, front_uri, qemu};
use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::process::{run, system_command};
use costandby_tests::wait_for;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

const SIZE_MIB: u64 = 12;

#[test]
fn a_cable_pulled_under_load_costs_nothing_but_a_copy() {
    // Not left out in silence: `lay` says so.
    let Some(cable) = Cable::lay() else { return };
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.namespaces = Some(cable.namespaces());
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

/// A third name space, with a bridge that both nodes are connected to by `front`. Dropping it removes it.
struct Clients {
    space: String,
    service: SocketAddr,
}

impl Clients {
    fn beside(cable: &Cable) -> Self {
        let id = std::process::id();
        let octet = id.to_le_bytes()[0];
        let service = SocketAddr::from((Ipv4Addr::new(10, 232, octet, 9), 10809));
        let clients = Self { space: format!("costandby-{id}-c"), service };
        let space = clients.space.as_str();
        ip(&["netns", "add", space]);
        ip(&["-n", space, "link", "add", "name", "bridge", "type", "bridge"]);
        for (at, node) in cable.spaces().iter().enumerate() {
            let port = format!("port{at}");
            ip(&["-n", node, "link", "add", "front", "type", "veth", "peer", "name", &port, "netns", space]);
            ip(&["-n", space, "link", "set", &port, "master", "bridge", "up"]);
            ip(&["-n", node, "link", "set", "front", "up"]);
        }
        ip(&["-n", space, "address", "add", &format!("10.232.{octet}.1/24"), "dev", "bridge"]);
        ip(&["-n", space, "link", "set", "bridge", "up"]);
        clients
    }

    /// Gives the service's address to a node, or takes it away.
    fn address(&self, cable: &Cable, node: usize, verb: &str) {
        ip(&[
            "-n",
            &cable.spaces()[node],
            "address",
            verb,
            &format!("{}/24", self.service.ip()),
            "dev",
            "front",
        ]);
        if verb == "add" {
            // As the gratuitous ARP does that keepalived and Pacemaker send.
            ip(&["-n", &self.space, "neigh", "flush", "dev", "bridge"]);
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        run(system_command("ip").args(["netns", "delete", &self.space]));
    }
}

#[test]
fn a_client_follows_an_address_that_moves_with_the_service() {
    // Not left out in silence: `lay` says so.
    let Some(cable) = Cable::lay() else { return };
    let clients = Clients::beside(&cable);
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.namespaces = Some(cable.namespaces());
    settings.floating = Some(clients.service);
    // Neither node has the address yet.
    let mut pair = Pair::start(settings);
    for node in [ALPHA, BETA] {
        assert_eq!(pair.not_listening(node), [], "it is listened on before it is there");
    }
    clients.address(&cable, ALPHA, "add");
    let front = pair.path("front");
    let mut command = system_command("ip");
    command.args(["netns", "exec", &clients.space, "qemu-storage-daemon"]);
    let server = format!("server.type=inet,server.host={},server.port=10809", clients.service.ip());
    let _qemu = qemu(&mut command, &server, &front);
    let uri = front_uri(&front);
    let mut client = wait_for("qemu serves", PATIENCE, || connect(&uri).ok());
    client.write(0, b"written through alpha", true).expect("a write");

    pair.hand_over("db", ALPHA);
    clients.address(&cable, ALPHA, "delete");
    clients.address(&cable, BETA, "add");
    let mut found = [0; 21];
    client.read(0, &mut found).expect("a read after the handover");
    assert_eq!(&found, b"written through alpha");
    client.write(4096, b"written through beta", true).expect("a write after the handover");

    pair.kill(BETA);
    wait_for("alpha may be promoted", PATIENCE, || {
        pair.tell(ALPHA, "db", Command::Promote { force: false }).ok()
    });
    clients.address(&cable, BETA, "delete");
    clients.address(&cable, ALPHA, "add");
    let mut found = [0; 20];
    client.read(4096, &mut found).expect("a read after the crash");
    assert_eq!(&found, b"written through beta");
    client.write(8192, b"and back", true).expect("a write after the crash");
    pair.up(BETA);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}
