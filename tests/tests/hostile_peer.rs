//! A peer that holds the key and lies: in every field of its hello and of what follows. At worst the volume's replication
//! stops, by name. A primary that serves is never overwritten, and no daemon ends.

use costandby_control::hello::{Hello, Message, Ready, encode};
use costandby_control::{admin, generation};
use costandby_datapath::units::{ByteRange, Epoch, Seq};
use costandby_datapath::wire::{Header, Kind};
use costandby_tests::ledger::Ledger;
use costandby_tests::liar::{Answer, Liar, envelope, hear, say};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SIZE_MIB: u64 = 8;
const SIZE: u64 = SIZE_MIB << 20;

/// Between two hellos that shall both be answered: a node makes a peer wait a little whose sessions come to nothing.
const PAUSE: Duration = Duration::from_millis(55);

/// Beta serves alone, with writes that nobody else has; a liar with the key takes alpha's place and dials.
struct Stage {
    pair: Pair,
    liar: Liar,
    ledger: Ledger,
}

fn stage() -> Stage {
    let mut volume = VolumeSettings::new("db", SIZE_MIB);
    volume.primary = BETA;
    let mut pair = Pair::start(Settings::new(&[volume]));
    let writing = Ledger::new(SIZE).write(&pair.uri(BETA, "db"), 1);
    std::thread::sleep(Duration::from_millis(300));
    pair.stop(ALPHA);
    let acked = writing.acked();
    costandby_tests::wait_for("beta goes on alone", LIMIT, || (writing.acked() > acked + 20).then_some(()));
    let ledger = writing.finish_ok();
    let keys = pair.keys(ALPHA);
    let liar = Liar { node: NODES[ALPHA], peer: NODES[BETA], target: pair.peer_address(BETA), keys };
    Stage { pair, liar, ledger }
}

impl Stage {
    /// Beta's hello, in answer to whichever.
    fn betas_hello(&self) -> Hello {
        let hello = self.liar.fresh_hello("db", SIZE);
        let bytes = encode(&Message::Hello(Box::new(hello)));
        match self.say(&bytes) {
            Answer::Said(message) => match *message {
                Message::Hello(hello) => *hello,
                other => panic!("{other:?}"),
            },
            Answer::Closed(why) => panic!("{why}"),
        }
    }

    /// A hello that the honest alpha might say now: what beta had when they parted.
    fn honest(&self) -> Value {
        let mut theirs = self.betas_hello();
        let parted_at = theirs.view.generations.base;
        theirs.node = NODES[ALPHA].to_owned();
        theirs.view.generations.current = parted_at;
        theirs.view.generations.base = costandby_datapath::units::Generation::ZERO;
        theirs.view.role = generation::ServingRole::Standby;
        theirs.view.was_primary = false;
        theirs.view.configured_primary = false;
        theirs.view.dirty = false;
        serde_json::to_value(Message::Hello(Box::new(theirs))).expect("JSON")
    }

    /// Says one message on a connection of its own; the answer.
    fn say(&self, bytes: &[u8]) -> Answer {
        std::thread::sleep(PAUSE);
        let said = self.liar.talk(async |channel| {
            say(channel, bytes).await.expect("sent");
            hear(channel).await
        });
        said.expect("it holds the key")
    }

    /// Still alive, still primary, and with all that it acknowledged.
    fn assert_unharmed(&mut self, after: &str) -> admin::VolumeStatus {
        self.pair.assert_alive(BETA);
        let status = self.pair.status(BETA, "db").unwrap_or_else(|| panic!("no answer after {after}"));
        assert_eq!(
            (status.role.as_str(), status.disk_state.as_str()),
            ("primary", "UpToDate"),
            "after {after}"
        );
        assert_eq!(status.size, SIZE);
        let checked = self.ledger.check(&mut self.pair.client(BETA, "db"));
        checked.unwrap_or_else(|lost| panic!("after {after}: {lost}"));
        status
    }

    /// A history without anything in common parts the volume, by name, until an operator says `connect`.
    fn look_again(&self, after: &str) {
        let status = self.pair.status(BETA, "db").unwrap_or_else(|| panic!("no answer after {after}"));
        if status.connection == "standalone" {
            let named = |words| status.advice.as_deref().is_some_and(|advice| advice.contains(words));
            assert!(named("split brain") || named("no common past"), "after {after}: {:?}", status.advice);
            let connect = admin::Command::Connect { discard_my_data: false };
            self.pair.tell(BETA, "db", connect).unwrap_or_else(|error| panic!("after {after}: {error}"));
        }
    }

    /// The honest peer comes back, and both disks become equal without an operator.
    fn assert_recovers(mut self) {
        self.pair.up(ALPHA);
        self.pair.wait_in_sync("db");
        self.assert_unharmed("the honest peer's return");
        self.pair.settle_and_compare("db");
    }
}

/// Values that a field might be changed to, right and wrong in kind.
fn values(of: &Value) -> Vec<Value> {
    let mut values = match of {
        Value::Number(_) => {
            let numbers = [0, 1, 7, SIZE - 512, SIZE + 512, 1 << 32, (1 << 33) + 1, 1 << 62, u64::MAX];
            numbers.iter().map(|number| json!(number)).collect()
        }
        Value::Bool(is) => vec![json!(!is)],
        Value::String(_) => {
            ["", "beta", "gamma", "UpToDate", "Inconsistent", "Outdated", "Failed", "Diskless", "primary"]
                .iter()
                .map(|text| json!(text))
                .chain([json!("x".repeat(5000))])
                .collect()
        }
        Value::Array(_) => {
            vec![json!([]), json!([1]), json!(vec![3; 16]), json!(["rdma"]), json!(vec![1; 5000])]
        }
        _ => Vec::new(),
    };
    values.extend([Value::Null, json!(-1), json!("no"), json!([]), json!({})]);
    values
}

/// Every message with one field changed, each with a name.
fn mutations(message: &Value) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    walk(message, &mut Vec::new(), &mut |path, value| {
        for lie in values(value) {
            let mut lied = message.clone();
            let mut at = &mut lied;
            for key in path {
                at = at.get_mut(key).expect("walked");
            }
            let shown = format!("{} = {lie:.40}", path.join("."));
            *at = lie;
            found.push((shown, lied));
        }
    });
    found
}

fn walk(value: &Value, path: &mut Vec<String>, leaf: &mut dyn FnMut(&[String], &Value)) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                path.push(key.clone());
                walk(value, path, leaf);
                path.pop();
            }
        }
        other => leaf(path, other),
    }
}

#[test]
fn no_lie_in_a_hello_has_a_serving_primary_overwritten() {
    let mut stage = stage();
    let epoch = stage.pair.status(BETA, "db").expect("a status").epoch;
    let honest = stage.honest();
    let mutations = mutations(&honest);
    assert!(mutations.len() > 150, "{} mutations", mutations.len());
    for (name, lie) in &mutations {
        let answer = stage.say(&envelope(&lie.to_string()));
        stage.look_again(name);
        let status =
            stage.pair.status(BETA, "db").unwrap_or_else(|| panic!("no answer after {name}: {answer:?}"));
        assert_eq!(status.role, "primary", "after {name}: {answer:?}");
        assert!(status.epoch <= epoch + 3 * (1 << 32), "epoch {} after {name}", status.epoch);
    }
    stage.assert_unharmed("every lie");
    stage.assert_recovers();
}

#[test]
fn who_claims_to_have_gone_on_is_refused_by_name_and_an_epoch_far_off_as_well() {
    let mut stage = stage();
    let serving = stage.betas_hello();
    let honest: Hello = match serde_json::from_value(stage.honest()).expect("a message") {
        Message::Hello(hello) => *hello,
        other => panic!("{other:?}"),
    };
    let refused = |stage: &mut Stage, what: &str, change: &dyn Fn(&mut Hello), words: &str| {
        let mut hello = honest.clone();
        change(&mut hello);
        std::thread::sleep(PAUSE);
        let said = stage.liar.talk(async |channel| {
            say(channel, &encode(&Message::Hello(Box::new(hello)))).await.expect("sent");
            [hear(channel).await, hear(channel).await]
        });
        let [_, second] = said.expect("it holds the key");
        let Answer::Said(message) = &second else { panic!("{what}: {second:?}") };
        let Message::Refuse(refuse) = &**message else { panic!("{what}: {message:?}") };
        assert!(refuse.text.contains(words), "{what}: {}", refuse.text);
        let status = stage.assert_unharmed(what);
        assert!(
            status.advice.as_deref().is_some_and(|advice| advice.contains(words)),
            "{what}: {:?}",
            status.advice
        );
        assert!(status.parted, "{what}");
    };
    let current = serving.view.generations.current;
    for role in [generation::ServingRole::Primary, generation::ServingRole::Standby] {
        refused(
            &mut stage,
            "a newer generation",
            &|hello| {
                hello.view.generations.current.0 ^= 0x55;
                hello.view.generations.history[0] = current;
                hello.view.role = role;
            },
            "went on without beta, which serves",
        );
    }
    for epoch in [1 << 62, u64::MAX, serving.view.epoch.0 + (1 << 32) + 1] {
        refused(
            &mut stage,
            "an epoch",
            &|hello| hello.view.epoch = Epoch(epoch),
            &format!("claims epoch {epoch}"),
        );
    }
    refused(&mut stage, "a size", &|hello| hello.view.size = 2 * SIZE, "bytes on beta and");
    let log = stage.pair.log(BETA);
    assert_eq!(log.lines().filter(|line| line.contains("bytes on beta and")).count(), 1, "said once");
    let status = stage.pair.status(BETA, "db").expect("a status");
    assert_eq!((status.epoch, status.connection.as_str()), (serving.view.epoch.0, "connecting"));
    stage.assert_recovers();
}

#[test]
fn no_lie_in_a_question_ends_a_daemon_or_holds_anything_of_it() {
    let mut stage = stage();
    let threads = |stage: &Stage| {
        std::fs::read_dir(format!("/proc/{}/task", stage.pair.pid(BETA))).expect("it runs").count()
    };
    let before = threads(&stage);
    let ask = json!({"ask": {"node": "alpha", "volume": "db", "rdma": true}});
    serde_json::from_value::<Message>(ask.clone()).expect("a good question");
    for (name, lie) in mutations(&ask).into_iter().chain([("a good one".to_owned(), ask)]) {
        let answer = stage.say(&envelope(&lie.to_string()));
        if let Answer::Said(message) = &answer {
            assert!(matches!(**message, Message::Refuse(_)), "{name}: {message:?}");
        }
    }
    stage.assert_unharmed("every question");
    assert!(threads(&stage) <= before + 8, "{before} threads before, {} after", threads(&stage));
    stage.assert_recovers();
}

#[test]
fn no_lie_after_the_hello_ends_a_daemon_or_changes_a_byte() {
    let mut stage = stage();
    let honest = encode(&serde_json::from_value::<Message>(stage.honest()).expect("a message"));
    // Messages that belong elsewhere, and a ready with each of its fields changed.
    let ready: Value = json!({"ready": {
        "agreement": {"verdict": {"resync": {"source": "mine", "why": "target_behind", "scope": "delta"}}, "primary": "mine",
            "epoch": 1},
        "lineage": {"volume_id": vec![1; 16], "generation": 1}
    }});
    serde_json::from_value::<Message>(ready.clone()).expect("a good ready");
    let mut second: Vec<_> = mutations(&ready);
    second.push(("ready".into(), ready));
    second.push(("hello again".into(), stage.honest()));
    for other in [
        json!({"link": {"kind": "rdma"}}),
        json!({"offer": {"address": "127.0.0.1:1"}}),
        json!({"refuse": {"code": "disks", "text": "x".repeat(50_000)}}),
        json!({"unable": {"node": "alpha", "volume": "db", "text": "\u{1b}[2J"}}),
        json!({"ask": {"node": "alpha", "volume": "db", "rdma": true}}),
        json!({"surprise": 1}),
        json!([]),
    ] {
        second.push((format!("{other:.30}"), other));
    }
    for (name, lie) in &second {
        std::thread::sleep(PAUSE);
        let said = stage.liar.talk(async |channel| {
            say(channel, &honest).await.expect("sent");
            let hello = hear(channel).await;
            // Beta may have closed by then.
            let _ = say(channel, &envelope(&lie.to_string())).await;
            (hello, hear(channel).await)
        });
        said.expect("it holds the key");
        let status = stage.pair.status(BETA, "db").unwrap_or_else(|| panic!("no answer after {name}"));
        assert_eq!(status.role, "primary", "after {name}");
    }
    stage.assert_unharmed("every second message");
    stage.assert_recovers();
}

/// Frames that a target has no business to send: to each of the two controllers' messages, and to the disk.
fn frames(epoch: u64) -> Vec<(String, Vec<u8>)> {
    let mut frames = Vec::new();
    for code in (0..26).chain([u64::MAX]) {
        for arg in [0, 1, epoch + 1, epoch + (1 << 40), 1 << 62, u64::MAX] {
            let mut header = Header::new(Kind::Control, Epoch(epoch));
            (header.aux, header.seq) = (code, Seq(arg));
            frames.push((format!("control {code} {arg}"), header.encode().to_vec()));
        }
    }
    for (kind, epoch) in
        [Kind::Write, Kind::WriteZeroes, Kind::Trim, Kind::Read, Kind::Verify, Kind::Ack, Kind::Flush]
            .into_iter()
            .flat_map(|kind| [epoch, epoch + 1, u64::MAX].map(|epoch| (kind, epoch)))
    {
        let payload = if kind.has_payload() { vec![b'X'; 4096] } else { Vec::new() };
        let mut header = Header::new(kind, Epoch(epoch));
        header.range = ByteRange::new(0, 4096);
        header.seq = Seq(1);
        header.payload_crc = if kind.has_payload() { crc32c::crc32c(&payload) } else { 0 };
        frames.push((format!("{kind:?} under {epoch}"), [header.encode().as_slice(), &payload].concat()));
    }
    frames
}

#[test]
fn no_frame_of_a_lying_target_changes_a_serving_primary() {
    let mut stage = stage();
    let epoch = stage.pair.status(BETA, "db").expect("a status").epoch;
    let (mut sessions, all) = (0, frames(epoch));
    for (name, frame) in &all {
        let honest = encode(&serde_json::from_value::<Message>(stage.honest()).expect("a message"));
        std::thread::sleep(PAUSE);
        let began = stage.liar.talk(async |channel| {
            say(channel, &honest).await.expect("sent");
            let _hello = hear(channel).await;
            let Answer::Said(message) = hear(channel).await else { return false };
            let Message::Ready(Ready { agreement, lineage }) = *message else { return false };
            let ready = Ready { agreement: agreement.mirrored(), lineage };
            if say(channel, &encode(&Message::Ready(ready))).await.is_err() {
                return false;
            }
            send_raw(channel, frame).await;
            true
        });
        sessions += u32::from(began.expect("it holds the key"));
        let status = stage.pair.status(BETA, "db").unwrap_or_else(|| panic!("no answer after {name}"));
        assert_eq!((status.role.as_str(), status.epoch), ("primary", epoch), "after {name}");
    }
    assert!(sessions as usize > all.len() / 2, "only {sessions} sessions of {}", all.len());
    stage.assert_unharmed("every frame");
    stage.assert_recovers();
}

/// Sends bytes behind the conversation, and reads for a moment what comes back.
async fn send_raw(channel: &mut costandby_control::secure::channel::Channel, bytes: &[u8]) {
    let stream = channel.stream();
    let _ = stream.write_all(bytes).await;
    let mut answer = vec![0; 1 << 16];
    let _ = tokio::time::timeout(Duration::from_millis(30), stream.read(&mut answer)).await;
}
