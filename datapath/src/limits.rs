//! Every bound of the datapath, each with the sentence that says how it was picked.

/// Largest payload of one NBD request and so of one frame: 32 MiB, the size every known NBD client stays within and the
/// one the NBD specification tells servers to accept when nothing was negotiated.
pub const PAYLOAD_LEN_MAX: u32 = 32 << 20;

/// Smallest request we advertise: one byte, because the mapping has no blocks and old clients send odd tails.
pub const BLOCK_LEN_MIN: u32 = 1;

/// Block size we ask clients to prefer: the page, since smaller writes fault and write back a whole one anyway.
pub const BLOCK_LEN_PREFERRED: u32 = 4096;

/// Largest volume: 16 EiB less headroom would fit a u64, but offsets go through `i64` system calls; 8 EiB - 1 page.
pub const VOLUME_LEN_MAX: u64 = (1 << 63) - 4096;

/// Smallest volume: one page, so that every mapping has at least one.
pub const VOLUME_LEN_MIN: u64 = 4096;

/// Bytes of a peer's ring. Holds one request of the largest size and its header twice over, so a 32 MiB write never
/// waits for the whole ring to empty; a power of two and a multiple of 2 MiB, so that huge pages can back it.
pub const RING_LEN: u64 = 128 << 20;

/// Changes of one volume in flight (landed, not yet released by the peer). 32 deep on 16 connections with room to
/// spare; the window, the range table and the request table are allocated for this many once.
pub const WINDOW_LEN: usize = 1024;

/// Requests of one volume waiting for an overlapping one. More than this and the connection that sent the next one is
/// not read until there is room.
pub const WAITERS_LEN: usize = 1024;

/// Requests one NBD connection may have open before we stop reading it: what kernel and user clients use at most
/// (fio and the kernel's nbd driver stay at or under 128) with a factor of two.
pub const CONNECTION_REQUESTS_MAX: usize = 256;

/// NBD connections one node serves: enough for 64 clients of 16 connections; each costs about 1 KiB when idle.
pub const CONNECTIONS_MAX: usize = 1024;

/// Milliseconds for which the socket of an ended NBD connection is kept for a client that does not close: several round trips
/// around the world, and no long wait at a daemon's end.
pub const LINGER_MS_MAX: u64 = 1000;

/// Bytes discarded from such a socket before it is closed all the same: two of the largest writes, which a client may have
/// begun to send before it saw the end.
pub const LINGER_LEN_MAX: usize = 2 * PAYLOAD_LEN_MAX as usize;

/// Bytes discarded from such a socket in one look: a tenth of a millisecond of the reactor's time.
pub const LINGER_LOOK_LEN: usize = 512 << 10;

/// Milliseconds between two looks at such sockets: with [`LINGER_LOOK_LEN`] about what a gigabit link brings.
pub const LINGER_LOOK_MS: u64 = 4;

/// Sockets that linger at a time, beyond which the oldest closes: the clients of a few volumes that stop at once, and a
/// quarter of what is connected.
pub const LINGERING_MAX: usize = CONNECTIONS_MAX / 4;

/// Bytes of one NBD option a client may send: the longest legitimate one is an export name (4 KiB) with a list of
/// info or context requests.
pub const NBD_OPTION_LEN_MAX: u32 = 16 << 10;

/// Control messages a transport queues for a peer that does not read, after which `send` refuses: acks coalesce, so
/// only flush requests, keep-alives and role messages stand here.
pub const MESSAGES_QUEUED_MAX: usize = 256;

/// Frames claimed and not yet reported as sent or failed, on one link. The window of client writes and the background
/// copy's steps come to less than half of it, so it never binds before the ring does; it bounds the send queue when
/// frames are header-only and the ring alone would allow two million of them.
pub const POSTS_OPEN_MAX: usize = 2 * WINDOW_LEN + RESYNC_CHUNKS_IN_FLIGHT;

/// Bytes of a frame header on the wire and in the ring.
pub const HEADER_LEN: usize = 64;

/// Bytes of a ring kept for frames that take no permit (acks, flush requests, signs of life): they stand in the ring
/// behind a change that is not released yet. Twice what a sender may have queued; beyond it the byte stream is held
/// back until the change is released, and nothing is lost.
pub const RING_SLACK: usize = 2 * MESSAGES_QUEUED_MAX * HEADER_LEN;

/// Smallest ring a link is made with: a quarter of it is the slack, a quarter may be released but untold, and what is
/// left still holds a 32 KiB write. Only tests go this low.
pub const RING_LEN_MIN: usize = 4 * RING_SLACK;

/// Frames handed to the kernel in one gather call; `IOV_MAX` is 1024 and each frame uses up to three pieces.
pub const GATHER_PIECES_MAX: usize = 96;

/// Events one `Link::poll` call may deliver, so that one busy link cannot keep the reactor from the others.
pub const LINK_EVENTS_MAX: usize = 64;

/// Bytes of one background copy step. Large enough to reach the link's rate with a few in flight, small enough that a
/// foreground write to the same range waits well under a millisecond on a 10 Gbit/s link.
pub const RESYNC_CHUNK_LEN: u64 = 256 << 10;

/// Milliseconds for which clients count as busy after a request: one that writes now and then is not to find the link
/// full each time, and a copy that waits so long for one that has gone loses nothing.
pub const CLIENTS_BUSY_MS: u64 = 500;

/// Background copy steps in flight while nobody is disturbed: with 256 KiB steps this is 2 MiB, which covers the product of 10 Gbit/s and 1 ms.
pub const RESYNC_CHUNKS_IN_FLIGHT: usize = 8;

/// Bytes of the disk that one bit of the dirty bitmap usually stands for (64 KiB: 16 TiB costs 32 MiB).
pub const DIRTY_GRAIN_LEN: u64 = 64 << 10;

/// Bytes of a hole sent as one trim step by the background copy: a whole TiB is then a thousand small frames.
pub const RESYNC_HOLE_LEN_MAX: u64 = 1 << 30;

/// Calls on one disk's data at a time: flushes merge, so a second one only keeps a trim from delaying a flush.
pub const DISK_WORKERS: usize = 2;

/// Seconds a thread for calls on disks waits for another one before it ends: longer than the pauses of a steady load, whose
/// flushes and checkpoints then start no threads.
pub const DISK_WORKER_IDLE_S: u64 = 15;

/// Microseconds the adaptive mode may spin before it sleeps: about twice a loopback round trip with a context
/// switch in it; the spin shrinks to nothing when it keeps finding nothing.
pub const SPIN_US_MAX: u64 = 50;

/// Bytes of payload taken from a client in one call. A page fault on a mapping may be held up by the kernel's dirty-page
/// throttling every few dozen pages, for up to 200 ms; with this many pages a call ends well within the peer timeout.
pub const RECEIVE_LEN_MAX: usize = 256 << 10;

/// Milliseconds one connection may keep the reactor in one turn, throttling included: a fraction of the peer timeout.
pub const TURN_MS_MAX: u64 = 20;

/// Bytes the background copy asks the kernel to read ahead of itself.
pub const RESYNC_READ_AHEAD_LEN: u64 = 8 << 20;

/// Peer timeouts that a peer may be silent for while its host still answers: a program held up by its disk (a mapped
/// page that cannot be had at once) is worth waiting for, since the alternative is a copy of the whole disk. Before its first byte in a session it has one and a half:
/// it has shown nothing yet, and clients wait.
pub const STALLED_PEER_TIMEOUTS: u32 = 10;

/// Seconds the peer may take over one change or flush while it shows every other sign of life: its disk hangs. Longer
/// than any disk's own timeout (30 s in the kernel), after which it would report an error instead.
pub const PEER_ANSWER_S_MAX: u64 = 45;

/// Bytes of memory that the clients of one volume may have payloads in that are not whole in their sockets or wait there for
/// their range: two of the largest writes. Beyond it a connection is not read until there is room.
pub const PAYLOADS_ASIDE_LEN_MAX: usize = 2 * PAYLOAD_LEN_MAX as usize;

/// Bytes of such a payload that need no room there, as each connection has one at most: what one segment of a TCP stream or
/// one buffer of a socket holds, so that a small write never waits for somebody's large one; 64 MiB for all connections.
pub const PAYLOAD_OWN_LEN: usize = 64 << 10;

/// Seconds a payload may take to arrive once it has room that another client waits for, before its connection is closed: the
/// largest one takes that long at 27 Mbit/s, and smaller ones arrive over any link.
pub const PAYLOAD_ASIDE_S_MAX: u64 = 10;

/// Bytes of the longest buffer that is kept for the next payload: what clients commonly write at most.
pub const PAYLOAD_SPARE_LEN_MAX: usize = 1 << 20;

/// Such buffers: of a few connections that stream at the same time.
pub const PAYLOADS_SPARE_MAX: usize = 8;

/// Bytes of replies that the slow readers of one volume may have copied out of the mapping, because a change wanted their range:
/// two of the largest, and 64 of 1 MiB, which is much for one client. Copying so much takes about a twentieth of a second.
pub const REPLIES_COPIED_LEN_MAX: usize = 2 * PAYLOAD_LEN_MAX as usize;

/// Seconds without a request after which a connection makes room for a new client, if there is no other room: no client that
/// works is silent for so long, and a connection that was forgotten keeps nobody out for longer.
pub const CLIENT_IDLE_S: u64 = 300;

/// Seconds of silence after which a TCP client's host is asked whether it is there, seconds between two such questions, and how
/// many go without an answer until it is gone: 15 + 4 * 6 = 39 s, well under a minute, and few enough packets to cost nothing.
pub const CLIENT_KEEPALIVE_S: u64 = 15;

/// See [`CLIENT_KEEPALIVE_S`].
pub const CLIENT_KEEPALIVE_STEP_S: u64 = 6;

/// See [`CLIENT_KEEPALIVE_S`].
pub const CLIENT_KEEPALIVES: u32 = 4;

/// Milliseconds for which a TCP client may leave replies unacknowledged, or take none although some wait: as long as for an
/// idle one, so that a dead host is noticed in the same time whatever it was about.
pub const CLIENT_TIMEOUT_MS: u32 = 40_000;

/// Seconds a client may take for the whole NBD handshake.
pub const HANDSHAKE_S_MAX: u64 = 10;

/// Bytes of a peer's hello: a JSON object of known keys is under 2 KiB; histories are bounded. Sealed, with its envelope, a
/// hello is one message of Noise, which has 65,535 bytes at most.
pub const HELLO_LEN_MAX: u32 = 60 << 10;

/// Generations a superblock remembers behind the current one.
pub const GENERATION_HISTORY_LEN: usize = 8;

/// Strangers and outdated secrets turned away by one RDMA listener before it gives up: it waits for one peer, for seconds.
pub const RDMA_REFUSED_MAX: u32 = 64;

/// How long a packet may stay unacknowledged before an RDMA device sends it again: 4.096 µs × 2^14 = 67 ms. After
/// six repetitions a dead peer is noticed after half a second (a device may take up to four times as long, and then the silence
/// itself is noticed first), while an emulated peer that is held up for a tenth of one costs only repetitions.
pub const RDMA_ACK_TIMEOUT: u8 = 14;

/// Largest RDMA ring a peer may announce: far beyond any that helps, and small enough that every place in it, counted
/// in frame headers (64 bytes), fits the 32 bits of an immediate sixteen times over.
pub const RDMA_RING_LEN_MAX: u64 = 16 << 30;

/// Fewest receives a peer may announce: with less, the few kept for messages would leave none for changes.
pub const RDMA_RECEIVES_MIN: u32 = 16;

/// Most receives a peer may announce: what the widest queue pair of a known device takes (soft-RoCE's 2^20).
pub const RDMA_RECEIVES_MAX: u32 = 1 << 20;

/// Bytes of the disk registered at a time: a few milliseconds' work for the registrar's thread, four thousand pages a
/// key, and 64 keys for a GiB, where RDMA devices have tens of thousands.
pub const RDMA_SECTION_LEN: usize = 16 << 20;

/// Smallest section, where little may be registered: the largest usual request, so that most still have one source.
pub const RDMA_SECTION_LEN_MIN: usize = 1 << 20;

/// Sections a disk is cut into: their table costs 24 MiB then, for 16 TiB. Larger disks have larger sections.
pub const RDMA_SECTIONS_MAX: usize = 1 << 20;

/// Share of the machine's memory that may be registered for sending from the disks, where the configuration does not
/// say: a quarter, as registered pages can be neither reclaimed nor written back and freed.
pub const RDMA_MEMORY_SHARE: u64 = 4;

/// Bytes one RDMA link locks whatever its disk: its ring (44 MiB), the bounce buffer, headers and messages.
pub const RDMA_LINK_LOCKED_LEN: u64 = 52 << 20;

/// Bytes of the registered memory that changes are copied through while their place on the disk is not registered:
/// enough to keep 10 Gbit/s busy for 3 ms, twice over, and little beside the ring where locked memory is scarce.
pub const RDMA_BOUNCE_LEN: usize = 4 << 20;

/// Bytes copied into the bounce buffer in one piece: a quarter of it, so that skipping the bounce buffer's end wastes no more than that
/// and the next piece is copied while the one before is on its way; copying it takes under a tenth of a millisecond.
pub const RDMA_BOUNCE_PIECE_LEN_MAX: usize = RDMA_BOUNCE_LEN / 4;

/// Pieces in the bounce buffer at a time: one for each frame that may be open, and some more for long ones.
pub const RDMA_BOUNCE_PIECES_MAX: usize = 2 * POSTS_OPEN_MAX;

/// Bytes of our RDMA ring: the smallest that a change of 32 MiB can stand in whole while a quarter of it is released and
/// untold, as one has to until its checksum is known; it is locked memory, and bringing it in is what a first connection
/// waits for. What it costs against 64 and 128 MiB is less than two runs differ by (docs/decisions/0018). A multiple of 2 MiB, so that huge pages can back it.
pub const RDMA_RING_LEN: u64 = 44 << 20;

/// Bytes of the ring brought into memory in one call while it is made: ten milliseconds in an emulated machine, after
/// which it can be given up and told how far it is.
pub const RDMA_RING_STEP_LEN: usize = 1 << 20;

/// Receives we keep posted: a whole window of changes with their acks or flushes, and as much again, so that they never
/// bind before the window does; 128 KiB of buffers.
pub const RDMA_RECEIVES_LEN: u32 = 2048;

/// Receives of the peer's that only signs of life may take, which return ours: each end needs one of them a quarter of
/// its receives, so four cover a whole round that neither end has read, and as many again those under way.
pub const RDMA_RECEIVES_RESERVED: u32 = 8;

/// Work requests between two that report completion: few enough that the send queue of the smallest device (hundreds)
/// never fills up unreported, many enough that completions cost nothing beside them.
pub const RDMA_SIGNAL_EVERY: u64 = 32;

/// Work requests a link has open at most: a few a claimed change would need thousands at most when all are unread, but
/// the device sends in order, so more than a round trip's worth only waits; some devices allow no more than this.
pub const RDMA_SENDS_LEN: usize = 1024;

/// Completions taken from the device at a time: 2 KiB of ours, and half of what one poll may tell.
pub const RDMA_COMPLETIONS_MAX: usize = LINK_EVENTS_MAX / 2;

/// Milliseconds between looks, while busy, at what no completion tells (the connection manager, the device, the
/// companion connection): a few system calls each, and a dead peer is noticed well within any peer timeout.
pub const RDMA_LOOK_MS: u64 = 5;

/// Polls between looks at the clock, for [`RDMA_LOOK_MS`]: a busy poll takes a tenth of a microsecond or more, a clock
/// without the kernel's help a microsecond.
pub const RDMA_POLLS_PER_LOOK: u32 = 64;

/// Smallest grain of a dirty bitmap: a page, below which the mapping itself cannot tell what was written.
pub const DIRTY_GRAIN_LEN_MIN: u64 = 4 << 10;

/// Largest grain: a stray write of 4 KiB then costs 1 MiB of copying, about as much as anyone would accept.
pub const DIRTY_GRAIN_LEN_MAX: u64 = 1 << 20;

/// Bytes of memory that a dirty bitmap takes where nobody chose a grain: up to 24 TiB the grain is 64 KiB, beyond
/// that it doubles, so that the metadata of any volume stays under 64 MiB.
pub const DIRTY_BITMAP_LEN_WANTED: u64 = 48 << 20;

/// Bytes of memory that a dirty bitmap may take at all: 16 TiB at a grain of 4 KiB, 4 PiB at 1 MiB.
pub const DIRTY_BITMAP_LEN_MAX: u64 = 576 << 20;

/// Blocks of the dirty bitmap in one store: 1 MiB, one write's worth for a disk.
pub const DIRTY_STORE_BLOCKS_MAX: usize = 256;

/// Bytes of one activity log extent: what a crash makes dirty for each place that was being written to. 4 MiB is copied
/// in a few tens of milliseconds and holds a file system's usual neighbourhood.
pub const ACTIVITY_EXTENT_LEN: u64 = 4 << 20;

/// Smallest extent: no less than the smallest grain. Only volumes as small as the simulator's are served well by it.
pub const ACTIVITY_EXTENT_LEN_MIN: u64 = 4 << 10;

/// Largest extent: 4096 of them are 64 GiB to copy after a crash, more than an hour's worth on a slow link.
pub const ACTIVITY_EXTENT_LEN_MAX: u64 = 16 << 20;

/// Extents that may be hot at once: 4 GiB of places being written to, half a minute's copy at 1 Gbit/s after a crash.
pub const ACTIVITY_SLOTS: u32 = 1024;

/// Fewest hot extents: with fewer, almost every write would wait for a transaction.
pub const ACTIVITY_SLOTS_MIN: u32 = 16;

/// Most hot extents: their table goes once through the ring's transactions with half of the ring to spare.
pub const ACTIVITY_SLOTS_MAX: u32 = 4096;

/// Transactions in the activity log's ring: twice what the largest table needs to be told once.
pub const ACTIVITY_RING_LEN: u64 = 32;

/// Bytes behind a volume's own in which metadata is searched at every block, on a device that has grown since the metadata was
/// made: volumes mostly fill their device up to a few extents of a volume manager, and 16,384 reads take under a second.
pub const METADATA_SEARCH_FINE_LEN: u64 = 64 << 20;

/// Between two places beyond those: partitions and logical volumes end at multiples of a MiB.
pub const METADATA_SEARCH_STEP_LEN: u64 = 1 << 20;

/// Such places at most: 256 GiB of a device, a few minutes on a rotating disk, which only a start on a device that has grown
/// so far takes.
pub const METADATA_SEARCH_STEPS_MAX: u64 = 262_144;

/// Seconds after which a call on a disk that has not returned is shown to operators: a healthy disk answers within one, one that
/// corrects errors by itself within some, and the kernel gives up after 30.
pub const DISK_CALL_SLOW_S: u64 = 10;

/// Damaged parts of a bitmap that a report names one by one; the rest is counted.
pub const DAMAGE_LISTED_MAX: usize = 16;

/// Reads that a volume without a disk has under way at its peer: as many as it may have changes in flight. The next one
/// waits with its client.
pub const FETCHES_MAX: usize = WINDOW_LEN;

/// Reads a peer may have asked for and not been answered: those, and all that waited for a change and were let go at
/// once.
pub const READS_OWED_MAX: usize = FETCHES_MAX + WAITERS_LEN;

/// Bytes of one frame that answers a read: a step of the background copy, for the same reasons, as other readers' answers
/// and acks wait behind it.
pub const READ_REPLY_LEN_MAX: u64 = RESYNC_CHUNK_LEN;

/// Bytes of memory that requests of a volume without a disk may leave behind before it is given back: two of the largest
/// requests, little beside the ring that is there anyway, and enough to give back in large pieces.
pub const DISKLESS_MEMORY_LEN: u64 = 64 << 20;

/// Ranges that such memory is remembered as: 4 KiB requests all over the disk then keep 16 MiB.
pub const DISKLESS_RANGES_MAX: usize = 4096;

/// Seconds from the failure of a disk to the peer's record of it, for which clients are held: longer than a promotion is
/// waited for, as it is the same kind of store on a disk that may be busy; short enough that a client's own timeout (30 s)
/// does not end first.
pub const DETACH_S_MAX: u64 = 10;

/// Bytes compared by one step of a verification or of a copy that compares first: the largest grain, as nothing smaller
/// can be marked; its digests take the peer's reactor a tenth of a millisecond when the pages are there.
pub const VERIFY_LEN_MAX: u64 = DIRTY_GRAIN_LEN_MAX;

/// Differences waiting for credit to be told, beyond which the target applies nothing more: a sender's whole window of
/// steps is answered by fewer.
pub const DIFFERS_QUEUED_MAX: usize = RESYNC_CHUNKS_IN_FLIGHT;

/// Differing ranges that a verification lists; the rest is counted. An operator reads a screen or two of them, and a
/// disk that differs everywhere must not grow our memory.
pub const VERIFY_RANGES_LISTED_MAX: usize = 256;

/// Bytes a second at which the background copy goes on at least while clients are busy: a TiB in three days, in steps so
/// short and few that hardly a client could tell.
pub const THROTTLE_RATE_MIN: u64 = 4 << 20;

/// Bytes a second at which it begins beside busy clients, before anything is known about the link and the disks: a
/// tenth of what common disks and a gigabit link do, and few judgements away from either bound.
pub const THROTTLE_RATE_START: u64 = 32 << 20;

/// Bytes a second beyond which nothing is held back any more: more than one reactor's thread can copy.
pub const THROTTLE_RATE_MAX: u64 = 8 << 30;

/// Bytes a second up to which it grows beside clients that only read, where nothing tells how they fare: steps of a few
/// dozen microseconds each millisecond.
pub const THROTTLE_RATE_READERS: u64 = 256 << 20;

/// Bytes of the shortest steps: less than a tenth of a millisecond on a gigabit link, which doubles nobody's wait.
pub const THROTTLE_STEP_LEN_MIN: u64 = 8 << 10;

/// One in so many changes may be slow beside a copy before that is held back: half of what a 99th percentile overlooks,
/// as it finds out by going too far.
pub const THROTTLE_SLOW_ONE_IN: u64 = 200;

/// Milliseconds between judgements: at 1000 writes a second each rests on 250 of them, and a copy that disturbs is slowed
/// down before anyone can tell.
pub const THROTTLE_JUDGE_MS: u64 = 250;

/// Changes a judgement rests on at least: fewer cannot tell how many in two hundred are slow.
pub const THROTTLE_CHANGES_MIN: u64 = 200;

/// Milliseconds after which fewer changes have to do: a client that writes ten times a second counts as well.
pub const THROTTLE_JUDGE_LATEST_MS: u64 = 2000;

/// The latest undisturbed changes by which is judged: of fewer, a 99th percentile is mostly chance; more remember a load
/// that has changed since.
pub const THROTTLE_CHANGES_KNOWN: usize = 1024;

/// Milliseconds between two pauses of a copy that leaves no client undisturbed, in which to see what undisturbed is.
pub const THROTTLE_PAUSE_EVERY_MS: u64 = 2000;

/// Milliseconds such a pause takes at most: a twentieth of the time between two.
pub const THROTTLE_PAUSE_MS: u64 = 100;

/// Undisturbed changes that end such a pause.
pub const THROTTLE_PAUSE_CHANGES: u64 = 250;

/// Bytes the background copy has applied after which both disks are flushed and its bits cleared: half a second's at
/// 1 Gbit/s, so that little is copied twice when the session is lost.
pub const RESYNC_FLUSH_LEN: u64 = 64 << 20;

/// Milliseconds after which the same happens to less: a flush a second is little even for a slow disk.
pub const RESYNC_FLUSH_MS: u64 = 1000;

/// Runs of copied bytes that wait for such a flush, after which the copy waits too: 1 MiB of memory, and 4 GiB of
/// scattered grains.
pub const RESYNC_RUNS_MAX: usize = 64 << 10;

/// Messages of a dirty bitmap sent in one turn: they share a queue of [`MESSAGES_QUEUED_MAX`] with acks.
pub const DIRTY_TOLD_MAX: usize = 32;

/// Bytes of one run of a dirty bitmap in a message: what its 32-bit length holds, and a power of two.
pub const DIRTY_RUN_LEN_MAX: u64 = 1 << 31;

/// Milliseconds between checkpoints of the activity log while there is something to account for: what a crash makes
/// dirty is what was written in that time, and two flushes in ten seconds cost nothing.
pub const CHECKPOINT_MS: u64 = 10_000;

/// Milliseconds without a client after which the activity log is emptied, so that a crash then costs no copy.
pub const IDLE_RETIRE_MS: u64 = 30_000;

/// Milliseconds between stores of bits that were only cleared: a crash copies at most what was cleared in that time once
/// more.
pub const LAGGING_STORE_MS: u64 = 1000;
