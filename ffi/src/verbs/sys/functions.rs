//! The functions of libibverbs and librdmacm that are used, as the manual pages of the same names describe them.

use std::ffi::{c_int, c_uint, c_void};

use libc::sockaddr;

use super::structures::*;

functions! {
    /// libibverbs: devices, memory and queues.
    struct Verbs {
        /// The devices there are; null with `errno`.
        fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device;
        /// Frees the list. Devices that are open stay.
        fn ibv_free_device_list(list: *mut *mut ibv_device);
        /// Opens a device; null with `errno`.
        fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
        /// Closes it.
        fn ibv_close_device(context: *mut ibv_context) -> c_int;
        /// Fills in what the device can do; 0 or an error number.
        fn ibv_query_device(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int;
        /// Fills in how a port is; 0 or an error number. (The header has a macro of this name that prefers a call
        /// through the context. This is the exported function, whose structure does not grow.)
        fn ibv_query_port(context: *mut ibv_context, port: u8, attributes: *mut ibv_port_attr) -> c_int;
        /// Fills in the entries of the table of addresses that are in use and returns their number, or a negative error
        /// number. (The header's `ibv_query_gid_table` adds the entry's size.)
        fn _ibv_query_gid_table(
            context: *mut ibv_context,
            entries: *mut ibv_gid_entry,
            entries_max: usize,
            flags: u32,
            entry_size: usize,
        ) -> isize;
        /// Makes a protection domain; null with `errno`.
        fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
        /// Gives it back.
        fn ibv_dealloc_pd(domain: *mut ibv_pd) -> c_int;
        /// Registers memory; null with `errno`. (The header has a macro of this name that takes another way for flags
        /// that a kernel may ignore, from 1 << 20 on; none of them is used.)
        fn ibv_reg_mr(domain: *mut ibv_pd, start: *mut c_void, len: usize, access: c_int) -> *mut ibv_mr;
        /// Deregisters it; 0 when the device has stopped using it.
        fn ibv_dereg_mr(region: *mut ibv_mr) -> c_int;
        /// Makes a channel for events of completion queues; null with `errno`.
        fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
        /// Destroys it.
        fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
        /// Makes a completion queue of at least `len` entries; null with `errno`.
        fn ibv_create_cq(
            context: *mut ibv_context,
            len: c_int,
            tag: *mut c_void,
            channel: *mut ibv_comp_channel,
            vector: c_int,
        ) -> *mut ibv_cq;
        /// Destroys it. Waits until its events are acknowledged.
        fn ibv_destroy_cq(queue: *mut ibv_cq) -> c_int;
        /// Takes an event; -1 with `errno`.
        fn ibv_get_cq_event(
            channel: *mut ibv_comp_channel,
            queue: *mut *mut ibv_cq,
            tag: *mut *mut c_void,
        ) -> c_int;
        /// Acknowledges events.
        fn ibv_ack_cq_events(queue: *mut ibv_cq, count: c_uint);
        /// Makes a queue pair; null with `errno`.
        fn ibv_create_qp(domain: *mut ibv_pd, attributes: *mut ibv_qp_init_attr) -> *mut ibv_qp;
        /// Changes the attributes that the mask names; 0 or an error number.
        fn ibv_modify_qp(queue_pair: *mut ibv_qp, attributes: *mut ibv_qp_attr, mask: c_int) -> c_int;
        /// Destroys it; 0 when the device has let go of it.
        fn ibv_destroy_qp(queue_pair: *mut ibv_qp) -> c_int;
        /// Takes an event of the device; -1 with `errno`.
        fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
        /// Acknowledges it.
        fn ibv_ack_async_event(event: *mut ibv_async_event);
    }
}

functions! {
    /// librdmacm: connections. Calls that return a number return 0, or -1 with `errno`.
    struct Manager {
        /// Makes a channel for events; null with `errno`.
        fn rdma_create_event_channel() -> *mut rdma_event_channel;
        /// Destroys it, after its identifiers.
        fn rdma_destroy_event_channel(channel: *mut rdma_event_channel);
        /// Makes an identifier.
        fn rdma_create_id(
            channel: *mut rdma_event_channel,
            identifier: *mut *mut rdma_cm_id,
            tag: *mut c_void,
            space: c_uint,
        ) -> c_int;
        /// Destroys it. Waits until its events are acknowledged.
        fn rdma_destroy_id(identifier: *mut rdma_cm_id) -> c_int;
        /// Moves it to another channel. Waits as above.
        fn rdma_migrate_id(identifier: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int;
        /// Binds it to an address, and to the device that has it.
        fn rdma_bind_addr(identifier: *mut rdma_cm_id, address: *mut sockaddr) -> c_int;
        /// Listens for connection requests.
        fn rdma_listen(identifier: *mut rdma_cm_id, backlog: c_int) -> c_int;
        /// Starts to find the device that leads to an address.
        fn rdma_resolve_addr(
            identifier: *mut rdma_cm_id,
            from: *mut sockaddr,
            to: *mut sockaddr,
            milliseconds: c_int,
        ) -> c_int;
        /// Starts to find the way there.
        fn rdma_resolve_route(identifier: *mut rdma_cm_id, milliseconds: c_int) -> c_int;
        /// Sends a connection request.
        fn rdma_connect(identifier: *mut rdma_cm_id, parameters: *mut rdma_conn_param) -> c_int;
        /// Accepts one.
        fn rdma_accept(identifier: *mut rdma_cm_id, parameters: *mut rdma_conn_param) -> c_int;
        /// Turns one down.
        fn rdma_reject(identifier: *mut rdma_cm_id, private: *const c_void, len: u8) -> c_int;
        /// Says, after the response, that this end is ready.
        fn rdma_establish(identifier: *mut rdma_cm_id) -> c_int;
        /// Ends a connection.
        fn rdma_disconnect(identifier: *mut rdma_cm_id) -> c_int;
        /// Takes an event.
        fn rdma_get_cm_event(channel: *mut rdma_event_channel, event: *mut *mut rdma_cm_event) -> c_int;
        /// Acknowledges it, which frees it.
        fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int;
        /// Fills in what a queue pair has to be changed to for the state that stands in the attributes, and the mask.
        fn rdma_init_qp_attr(
            identifier: *mut rdma_cm_id,
            attributes: *mut ibv_qp_attr,
            mask: *mut c_int,
        ) -> c_int;
    }
}
