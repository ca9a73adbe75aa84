//! A whole NBD server in a hundred lines: the datapath's protocol over a blocking unix socket and a vector as the disk.
//!
//! What the client is tested against, and what real clients test the protocol against. Connections share the disk.

use costandby_datapath::front::nbd::export::{Export, ExportDirectory, ListedExport, Lookup};
use costandby_datapath::front::nbd::handshake::{Handshake, Outcome};
use costandby_datapath::front::nbd::proto::{
    AfterRejection, NBD_STATE_HOLE, NBD_STATE_ZERO, NbdErrno, Negotiated, Operation, REQUEST_LEN, Request,
};
use costandby_datapath::front::nbd::reply::{
    BlockStatus, Finality, done_chunk, error_reply, read_header, simple_reply,
};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

/// Bytes of the volume `db`.
pub(super) const SIZE: usize = 96 << 20;

struct Directory;

impl ExportDirectory for Directory {
    fn lookup(&self, name: &str) -> Lookup {
        match name {
            "db" => Lookup::Found(Export {
                size: SIZE as u64,
                read_only: false,
                description: "a volume for tests".to_owned(),
            }),
            "far" => Lookup::Refused { message: "volume far is served by beta".to_owned() },
            _ => Lookup::Unknown,
        }
    }

    fn list(&self) -> Vec<ListedExport> {
        vec![ListedExport { name: "db".to_owned(), description: String::new() }]
    }
}

/// Serves until the test process ends; each connection has a thread.
pub(super) fn start(directory: &Path) -> PathBuf {
    let path = directory.join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let disk = Arc::new(Mutex::new(vec![0_u8; SIZE]));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let disk = Arc::clone(&disk);
            thread::spawn(move || serve(stream.unwrap(), &disk));
        }
    });
    path
}

/// One connection from greeting to end. Errors only mean that the client went away.
fn serve(mut stream: UnixStream, disk: &Mutex<Vec<u8>>) -> io::Result<()> {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(&mut out);
    stream.write_all(&out)?;
    let mut input = vec![0; 8192];
    loop {
        let len = stream.read(&mut input)?;
        if len == 0 {
            return Ok(());
        }
        let mut rest = &input[..len];
        while !rest.is_empty() {
            out.clear();
            let result = handshake.feed(rest, &mut out, &Directory);
            stream.write_all(&out)?;
            let step = result.map_err(|error| io::Error::other(error.to_string()))?;
            rest = &rest[step.consumed..];
            match step.outcome {
                Outcome::NeedMore => {}
                Outcome::Close => return Ok(()),
                Outcome::Transmission(opened) => {
                    let mut input = rest.chain(&stream);
                    return transmit(&mut input, &stream, disk, opened.negotiated);
                }
            }
        }
    }
}

fn transmit(
    input: &mut dyn Read,
    mut output: &UnixStream,
    disk: &Mutex<Vec<u8>>,
    negotiated: Negotiated,
) -> io::Result<()> {
    loop {
        let mut header = [0; REQUEST_LEN];
        input.read_exact(&mut header)?;
        let request = Request::decode(&header).map_err(|error| io::Error::other(error.to_string()))?;
        match request.check(&negotiated) {
            Ok(checked) => {
                let Some(reply) = perform(checked.cookie, checked.operation, input, disk, negotiated)? else {
                    return Ok(());
                };
                output.write_all(&reply)?;
            }
            Err(rejection) => {
                let reply =
                    error_reply(request.cookie, rejection.errno, rejection.reason, negotiated.structured);
                output.write_all(reply.as_bytes())?;
                match rejection.after {
                    AfterRejection::Continue => {}
                    AfterRejection::Drain { len } => {
                        io::copy(&mut input.take(u64::from(len)), &mut io::sink())?;
                    }
                    AfterRejection::Close => return Ok(()),
                }
            }
        }
    }
}

/// Carries one request out; `None` at the disconnect.
fn perform(
    cookie: u64,
    operation: Operation,
    input: &mut dyn Read,
    disk: &Mutex<Vec<u8>>,
    negotiated: Negotiated,
) -> io::Result<Option<Vec<u8>>> {
    let done = simple_reply(cookie, None).to_vec();
    let place = |range: costandby_datapath::units::ByteRange| {
        usize::try_from(range.start).unwrap()..usize::try_from(range.end()).unwrap()
    };
    let mut disk = disk.lock().unwrap();
    Ok(Some(match operation {
        Operation::Read { range } => {
            let data = &disk[place(range)];
            // Every other read ends in a chunk of its own, so that clients meet both forms.
            let finality = if cookie.is_multiple_of(2) { Finality::Done } else { Finality::MoreFollows };
            let mut reply = read_header(cookie, range, negotiated.structured, finality).as_bytes().to_vec();
            reply.extend_from_slice(data);
            if negotiated.structured && finality == Finality::MoreFollows {
                reply.extend_from_slice(&done_chunk(cookie));
            }
            reply
        }
        Operation::Write { range, .. } => {
            let mut data = vec![0; usize::try_from(range.len).unwrap()];
            input.read_exact(&mut data)?;
            if data.starts_with(b"fail") {
                let reply = error_reply(cookie, NbdErrno::Io, "the disk failed", negotiated.structured);
                return Ok(Some(reply.as_bytes().to_vec()));
            }
            disk[place(range)].copy_from_slice(&data);
            done
        }
        Operation::Trim { range, .. } | Operation::WriteZeroes { range, .. } => {
            disk[place(range)].fill(0);
            done
        }
        Operation::Flush | Operation::Cache { .. } => done,
        Operation::BlockStatus { range, one } => {
            let mut status = BlockStatus::new(range, one);
            for page in disk[place(range)].chunks(4096) {
                let zero = page.iter().all(|byte| *byte == 0);
                if !status.push(page.len() as u64, if zero { NBD_STATE_HOLE | NBD_STATE_ZERO } else { 0 }) {
                    break;
                }
            }
            status.encode(cookie).as_bytes().to_vec()
        }
        Operation::Disconnect => return Ok(None),
    }))
}
