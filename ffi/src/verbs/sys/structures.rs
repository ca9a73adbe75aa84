//! The structures of `infiniband/verbs.h` and `rdma/rdma_cma.h` that are used, field by field.
//!
//! Invariants: every bit pattern is valid for each of them (numbers, raw pointers and arrays of those; C enumerations
//! are numbers), so zeroes are, and what a library writes is, whichever version it has. The exceptions are
//! [`ibv_context_ops`] and what contains it, which only the library makes.
//!
//! Unions are left out: where C has one, the member that is used stands in its place.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libc::sockaddr_storage;

structures! {
    /// A device in the library's list. The library's own.
    struct ibv_device >= 664 {
        0 => _operations: [*mut c_void; 2],
        16 => node_type: c_int,
        /// `ibv_transport_type`.
        20 => transport_type: c_int,
        /// The kernel's name of it (`rxe0`); ends with a zero, as the next three do.
        24 => name: [c_char; 64],
        /// Name of its file in /dev/infiniband (`uverbs0`).
        88 => dev_name: [c_char; 64],
        152 => dev_path: [c_char; 256],
        408 => ibdev_path: [c_char; 256],
    }

    /// The pointers that the inline calls go through. The library fills in all of them before it hands out a context.
    struct ibv_context_ops = 256 {
        0 => _before_poll: [*mut c_void; 11],
        88 => poll_cq: unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int,
        96 => req_notify_cq: unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int,
        104 => _before_post: [*mut c_void; 12],
        200 => post_send: unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int,
        208 => post_recv: unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int,
        216 => _after_post: [*mut c_void; 5],
    }

    /// An open device. The library's own.
    struct ibv_context >= 280 {
        0 => device: *mut ibv_device,
        8 => ops: ibv_context_ops,
        264 => cmd_fd: c_int,
        /// Where asynchronous events are read.
        268 => async_fd: c_int,
        272 => num_comp_vectors: c_int,
    }

    /// A protection domain. The library's own.
    struct ibv_pd >= 8 {
        0 => context: *mut ibv_context,
    }

    /// Registered memory. The library's own.
    struct ibv_mr = 48 {
        0 => context: *mut ibv_context,
        8 => pd: *mut ibv_pd,
        16 => addr: *mut c_void,
        24 => length: usize,
        32 => handle: u32,
        36 => lkey: u32,
        40 => rkey: u32,
    }

    /// Where a completion queue's events are read. The library's own.
    struct ibv_comp_channel = 16 {
        0 => context: *mut ibv_context,
        8 => fd: c_int,
        12 => refcnt: c_int,
    }

    /// A completion queue. The library's own.
    struct ibv_cq >= 32 {
        0 => context: *mut ibv_context,
        8 => channel: *mut ibv_comp_channel,
        16 => cq_context: *mut c_void,
        24 => handle: u32,
        28 => cqe: c_int,
    }

    /// A shared receive queue, of which there is none here.
    struct ibv_srq >= 8 {
        0 => context: *mut ibv_context,
    }

    /// A queue pair. The library's own.
    struct ibv_qp >= 64 {
        0 => context: *mut ibv_context,
        8 => qp_context: *mut c_void,
        16 => pd: *mut ibv_pd,
        24 => send_cq: *mut ibv_cq,
        32 => recv_cq: *mut ibv_cq,
        40 => srq: *mut ibv_srq,
        48 => handle: u32,
        52 => qp_num: u32,
        56 => state: c_uint,
        60 => qp_type: c_uint,
    }

    /// What a device can do.
    struct ibv_device_attr = 232 {
        0 => fw_ver: [c_char; 64],
        /// Big-endian, as the next.
        64 => node_guid: u64,
        72 => sys_image_guid: u64,
        80 => max_mr_size: u64,
        88 => page_size_cap: u64,
        96 => vendor_id: u32,
        100 => vendor_part_id: u32,
        104 => hw_ver: u32,
        108 => max_qp: c_int,
        112 => max_qp_wr: c_int,
        116 => device_cap_flags: c_uint,
        120 => max_sge: c_int,
        124 => max_sge_rd: c_int,
        128 => max_cq: c_int,
        132 => max_cqe: c_int,
        136 => max_mr: c_int,
        140 => max_pd: c_int,
        144 => max_qp_rd_atom: c_int,
        148 => max_ee_rd_atom: c_int,
        152 => max_res_rd_atom: c_int,
        156 => max_qp_init_rd_atom: c_int,
        160 => max_ee_init_rd_atom: c_int,
        164 => atomic_cap: c_uint,
        168 => max_ee: c_int,
        172 => max_rdd: c_int,
        176 => max_mw: c_int,
        180 => max_raw_ipv6_qp: c_int,
        184 => max_raw_ethy_qp: c_int,
        188 => max_mcast_grp: c_int,
        192 => max_mcast_qp_attach: c_int,
        196 => max_total_mcast_qp_attach: c_int,
        200 => max_ah: c_int,
        204 => max_fmr: c_int,
        208 => max_map_per_fmr: c_int,
        212 => max_srq: c_int,
        216 => max_srq_wr: c_int,
        220 => max_srq_sge: c_int,
        224 => max_pkeys: u16,
        226 => local_ca_ack_delay: u8,
        227 => phys_port_cnt: u8,
    }

    /// How a port is. The exported `ibv_query_port` writes up to `flags` and no further, whatever later versions of the
    /// header have behind it, so what follows stays as it was made: zero.
    struct ibv_port_attr >= 52 {
        /// `ibv_port_state`.
        0 => state: c_uint,
        /// `ibv_mtu`, as the next.
        4 => max_mtu: c_uint,
        8 => active_mtu: c_uint,
        12 => gid_tbl_len: c_int,
        16 => port_cap_flags: u32,
        20 => max_msg_sz: u32,
        24 => bad_pkey_cntr: u32,
        28 => qkey_viol_cntr: u32,
        32 => pkey_tbl_len: u16,
        34 => lid: u16,
        36 => sm_lid: u16,
        38 => lmc: u8,
        39 => max_vl_num: u8,
        40 => sm_sl: u8,
        41 => subnet_timeout: u8,
        42 => init_type_reply: u8,
        43 => active_width: u8,
        44 => active_speed: u8,
        45 => phys_state: u8,
        /// `IBV_LINK_LAYER_*`.
        46 => link_layer: u8,
        47 => flags: u8,
        48 => port_cap_flags2: u16,
    }

    /// An address of a port. In C a union with two big-endian numbers, hence the alignment.
    #[derive(Clone, Copy)]
    #[repr(align(8))]
    struct ibv_gid = 16 {
        0 => raw: [u8; 16],
    }

    /// One entry of a device's table of addresses.
    #[derive(Clone, Copy)]
    struct ibv_gid_entry = 32 {
        0 => gid: ibv_gid,
        16 => gid_index: u32,
        20 => port_num: u32,
        /// `ibv_gid_type`.
        24 => gid_type: u32,
        28 => ndev_ifindex: u32,
    }

    /// How large a queue pair is.
    #[derive(Clone, Copy)]
    struct ibv_qp_cap = 20 {
        0 => max_send_wr: u32,
        4 => max_recv_wr: u32,
        8 => max_send_sge: u32,
        12 => max_recv_sge: u32,
        16 => max_inline_data: u32,
    }

    /// What a queue pair is made from.
    struct ibv_qp_init_attr = 64 {
        0 => qp_context: *mut c_void,
        8 => send_cq: *mut ibv_cq,
        16 => recv_cq: *mut ibv_cq,
        24 => srq: *mut ibv_srq,
        32 => cap: ibv_qp_cap,
        /// `ibv_qp_type`.
        52 => qp_type: c_uint,
        56 => sq_sig_all: c_int,
    }

    /// The part of a way that goes through routers.
    #[derive(Clone, Copy)]
    struct ibv_global_route = 24 {
        0 => dgid: ibv_gid,
        16 => flow_label: u32,
        20 => sgid_index: u8,
        21 => hop_limit: u8,
        22 => traffic_class: u8,
    }

    /// The way to a peer.
    #[derive(Clone, Copy)]
    struct ibv_ah_attr = 32 {
        0 => grh: ibv_global_route,
        24 => dlid: u16,
        26 => sl: u8,
        27 => src_path_bits: u8,
        28 => static_rate: u8,
        29 => is_global: u8,
        30 => port_num: u8,
    }

    /// What can be changed of a queue pair. A mask (`ibv_qp_attr_mask`) says which fields count.
    struct ibv_qp_attr = 144 {
        /// `ibv_qp_state`.
        0 => qp_state: c_uint,
        4 => cur_qp_state: c_uint,
        8 => path_mtu: c_uint,
        12 => path_mig_state: c_uint,
        16 => qkey: u32,
        20 => rq_psn: u32,
        24 => sq_psn: u32,
        28 => dest_qp_num: u32,
        /// `ibv_access_flags`.
        32 => qp_access_flags: c_uint,
        36 => cap: ibv_qp_cap,
        56 => ah_attr: ibv_ah_attr,
        88 => alt_ah_attr: ibv_ah_attr,
        120 => pkey_index: u16,
        122 => alt_pkey_index: u16,
        124 => en_sqd_async_notify: u8,
        125 => sq_draining: u8,
        126 => max_rd_atomic: u8,
        127 => max_dest_rd_atomic: u8,
        128 => min_rnr_timer: u8,
        129 => port_num: u8,
        130 => timeout: u8,
        131 => retry_cnt: u8,
        132 => rnr_retry: u8,
        133 => alt_port_num: u8,
        134 => alt_timeout: u8,
        136 => rate_limit: u32,
    }

    /// A piece of memory that a work request reads or writes.
    #[derive(Clone, Copy)]
    struct ibv_sge = 16 {
        0 => addr: u64,
        8 => length: u32,
        12 => lkey: u32,
    }

    /// A request to send, in the form of an RDMA write.
    struct ibv_send_wr = 128 {
        0 => wr_id: u64,
        8 => next: *mut ibv_send_wr,
        16 => sg_list: *mut ibv_sge,
        24 => num_sge: c_int,
        /// `ibv_wr_opcode`.
        28 => opcode: c_uint,
        /// `ibv_send_flags`.
        32 => send_flags: c_uint,
        /// Big-endian. C: in a union with a key to invalidate.
        36 => imm_data: u32,
        /// C: `wr.rdma.remote_addr`, in a union with atomic and datagram requests.
        40 => remote_addr: u64,
        /// C: `wr.rdma.rkey`.
        48 => rkey: u32,
        /// For atomic requests, shared receive queues, memory windows and large sends.
        52 => _unused: [u32; 19],
    }

    /// A buffer to receive into.
    #[derive(Clone, Copy)]
    struct ibv_recv_wr = 32 {
        0 => wr_id: u64,
        8 => next: *mut ibv_recv_wr,
        16 => sg_list: *mut ibv_sge,
        24 => num_sge: c_int,
    }

    /// A completion.
    struct ibv_wc = 48 {
        0 => wr_id: u64,
        /// `ibv_wc_status`.
        8 => status: c_uint,
        /// `ibv_wc_opcode`; not set in a completion that failed, nor is what follows.
        12 => opcode: c_uint,
        16 => vendor_err: u32,
        20 => byte_len: u32,
        /// Big-endian, with the opcodes that have one. C: in a union with a key that was invalidated.
        24 => imm_data: u32,
        28 => qp_num: u32,
        32 => src_qp: u32,
        36 => wc_flags: c_uint,
        40 => pkey_index: u16,
        42 => slid: u16,
        44 => sl: u8,
        45 => dlid_path_bits: u8,
    }

    /// Something that happened to a device.
    #[repr(align(8))]
    struct ibv_async_event = 16 {
        /// The port, for events of a port. C: `element.port_num`, in a union with pointers to what else it happened to.
        0 => port_num: c_int,
        4 => _rest_of_pointer: u32,
        /// `ibv_event_type`.
        8 => event_type: c_uint,
    }

    /// Where the connection manager's events are read. The library's own.
    struct rdma_event_channel = 4 {
        0 => fd: c_int,
    }

    /// An identifier of the connection manager: an end of a connection, or a listening one. The library's own.
    struct rdma_cm_id >= 352 {
        /// Null until it is bound to a device.
        0 => verbs: *mut ibv_context,
        8 => channel: *mut rdma_event_channel,
        16 => context: *mut c_void,
        24 => qp: *mut ibv_qp,
        /// C: `route.addr.src_storage`.
        32 => src_storage: sockaddr_storage,
        /// C: `route.addr.dst_storage`.
        160 => dst_storage: sockaddr_storage,
        288 => _rest_of_route: [u64; 7],
        /// `rdma_port_space`.
        344 => ps: c_uint,
        348 => port_num: u8,
    }

    /// What is agreed when a connection is made.
    struct rdma_conn_param = 24 {
        0 => private_data: *const c_void,
        8 => private_data_len: u8,
        9 => responder_resources: u8,
        10 => initiator_depth: u8,
        11 => flow_control: u8,
        12 => retry_count: u8,
        13 => rnr_retry_count: u8,
        14 => srq: u8,
        16 => qp_num: u32,
    }

    /// An event of the connection manager. The library's own.
    struct rdma_cm_event = 80 {
        0 => id: *mut rdma_cm_id,
        8 => listen_id: *mut rdma_cm_id,
        /// `rdma_cm_event_type`.
        16 => event: c_uint,
        /// A negative error number, or the reason of a rejection.
        20 => status: c_int,
        /// C: `param.conn`, in a union with what datagrams have.
        24 => conn: rdma_conn_param,
        48 => _unused: [u64; 4],
    }
}
